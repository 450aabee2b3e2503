"""The machine code of the ops around the norm, for GPUs that are not here: quantised rows, adds behind norms, gates,
and of silu_and_mul with quantised rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machine_code import ARCHS, BF16, FP16, FP32, FP32_SUM, PLAIN, check, kernel_table, read

from rmsnorm_patch.backends.cuda import schedules
from rmsnorm_patch.fused.gated_norm import kernel as gated_norm_kernel
from rmsnorm_patch.fused.norm_add import kernel as norm_add_kernel
from rmsnorm_patch.fused.norm_quantised import kernel as norm_quantised_kernel
from rmsnorm_patch.fused.query_key_norm import rotated as rotated_kernel
from rmsnorm_patch.fused.silu_quantised import kernel as silu_kernel
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.quantisation import FEW_ROWS, QuantSpec
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec

QUANTISED = {
    "static": (QuantSpec("fp8_static"), LLAMA),
    "token": (QuantSpec("fp8_token"), FP32_SUM),
    "token from fp32": (QuantSpec("fp8_token", "fp32", "native"), FP32_WEIGHT_MULTIPLY),
    "block": (QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True), GEMMA),
    "block for FlashInfer": (QuantSpec("fp8_block", "rounded", "flashinfer", "tma_aligned"), FP32_SUM),
    "int8": (QuantSpec("int8_token"), LLAMA),
}


def quantised(name, n, arch, op="fused_add_rms_norm_", both=False):
    """(configuration, build, whether the norm's rows are read or written too) of each schedule; for FlashInfer of those
    for its few rows."""
    quant, spec = QUANTISED[name]
    own = schedules.schedules(norm_quantised_kernel.OP, BF16, n, arch)
    whole = schedules.schedules(op, BF16, n, arch)
    return [
        (config, kernel_table.build(config, spec, op != PLAIN, n, arch), op != PLAIN or both)
        for config in norm_quantised_kernel.schedules(own, whole, quant, False, both)
        if quant.arithmetic != "flashinfer" or config.m[0] < FEW_ROWS
    ]


def check_quantised(name, rows, machines, arch):
    """Quantised rows take one store of a chunk's bytes, and the scales four bytes each."""
    assert rows
    for config, build, wide in rows:
        machine = machines[build]
        check(config, machine, arch)
        # The given scale and those that are written are 32 bits wide.
        assert set(machine.loads) <= {16 * config.vec, 32}, (config, machine)
        stored = {8 * config.vec} | ({16 * config.vec} if wide else set()) | ({32} if name != "static" else set())
        assert set(machine.stores) == stored, (config, machine)
        assert machine.gpu_fences == 0


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_rows(name):
    rows = {each: quantised(each, 4096, 90) for each in QUANTISED}
    check_quantised(name, rows[name], read(build for each in rows.values() for _, build, _ in each), 90)


@pytest.mark.long
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("arch", ARCHS)
def test_quantised_rows_everywhere(arch, name):
    rows = [
        *[each for n in (128, 8192, 16384)[: 3 if arch < 100 else 2] for each in quantised(name, n, arch, both=True)],
        *quantised(name, 2048, arch, PLAIN),
    ]
    check_quantised(name, rows, read(build for _, build, _ in rows), arch)


def added(n, arch, spec=LLAMA, x=BF16, weight=BF16):
    """(configuration, build, loads of a chunk, stores of a chunk) of each schedule, with and without a next norm."""
    return [
        (
            config,
            kernel_table.build(config, spec, True, n, arch, x, weight),
            2 + (0 if weight is None else 1 + following),
            1 + following,
        )
        for following in (False, True)
        for config in norm_add_kernel.with_next(schedules.schedules(norm_add_kernel.OP, x, n, arch), following)
    ]


def check_norm_adds(rows, arch):
    """One wide load of x, residual and each weight for a chunk of a thread, one wide store of each result."""
    assert rows
    machines = read(build for _, build, *_ in rows)
    for config, build, loads, stores in rows:
        machine = machines[build]
        check(config, machine, arch)
        width = 8 * build.x_dtype.itemsize * config.vec
        chunks = -(-build.n // (config.vec * config.threads_per_row * config.cluster))
        assert machine.loads == {width: chunks * loads}, (config, machine)
        assert machine.stores == {width: chunks * stores}, (config, machine)
        assert machine.gpu_fences == 0


def test_adds_behind_norms():
    specs = LLAMA, GEMMA, FP32_SUM
    check_norm_adds([each for n in (3584, 4096, 16384) for spec in specs for each in added(n, 90, spec)], 90)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_adds_behind_norms_everywhere(arch):
    rows = [
        *[each for n in (128, 2048, 2304, 5376, 8192) for each in added(n, arch, GEMMA)],
        *added(4096, arch, LLAMA, FP32, FP32),
        *added(4096, arch, NormSpec(has_weight=False), BF16, None),
    ]
    check_norm_adds(rows, arch)


GATED = {
    "rounded, then the gate": ("norm_first", LLAMA, BF16, BF16, BF16),
    "fp32 weight, then the gate": ("norm_first", FP32_WEIGHT_MULTIPLY, BF16, FP32, BF16),
    "the gate, then rounded": ("gate_first", LLAMA, BF16, BF16, BF16),
    "the gate, then an fp32 weight": ("gate_first", LLAMA, BF16, FP32, BF16),
    "fp32 rows, a half gate": ("gate_first", LLAMA, FP32, FP32, BF16),
    "a half gate and weight, then": ("norm_first", LLAMA, FP32, BF16, BF16),
    "half rows, an fp32 gate": ("norm_first", LLAMA, FP16, FP16, FP32),
}


def gated(name, n, arch, group=None):
    """(configuration, build) of each schedule."""
    order, spec, x, weight, gate = GATED[name]
    gating, columns = GateSpec("silu", order), n if group is None else group
    rows = []
    for config in gated_norm_kernel.schedules(
        schedules.schedules(gated_norm_kernel.OP, x, columns, arch), gating, gate
    ):
        build = kernel_table.build(
            config, gated_norm_kernel.held(spec, gating), order == "gate_first", columns, arch, x, weight
        )
        rows.append((config, build if group is None else replace(build, weight_rows=n // group, two_level=True)))
    assert rows
    return rows


def check_gated(rows, machines, arch):
    """x and the gate are read once, in whole vectors of the dtype, and no gated kernel spills."""
    for config, build in rows:
        machine = machines[build]
        check(config, machine, arch)
        assert min(machine.loads) >= min(64, 16 * config.vec), (config, machine)


@pytest.mark.parametrize("name", GATED)
def test_gated_rows(name):
    rows = {each: [*gated(each, 128, 90), *gated(each, 8192, 90, group=1024)] for each in GATED}
    check_gated(rows[name], read(build for each in rows.values() for _, build in each), 90)


@pytest.mark.long
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("arch", ARCHS)
def test_gated_rows_everywhere(arch, name):
    rows = [each for n in (128, 1024, 4096, 8192, 16384) for each in gated(name, n, arch)]
    rows += gated(name, 8192, arch, group=512)
    check_gated(rows, read(build for _, build in rows), arch)


SILU = {
    "static": ("rounded", QuantSpec("fp8_static")),
    "token": ("fp32", QuantSpec("fp8_token", "fp32", "native")),
    "rounded token": ("rounded", QuantSpec("fp8_token")),
    "block": ("product", QuantSpec("fp8_block", "fp32")),
    "rounded block": ("rounded", QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True)),
    "int8": ("rounded", QuantSpec("int8_token", arithmetic="separate")),
}


def silu(name, n, arch, x=BF16, align=None):
    """(configuration, build) of each schedule."""
    way, quant = SILU[name]
    configs = silu_kernel.schedules(schedules.schedules(silu_kernel.op_of(quant), x, n, arch), way, quant, False)
    assert configs
    return [
        (config, kernel_table.build(config, silu_kernel.SPEC, False, n, arch, x, None, align)) for config in configs
    ]


def check_silu(name, rows, machines, arch):
    """A chunk's gates and what they multiply take a load of 16 bytes each, its results a store of eight."""
    for config, build in rows:
        machine = machines[build]
        check(config, machine, arch)
        chunks = dict(config.defines)["PART_CHUNKS"] or -(-build.n // (8 * config.threads_per_row * config.cluster))
        given, scales = ({32: 1}, {}) if name == "static" else ({}, {32: 1})
        assert machine.loads == {128: 2 * chunks, **given}, (config, machine)
        assert machine.stores == {64: chunks, **scales}, (config, machine)
        assert machine.gpu_fences == 0


@pytest.mark.parametrize("name", SILU)
def test_silu_rows(name):
    rows = {each: silu(each, 14336, 90) for each in SILU}
    check_silu(name, rows[name], read(build for each in rows.values() for _, build in each), 90)


@pytest.mark.long
@pytest.mark.parametrize("name", SILU)
@pytest.mark.parametrize("arch", ARCHS)
def test_silu_rows_everywhere(arch, name):
    rows = [each for n in (256, 768, 3584, 14336, 28672) for each in silu(name, n, arch)] + silu(name, 9728, arch, FP16)
    check_silu(name, rows, read(build for _, build in rows), arch)


@pytest.mark.parametrize("name", SILU)
def test_silu_rows_that_are_less_aligned(name):
    """A view into rows of an odd stride: elements are put together, and nothing spills."""
    rows = {each: silu(each, 14336, 90, align=2) for each in SILU}
    machines = read(build for each in rows.values() for _, build in each)
    for config, build in rows[name]:
        check(config, machines[build], 90)
        assert 128 not in machines[build].loads


def rotated(n, arch, spec=LLAMA, x=BF16, weight=BF16):
    """The builds of each schedule, for packed rows and for others."""
    return [
        (config, replace(kernel_table.build(config, spec, False, n, arch, x, weight), two_level=two_level))
        for config in schedules.schedules(rotated_kernel.OP, x, n, arch)
        for two_level in (False, True)
    ]


def check_rotated(rows, arch):
    """One wide load of a chunk's x, weight, cos and sin, one wide store of what becomes of it."""
    assert rows
    machines = read(build for _, build in rows)
    for config, build in rows:
        machine = machines[build]
        check(config, machine, arch)
        width, each = 8 * build.x_dtype.itemsize * config.vec, config.rows_per_thread
        weights = int(build.weight_dtype is not None)
        assert machine.loads == {width: weights + 3 * each}, (config, machine)
        assert machine.stores == {width: each}, (config, machine)
        assert machine.gpu_fences == 0


def test_rotated_norms():
    check_rotated([each for n in (64, 128, 256) for spec in (LLAMA, GEMMA) for each in rotated(n, 90, spec)], 90)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_rotated_norms_everywhere(arch):
    rows = [
        *[each for n in (32, 64, 128, 256) for spec in (LLAMA, GEMMA) for each in rotated(n, arch, spec)],
        *rotated(128, arch, LLAMA, FP16, FP16),
        *rotated(128, arch, LLAMA, FP32, FP32),
        *rotated(64, arch, NormSpec(has_weight=False), BF16, None),
    ]
    check_rotated(rows, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_rotated_norms_have_the_trees_of_the_pairs(arch):
    for n in range(8, 1100):
        own = schedules.schedules(rotated_kernel.OP, BF16, n, arch)
        pair = schedules.schedules("rms_norm_pair", BF16, n, arch)
        assert {each.tree for each in own} <= {each.tree for each in pair}
        assert bool(own) == (2 * n in ((64, 128, 256, 512, 1024) if arch >= 100 else (64, 128, 256, 512)))
