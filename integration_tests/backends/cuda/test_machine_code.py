"""The machine code of the row kernels for GPUs that are not here: widths, spills, registers, fences."""

from __future__ import annotations

import pytest
from machine_code import (
    ARCHS,
    BF16,
    FORMS,
    FP16,
    FP32,
    FP32_SUM,
    FUSED,
    PLAIN,
    check,
    drawn,
    kernel_table,
    read,
)  # fmt: skip

from rmsnorm_patch.backends.cuda import schedules
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec

LENGTHS = (128, 1024, 4096, 16384)
VARIANTS = {
    "gemma": (GEMMA, BF16, BF16),
    "fp16, weight-dtype offset": (NormSpec(weight_offset="weight_dtype"), FP16, FP16),
    "fp32 weight, fp32 result": (LLAMA, BF16, FP32),
    "fp32 weight, one rounding": (FP32_WEIGHT_MULTIPLY, BF16, FP32),
    "fp32 sum": (FP32_SUM, BF16, BF16),
    "fp32 sum and weight": (FP32_SUM, BF16, FP32),
    "fp32": (LLAMA, FP32, FP32),
    "T5": (T5, FP32, BF16),
    "no weight": (NormSpec(has_weight=False), BF16, None),
}


def planned(op, n, arch, spec=LLAMA, x=BF16, weight=BF16, align=None):
    """(configuration, build) of every schedule."""
    return [
        (config, kernel_table.build(config, spec, op == FUSED, n, arch, x, weight, align))
        for config in schedules.schedules(op, x, n, arch)
    ]


def first(n, arch=90, align=None):
    """(configuration, build) of the fused op's schedule of the fewest rows."""
    return planned(FUSED, n, arch, align=align)[0]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("arch", ARCHS)
def test_llama(arch, n):
    rows = {length: [each for op in (FUSED, PLAIN) for each in planned(op, length, arch)] for length in LENGTHS}
    machines = read(build for each in rows.values() for _, build in each)
    for config, build in rows[n]:
        machine = machines[build]
        check(config, machine, arch)
        resident = min(config.min_ctas, kernel_table.GPUS[arch].threads // config.threads)
        assert machine.registers * config.threads * resident <= 65536, "the registers keep CTAs out"
        widest = 256 if arch >= 100 else 128
        assert set(machine.loads) == set(machine.stores) == {widest}


@FORMS
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_do_not_spill(name, form):
    """The short form: one of the schedules of each length."""
    rows = {
        variant: [each for n in (4096, 16384) for each in drawn(form, planned(FUSED, n, 90, *of), variant, n)]
        for variant, of in VARIANTS.items()
    }
    machines = read(build for each in rows.values() for _, build in each)
    assert len(rows[name]) >= 2
    for config, build in rows[name]:
        check(config, machines[build], 90)


EVERYWHERE = (128, 2880, 8192)


@FORMS
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_variants_everywhere(arch, name, form):
    """The short form: one of the lengths for each variant and architecture."""
    rows = {
        variant: [
            planned(op, n, arch, *of)[-1]
            for n in drawn(form, EVERYWHERE, variant, arch)
            for op in ((FUSED, PLAIN) if of[0].sum == "rounded" else (FUSED,))
        ]
        for variant, of in VARIANTS.items()
    }
    machines = read(build for each in rows.values() for _, build in each)
    assert rows[name]
    for config, build in rows[name]:
        check(config, machines[build], arch)


@pytest.mark.parametrize("arch", [89, 90, 100])
def test_long_rows(arch):
    rows = [first(n, arch) for n in (65536, 131072, 262144)]
    machines = read(build for _, build in rows)
    for config, build in rows:
        check(config, machines[build], arch)
        assert set(machines[build].loads) == {256 if arch >= 100 else 128}


def test_clusters_meet_without_a_fence_for_the_whole_gpu():
    """The release of a cluster barrier is one, and decode and long rows pay for it."""
    rows = [first(n) for n in (4096, 8192, 16384, 65536, 131072, 262144)]
    machines = read(build for _, build in rows)
    for config, build in rows:
        assert config.cluster > 1
        assert machines[build].gpu_fences == 0, config


def test_unaligned_addresses_take_narrower_accesses_in_the_same_schedule():
    rows = {align: first(4096, align=align) for align in (16, 8, 4, 2)}
    machines = read(build for _, build in rows.values())
    for align, (config, build) in rows.items():
        machine = machines[build]
        assert set(machine.loads) == set(machine.stores) == {8 * align}
        assert not machine.spills
        assert config == schedules.schedules(FUSED, BF16, 4096, 90)[0]


def test_a_16_byte_address_on_blackwell_takes_two_128_bit_accesses():
    _, build = first(4096, 100, align=16)
    machine = read([build])[build]
    assert set(machine.loads) == set(machine.stores) == {128}


@pytest.mark.parametrize("arch", [90, 100])
def test_results_wider_than_their_rows_leave_sixteen_bytes_at_a_time(arch):
    """The sum leaves in whole chunks beside them."""
    rows = planned(FUSED, 4096, arch, x=BF16, weight=FP32)
    machines = read(build for _, build in rows)
    for _, build in rows:
        assert set(machines[build].stores) == {128, 256 if arch >= 100 else 128}


def test_odd_rows_use_the_widest_access_their_length_allows():
    builds = {width: first(n)[1] for n, width in ((5125, 16), (5126, 32), (5124, 64))}
    machines = read(builds.values())
    for width, build in builds.items():
        assert set(machines[build].loads) == set(machines[build].stores) == {width}
        assert not machines[build].spills


@pytest.mark.parametrize(
    "arch", [arch if arch in (90, 120) else pytest.param(arch, marks=pytest.mark.long) for arch in ARCHS]
)
def test_kernels_that_are_read_together_are_read_as_each_alone(arch, tmp_path):
    """Alone the disassembler is given the whole cubin, and finds the instructions itself."""
    builds = [first(n, arch)[1] for n in (128, 4096, 5125)]
    cubins = [kernel_table.compiled(build) for build in builds]
    alone = tmp_path / "alone.cubin"
    for cubin, found in zip(cubins, kernel_table.disassembled(cubins, builds[0].architecture()), strict=True):
        alone.write_bytes(cubin)
        assert found == kernel_table.opcodes(kernel_table.run("nvdisasm", "-c", str(alone)))


def test_the_page_is_current():
    assert kernel_table.is_current(), "docs/kernels.md is stale: python scripts/kernel_table.py"
