"""No kernel reads anything before the kernel in front has ended: in PTX and in machine code."""

from __future__ import annotations

import re

import pytest
from machine_code import (
    BF16,
    FORMS,
    FUSED,
    built,
    every_schedule,
    faults_seen_by,
    kernel_table,
    kernels_on,
    ptx_of,
    read,
)  # fmt: skip

from rmsnorm_patch.backends.cuda import schedules
from rmsnorm_patch.numerics.spec import LLAMA


def around_the_wait(build):
    """The kernel's PTX above its dependency wait and below it."""
    above, *below = ptx_of(build).split("griddepcontrol.wait;")
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


def test_a_kernel_that_does_not_wait_is_seen(script):
    """Faults of which is said that no probe sees them, and that this file does."""
    first = {config.source: built(config, op, n, 90, x) for config, op, n, x in kinds_of_schedules(90)}
    assert first.keys() == {kernel.source for kernel in schedules.registered_kernels()}
    for fault in faults_seen_by(__file__, script):
        changed = fault.changed(first.values())
        assert changed, fault
        for build in changed:
            with fault.in_force(), pytest.raises(AssertionError, match="every kernel waits"):
                around_the_wait(build)
