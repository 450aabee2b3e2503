"""The machine code of every kernel family for GPUs that are not here: widths, spills, registers, order of loads."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from rmsnorm_patch.backends.cuda import jit, nvrtc, schedules
from rmsnorm_patch.fused.gated_norm import kernel as gated_norm_kernel
from rmsnorm_patch.fused.linear_norm import kernel as linear_norm_kernel
from rmsnorm_patch.fused.norm_add import kernel as norm_add_kernel
from rmsnorm_patch.fused.norm_quantised import kernel as norm_quantised_kernel
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec

pytest.importorskip("triton")
if nvrtc.find() is None:
    pytest.skip("NVRTC is not installed", allow_module_level=True)

_PATH = Path(__file__).parents[3] / "scripts" / "kernel_table.py"
_SPEC = importlib.util.spec_from_file_location("kernel_table", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
kernel_table = importlib.util.module_from_spec(_SPEC)
sys.modules["kernel_table"] = kernel_table
_SPEC.loader.exec_module(kernel_table)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FUSED, PLAIN, PARTIALS = "fused_add_rms_norm", "rms_norm", "rms_norm_partials"
ADDING = (FUSED, PARTIALS, norm_add_kernel.OP)
ARCHS = (89, 90, 100, 103, 120)
LENGTHS = (128, 1024, 4096, 16384)
FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")
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


FORMS = pytest.mark.parametrize("form", ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.slow])])


def drawn(form, choices, *of):
    """All of the choices in the long form; in the short one that is drawn by what it is chosen for."""
    return choices if form == "long" else random.Random(" ".join(map(str, of))).sample(choices, 1)


@cache
def code(op, n, arch, which, spec=LLAMA, x=BF16, weight=BF16, align=None):
    config = schedules.schedules(op, x, n, arch)[which]
    return config, kernel_table.machine_code(kernel_table.build(config, spec, op == FUSED, n, arch, x, weight, align))


def configurations(op, n, arch, x=BF16):
    return range(len(schedules.schedules(op, x, n, arch)))


def check(config, machine, arch):
    assert not machine.spills, (config, machine)
    assert machine.waits == (1 if arch >= 90 else 0)
    assert machine.loads_before_wait == 0, "something is read before the dependency wait"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n", LENGTHS)
def test_llama(arch, n):
    for op in (FUSED, PLAIN):
        for which in configurations(op, n, arch):
            config, machine = code(op, n, arch, which)
            check(config, machine, arch)
            resident = min(config.min_ctas, kernel_table.GPUS[arch].threads // config.threads)
            assert machine.registers * config.threads * resident <= 65536, "the registers keep CTAs out"
            widest = 256 if arch >= 100 else 128
            assert set(machine.loads) == set(machine.stores) == {widest}


@FORMS
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_do_not_spill(name, form):
    """The short form: one of the schedules of each length."""
    spec, x, weight = VARIANTS[name]
    for n in (4096, 16384):
        for which in drawn(form, configurations(FUSED, n, 90, x), name, n):
            config, machine = code(FUSED, n, 90, which, spec, x, weight)
            check(config, machine, 90)


EVERYWHERE = (128, 2880, 8192)


@FORMS
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_variants_everywhere(name, arch, form):
    """The short form: one of the lengths for each variant and architecture."""
    spec, x, weight = VARIANTS[name]
    for n in drawn(form, EVERYWHERE, name, arch):
        for op in (FUSED, PLAIN) if spec.sum == "rounded" else (FUSED,):
            which = configurations(op, n, arch, x)[-1]
            config, machine = code(op, n, arch, which, spec, x, weight)
            check(config, machine, arch)


def in_parts(config, parts):
    return replace(config, defines=(*config.defines, ("PARTIALS", parts)))


def every_schedule(arch):
    """(configuration, op, columns, dtype) of every rule of the registry, at the shortest row that it serves: also those
    that another rule is preferred to there."""
    for kernel in schedules.registered_kernels():
        for rule in kernel.rules:
            fits = all(low <= arch <= high for low, high in (kernel.capability, rule.capability))
            for x in (BF16, FP32) if fits else ():
                if x.itemsize not in rule.itemsize:
                    continue
                step = max(1, rule.row_bytes_multiple_of // x.itemsize)
                shortest = max(rule.n[0], -(-rule.row_bytes[0] // x.itemsize))
                n = -(-shortest // step) * step
                for op in kernel.ops:
                    if op == norm_quantised_kernel.OP and arch < norm_quantised_kernel.FP8_CAPABILITY:
                        continue
                    if (
                        op != "fused_add_rms_norm_" and schedules.DTYPE_NAMES[x] in kernel.x_dtypes
                    ):  # in place: the same code
                        config = schedules.configure(kernel, rule, (1, 1), (), op, n, x.itemsize)
                        if op == norm_quantised_kernel.OP:  # one scheme of them
                            quant = QuantSpec("fp8_token")
                            (config,) = norm_quantised_kernel.schedules((config,), (config,), quant, True, True)
                        if op == norm_add_kernel.OP:
                            (config,) = norm_add_kernel.with_next((config,), True)
                        if op == gated_norm_kernel.OP:  # one order of the two
                            (config,) = gated_norm_kernel.schedules((config,), GateSpec("silu", "norm_first"), x)
                        yield in_parts(config, 4) if op == PARTIALS else config, op, n, x


def kernels_on(arch):
    kernels = schedules.registered_kernels()
    return {kernel.name for kernel in kernels if kernel.capability[0] <= arch <= kernel.capability[1]}


def around_the_wait(build):
    """The kernel's PTX above its dependency wait and below it."""
    text, headers, *_ = jit.source_of(build.config.source)
    options = (f"--gpu-architecture=compute_{build.arch}", *build.options())
    ptx = nvrtc.compile_source(build.config.source, text, headers, options).decode()
    above, *below = ptx.split("griddepcontrol.wait;")
    assert len(below) == 1, "every kernel waits, once"
    return above, below[0]


def loads_around_the_wait(build):
    return tuple(re.findall(r"\bld\.(?!param)\S+", part) for part in around_the_wait(build))


def kinds_of_schedules(arch):
    """Of `every_schedule` the first of each kernel, op, dtype and order of loads; the others differ in sizes."""
    kinds = {}
    for config, op, n, x in every_schedule(arch):
        kinds.setdefault((config.kernel, op, x, config.defines), (config, op, n, x))
    return kinds.values()


@FORMS
@pytest.mark.parametrize("arch", [90, 100, 103, 120])
def test_no_schedule_reads_anything_before_the_previous_kernel_has_ended(arch, form):
    """Not even the weight: the kernel in front may have written it, and ours may start before that can be seen. The
    short form: one schedule of each kind."""
    seen = set()
    for config, op, n, x in every_schedule(arch) if form == "long" else kinds_of_schedules(arch):
        above, below = loads_around_the_wait(kernel_table.build(config, LLAMA, op in ADDING, n, arch, x, x))
        assert not above, (config, op, n, above)
        assert below
        seen.add(config.kernel)
    assert seen == kernels_on(arch)


@pytest.mark.parametrize("arch", [90, 100, 103, 120])
def test_the_assembler_leaves_every_kind_of_kernel_so(arch):
    """One schedule of every kernel and order of loads, in machine code."""
    kinds = {}
    for config, op, n, x in every_schedule(arch):
        if x == BF16:
            kinds[config.kernel, dict(config.defines)["WEIGHT_AT"]] = config, op, n
    for config, op, n in kinds.values():
        machine = kernel_table.machine_code(kernel_table.build(config, LLAMA, op in ADDING, n, arch))
        assert (machine.waits, machine.loads_before_wait) == (1, 0), config
    assert {kernel for kernel, _ in kinds} == kernels_on(arch)


def test_the_weight_is_asked_for_above_the_wait():
    """Once, by the CTAs of the first rows, where it lies so that whole units of 16 bytes can be asked for."""
    for align, asked in ((16, 1), (8, 0)):
        config = schedules.schedules(FUSED, BF16, 4096, 90)[0]
        build = kernel_table.build(config, LLAMA, True, 4096, 90, align=align)
        assert around_the_wait(build)[0].count("cp.async.bulk.prefetch.L2") == asked


@pytest.mark.parametrize("arch", [89, 90, 100])
def test_long_rows(arch):
    for n in (65536, 131072, 262144):
        config, machine = code(FUSED, n, arch, 0)
        check(config, machine, arch)
        assert set(machine.loads) == {256 if arch >= 100 else 128}


@pytest.mark.parametrize("n", [4096, 8192, 16384, 65536, 131072, 262144])
def test_a_cluster_meets_without_a_fence_for_the_whole_gpu(n):
    """The release of a cluster barrier is one: 0.05 us of a decode step, 4 to 6% of long rows."""
    config, machine = code(FUSED, n, 90, 0)
    assert config.cluster > 1
    assert machine.gpu_fences == 0


@pytest.mark.parametrize(("align", "widths"), [(16, {128}), (8, {64}), (4, {32}), (2, {16})])
def test_unaligned_addresses_take_narrower_accesses_in_the_same_schedule(align, widths):
    config, machine = code(FUSED, 4096, 90, 0, align=align)
    assert set(machine.loads) == set(machine.stores) == widths
    assert not machine.spills
    assert config == schedules.schedules(FUSED, BF16, 4096, 90)[0]


def test_a_16_byte_address_on_blackwell_takes_two_128_bit_accesses():
    _, machine = code(FUSED, 4096, 100, 0, align=16)
    assert set(machine.loads) == set(machine.stores) == {128}


def test_odd_rows_use_the_widest_access_their_length_allows():
    for n, width in ((5125, 16), (5126, 32), (5124, 64)):
        _, machine = code(FUSED, n, 90, 0)
        assert set(machine.loads) == set(machine.stores) == {width}
        assert not machine.spills


IN_PARTS = (2048, 2880, 4096, 5120, 8192, 16384)
PARTS = (2, 4, 8)


def schedules_in_parts(n, parts, arch, x=BF16):
    return [in_parts(config, parts) for config in schedules.schedules(PARTIALS, x, n, arch)]


@cache
def code_in_parts(config, n, arch, spec, x):
    return kernel_table.machine_code(kernel_table.build(config, spec, True, n, arch, x, x))


def check_in_parts(config, n, parts, arch, spec, x):
    """One load of weight and residual and two of each part for every chunk of a thread, one store of sum and result."""
    machine = code_in_parts(replace(config, m=(1, 1)), n, arch, spec, x)  # the rows it serves are not compiled in
    chunks = -(-n // (config.vec * config.threads * config.cluster))
    assert machine.loads == {128: chunks * (2 + 2 * parts)}
    assert machine.stores == {128: chunks * 2}
    assert machine.waits == (1 if arch >= 90 else 0)
    assert machine.loads_before_wait == 0
    assert machine.gpu_fences == 0
    assert not machine.spills, (config, machine)


@FORMS
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("n", IN_PARTS)
def test_a_product_in_parts(n, parts, form):
    """The short form: in one dtype and with one rounding of the sum."""
    ways = list(itertools.product((LLAMA, FP32_SUM), (BF16, FP16)))
    for spec, x in drawn(form, ways, n, parts):
        for config in schedules_in_parts(n, parts, 90, x):
            check_in_parts(config, n, parts, 90, spec, x)


@FORMS
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("n", IN_PARTS)
def test_a_product_in_parts_without_clusters(n, parts, form):
    """The short form: on one architecture and with one rounding of the sum."""
    for arch, spec in drawn(form, list(itertools.product((80, 89), (LLAMA, FP32_SUM))), n, parts):
        for config in schedules_in_parts(n, parts, arch):
            assert config.cluster == 1
            check_in_parts(config, n, parts, arch, spec, BF16)


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("n", [8, 248, 256, *IN_PARTS, 32768])
def test_schedules_of_products_in_parts(n, arch):
    """Whole warps that fit a CTA, equal shares of a cluster's CTAs, every row count once, the fused op's tree."""
    configs = schedules.schedules(PARTIALS, BF16, n, arch)
    assert configs[0].m[0] == 1
    assert all(before.m[1] + 1 == after.m[0] for before, after in itertools.pairwise(configs))
    assert configs[-1].m[1] >= linear_norm_kernel.MOST_ROWS
    for config in configs:
        assert config.threads % 32 == 0
        assert config.threads <= 512
        assert config.cluster == 1 or (arch >= 90 and n % (config.cluster * config.threads * config.vec) == 0)
        assert (config.vec, config.rows_per_cta) == (8, 1)
    trees = {config.tree for config in schedules.schedules("fused_add_rms_norm_", BF16, n, arch)}
    assert {config.tree for config in configs} == trees == {"lanes-8"}
    assert any(config.cluster > 1 for config in configs) is (arch >= 90 and n not in (8, 248, 256, 2880))


@pytest.mark.parametrize(
    ("n", "arch", "m", "expected"),
    [  # (CTAs a row, threads of each)
        (2048, 90, 1, (4, 64)),
        (4096, 90, 32, (4, 128)),
        (4096, 90, 33, (2, 256)),
        (2880, 90, 1, (1, 384)),
        (5120, 90, 1, (4, 160)),
        (5120, 89, 1, (1, 320)),
        (16384, 90, 1, (4, 512)),
        (16384, 90, 64, (2, 512)),
        (32768, 80, 1, (1, 512)),
        (8, 90, 1, (1, 32)),
    ],
)
def test_how_many_share_a_row_of_parts(n, arch, m, expected):
    serving = next(each for each in schedules.schedules(PARTIALS, BF16, n, arch) if m <= each.m[1])
    assert (serving.cluster, serving.threads) == expected


def test_parts_are_served_where_the_fused_op_has_their_tree(monkeypatch):
    """Not on sm_100, whose chunks are longer, unless a row has no whole number of them."""
    for arch, n, x, served in (
        (90, 4096, BF16, True),
        (89, 4096, FP16, True),
        (90, 4096, FP32, False),
        (90, 4097, BF16, False),
        (90, 65536, BF16, False),
        (100, 4096, BF16, False),
        (100, 4104, BF16, True),
    ):
        monkeypatch.setattr(
            linear_norm_kernel, "configs_for", lambda op, x, n, _, a=arch: schedules.schedules(op, x, n, a)
        )
        assert linear_norm_kernel.serves(LLAMA, x, n, 0) is served, (arch, n, x)
        assert not linear_norm_kernel.serves(NormSpec(group=128), x, n, 0)


def test_the_page_is_current():
    assert kernel_table.is_current(), "docs/kernels.md is stale: python scripts/kernel_table.py"


QUANTISED = {
    "static": (QuantSpec("fp8_static"), LLAMA),
    "token": (QuantSpec("fp8_token"), FP32_SUM),
    "token from fp32": (QuantSpec("fp8_token", "fp32", "native"), FP32_WEIGHT_MULTIPLY),
    "block": (QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True), GEMMA),
    "int8": (QuantSpec("int8_token"), LLAMA),
}


def check_quantised(name, n, arch, op="fused_add_rms_norm_", both=False):
    """Quantised rows take one store of a chunk's bytes, and the scales four bytes each."""
    quant, spec = QUANTISED[name]
    own = schedules.schedules(norm_quantised_kernel.OP, BF16, n, arch)
    for config in norm_quantised_kernel.schedules(own, schedules.schedules(op, BF16, n, arch), quant, False, both):
        machine = kernel_table.machine_code(kernel_table.build(config, spec, op != PLAIN, n, arch))
        check(config, machine, arch)
        wide = {16 * config.vec} if op != PLAIN or both else set()
        # The given scale and those that are written are 32 bits wide.
        assert set(machine.loads) <= {16 * config.vec, 32}, (config, machine)
        assert set(machine.stores) == wide | {8 * config.vec} | ({32} if name != "static" else set()), (config, machine)
        assert machine.gpu_fences == 0


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_rows(name):
    check_quantised(name, 4096, 90)


@pytest.mark.long
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("arch", ARCHS)
def test_quantised_rows_everywhere(name, arch):
    for n in (128, 8192, 16384) if arch < 100 else (128, 8192):
        check_quantised(name, n, arch, both=True)
    check_quantised(name, 2048, arch, PLAIN)


def check_norm_add(n, arch, spec=LLAMA, x=BF16, weight=BF16):
    """One wide load of x, residual and each weight for a chunk of a thread, one wide store of each result."""
    for following in (False, True):
        for config in norm_add_kernel.with_next(schedules.schedules(norm_add_kernel.OP, x, n, arch), following):
            machine = kernel_table.machine_code(kernel_table.build(config, spec, True, n, arch, x, weight))
            check(config, machine, arch)
            width = 8 * x.itemsize * config.vec
            chunks = -(-n // (config.vec * config.threads_per_row * config.cluster))
            weights = 0 if weight is None else 1 + following
            assert machine.loads == {width: chunks * (2 + weights)}, (config, machine)
            assert machine.stores == {width: chunks * (1 + following)}, (config, machine)
            assert machine.gpu_fences == 0


@pytest.mark.parametrize("n", [3584, 4096, 16384])
def test_adds_behind_norms(n):
    check_norm_add(n, 90)
    check_norm_add(n, 90, GEMMA)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_adds_behind_norms_everywhere(arch):
    for n in (128, 2048, 2304, 5376, 8192):
        check_norm_add(n, arch, GEMMA)
    check_norm_add(4096, arch, LLAMA, FP32, FP32)
    check_norm_add(4096, arch, NormSpec(has_weight=False), BF16, None)


GATED = {
    "rounded, then the gate": ("norm_first", LLAMA, BF16, BF16, BF16),
    "fp32 weight, then the gate": ("norm_first", FP32_WEIGHT_MULTIPLY, BF16, FP32, BF16),
    "the gate, then rounded": ("gate_first", LLAMA, BF16, BF16, BF16),
    "the gate, then an fp32 weight": ("gate_first", LLAMA, BF16, FP32, BF16),
    "fp32 rows, a half gate": ("gate_first", LLAMA, FP32, FP32, BF16),
    "a half gate and weight, then": ("norm_first", LLAMA, FP32, BF16, BF16),
    "half rows, an fp32 gate": ("norm_first", LLAMA, FP16, FP16, FP32),
}


def check_gated(name, n, arch, group=None):
    """x and the gate are read once, in whole vectors of the dtype, and no gated kernel spills."""
    order, spec, x, weight, gate = GATED[name]
    gating, columns = GateSpec("silu", order), n if group is None else group
    configs = schedules.schedules(gated_norm_kernel.OP, x, columns, arch)
    assert configs
    for config in gated_norm_kernel.schedules(configs, gating, gate):
        build = kernel_table.build(
            config, gated_norm_kernel.held(spec, gating), order == "gate_first", columns, arch, x, weight
        )
        if group is not None:
            build = replace(build, weight_rows=n // group, two_level=True)
        machine = kernel_table.machine_code(build)
        check(config, machine, arch)
        assert min(machine.loads) >= min(64, 16 * config.vec), (config, machine)


@pytest.mark.parametrize("name", GATED)
def test_gated_rows(name):
    check_gated(name, 128, 90)
    check_gated(name, 8192, 90, group=1024)


@pytest.mark.long
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("arch", ARCHS)
def test_gated_rows_everywhere(name, arch):
    for n in (128, 1024, 4096, 8192, 16384):
        check_gated(name, n, arch)
    check_gated(name, 8192, arch, group=512)
