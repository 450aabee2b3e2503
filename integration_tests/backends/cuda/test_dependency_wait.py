"""No kernel reads anything before the kernel in front has ended: in PTX and in machine code."""

from __future__ import annotations

import re

import pytest
from machine_code import (
    ADDING,
    BF16,
    FORMS,
    FP32,
    FUSED,
    PARTIALS,
    compile_source,
    in_parts,
    kernel_table,
    read,
)  # fmt: skip

from rmsnorm_patch.backends.cuda import jit, schedules
from rmsnorm_patch.fused.gated_norm import kernel as gated_norm_kernel
from rmsnorm_patch.fused.norm_add import kernel as norm_add_kernel
from rmsnorm_patch.fused.norm_quantised import kernel as norm_quantised_kernel
from rmsnorm_patch.fused.silu_quantised import kernel as silu_kernel
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.spec import LLAMA

SILU = {silu_kernel.WHOLE: QuantSpec("fp8_token"), silu_kernel.PARTS: QuantSpec("fp8_static")}


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
                    writes_fp8 = op in (norm_quantised_kernel.OP, *SILU)
                    if writes_fp8 and arch < norm_quantised_kernel.FP8_CAPABILITY:
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
                        if op in SILU:
                            (config,) = silu_kernel.schedules((config,), "rounded", SILU[op], True)
                        yield in_parts(config, 4) if op == PARTIALS else config, op, n, x


def built(config, op, n, arch, x=BF16):
    if op in SILU:
        return kernel_table.build(config, silu_kernel.SPEC, False, n, arch, x, None)
    return kernel_table.build(config, LLAMA, op in ADDING, n, arch, x, x)


def kernels_on(arch):
    kernels = schedules.registered_kernels()
    return {kernel.name for kernel in kernels if kernel.capability[0] <= arch <= kernel.capability[1]}


def around_the_wait(build):
    """The kernel's PTX above its dependency wait and below it."""
    text, headers, *_ = jit.source_of(build.config.source)
    options = (f"--gpu-architecture=compute_{build.arch}", *build.options())
    ptx = compile_source(build.config.source, text, headers, options).decode()
    above, *below = ptx.split("griddepcontrol.wait;")
    assert len(below) == 1, "every kernel waits, once"
    return above, below[0]


def loads_around_the_wait(build):
    return tuple(re.findall(r"\bld\.(?!param)\S+", part) for part in around_the_wait(build))


BRANCHES = (900, 1000)
"""What the sources ask of an architecture. PTX for sm_103 and sm_120 comes from the text that sm_100 gets."""


def kinds_of_schedules(arch):
    """Of `every_schedule` the first of each kernel, op, dtype and order of loads; the others differ in sizes. Where an
    older architecture gets the same text, the first of each kernel, op and place of the weight's load."""
    kinds = {}
    for config, op, n, x in every_schedule(arch):
        same_text = 10 * arch not in BRANCHES
        how = dict(config.defines).get("WEIGHT_AT") if same_text else (x, config.defines)
        kinds.setdefault((config.kernel, op, how), (config, op, n, x))
    return kinds.values()


def test_the_sources_ask_for_two_architectures(repository):
    asked = set()
    for path in (repository / "kernels" / "cuda").rglob("*.cu*"):
        text = path.read_text()
        conditions = re.findall(r"__CUDA_ARCH__ >= (\d+)$", text, flags=re.MULTILINE)
        assert text.count("__CUDA_ARCH") == len(conditions), path
        asked.update(map(int, conditions))
    assert asked == set(BRANCHES)


@FORMS
@pytest.mark.parametrize("arch", [90, 100, pytest.param(103, marks=pytest.mark.long), 120])
def test_no_schedule_reads_anything_before_the_previous_kernel_has_ended(arch, form):
    """Not even the weight: the kernel in front may have written it, and ours may start before that can be seen. The
    short form: one schedule of each kind."""
    seen = set()
    for config, op, n, x in every_schedule(arch) if form == "long" else kinds_of_schedules(arch):
        above, below = loads_around_the_wait(built(config, op, n, arch, x))
        assert not above, (config, op, n, above)
        assert below
        seen.add(config.kernel)
    assert seen == kernels_on(arch)


@pytest.mark.parametrize("arch", [90, 100, pytest.param(103, marks=pytest.mark.long), 120])
def test_the_assembler_leaves_every_kind_of_kernel_so(arch):
    """One schedule of every kernel and order of loads, in machine code."""
    kinds = {}
    for config, op, n, x in every_schedule(arch):
        if x == BF16:
            kinds[config.kernel, dict(config.defines)["WEIGHT_AT"]] = config, op, n
    builds = {built(config, op, n, arch): config for config, op, n in kinds.values()}
    for build, machine in read(builds).items():
        assert (machine.waits, machine.loads_before_wait) == (1, 0), builds[build]
    assert {kernel for kernel, _ in kinds} == kernels_on(arch)


def test_the_weight_is_asked_for_above_the_wait():
    """Once, by the CTAs of the first rows, where it lies so that whole units of 16 bytes can be asked for."""
    for align, asked in ((16, 1), (8, 0)):
        config = schedules.schedules(FUSED, BF16, 4096, 90)[0]
        build = kernel_table.build(config, LLAMA, True, 4096, 90, align=align)
        assert around_the_wait(build)[0].count("cp.async.bulk.prefetch.L2") == asked
