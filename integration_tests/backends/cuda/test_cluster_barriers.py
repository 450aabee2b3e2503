"""No CTA of a cluster writes into another one before that has opened its barriers: in PTX."""

from __future__ import annotations

import re
from itertools import groupby

import pytest
from machine_code import BF16, built, every_schedule, faults_seen_by, ptx_of

STEPS = ["mbarrier.init", "fence.mbarrier_init", "barrier.cluster.arrive", "barrier.cluster.wait", "st.async"]
"""Barriers are made and published, every CTA of the cluster has come so far, then sums and maxima are sent."""
IN_CLUSTERS = {f"rms_norm_{name}.cu" for name in ("add", "gated", "partials", "rows")} | {"silu_and_mul_quantised.cu"}
QUANTISED = {"rms_norm_quantised.cu"}
"""From sm_100 on its rows have a CTA each."""


def in_clusters(arch):
    """The first schedule of each kernel source, op and number of CTAs that share a row."""
    kinds = {}
    for config, op, n, x in every_schedule(arch):
        if config.cluster > 1 and x == BF16:
            kinds.setdefault((config.source, op, config.cluster), (config, op, n, x))
    return [(config.kernel, built(config, op, n, arch, x)) for config, op, n, x in kinds.values()]


def steps_of(build):
    return re.findall("|".join(map(re.escape, STEPS)), ptx_of(build))


def opens_in_order(build):
    found = steps_of(build)
    once = all(found.count(step) == 1 for step in STEPS[1:4])
    return once and [step for step, _ in groupby(found)] == STEPS


@pytest.mark.parametrize("arch", [90, 100, 120])
def test_a_cluster_is_open_before_anything_is_sent(arch):
    found = in_clusters(arch)
    for kernel, build in found:
        assert opens_in_order(build), (kernel, build, steps_of(build))
    assert {build.config.source for _, build in found} == IN_CLUSTERS | (QUANTISED if arch == 90 else set())


def test_kernels_without_a_cluster_have_none_of_it():
    config, op, n, x = next(found for found in every_schedule(90) if found[0].cluster == 1)
    assert not steps_of(built(config, op, n, 90, x))


def test_a_kernel_that_does_not_wait_for_its_cluster_is_seen(script):
    """Faults of which is said that no probe sees them, and that this file does."""
    builds = {build.config.source: build for _, build in in_clusters(90)}.values()
    for fault in faults_seen_by(__file__, script):
        changed = fault.changed(builds)
        assert changed, fault
        with fault.in_force():
            assert not any(map(opens_in_order, changed)), fault
