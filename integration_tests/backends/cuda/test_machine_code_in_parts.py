"""The kernels of products in parts for GPUs that are not here: their machine code and their schedules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from machine_code import BF16, FORMS, FP16, FP32, FP32_SUM, PARTIALS, check, drawn, in_parts, kernel_table, read

from rmsnorm_patch.backends.cuda import schedules
from rmsnorm_patch.fused.linear_norm import kernel as linear_norm_kernel
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec

IN_PARTS = (2048, 2880, 4096, 5120, 8192, 16384)
PARTS = (2, 4, 8)


def schedules_in_parts(n, parts, arch, x=BF16):
    return [in_parts(config, parts) for config in schedules.schedules(PARTIALS, x, n, arch)]


def check_in_parts(n, parts, ways):
    """One load of weight and residual and two of each part for every chunk of a thread, one store of sum and result.

    ways: number of parts -> (architecture, norm, dtype) of each way to compile; the codes of all are read together.
    """
    rows = {
        number: [
            # The rows it serves are not compiled in.
            (config, arch, kernel_table.build(replace(config, m=(1, 1)), spec, True, n, arch, x, x))
            for arch, spec, x in of
            for config in schedules_in_parts(n, number, arch, x)
        ]
        for number, of in ways.items()
    }
    machines = read(build for each in rows.values() for *_, build in each)
    assert rows[parts]
    for config, arch, build in rows[parts]:
        machine = machines[build]
        assert config.cluster == 1 or arch >= 90
        chunks = -(-n // (config.vec * config.threads * config.cluster))
        assert machine.loads == {128: chunks * (2 + 2 * parts)}
        assert machine.stores == {128: chunks * 2}
        assert machine.gpu_fences == 0
        check(config, machine, arch)


@FORMS
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("n", IN_PARTS)
def test_a_product_in_parts(n, parts, form):
    """The short form: in one dtype and with one rounding of the sum."""
    ways = [(90, *way) for way in itertools.product((LLAMA, FP32_SUM), (BF16, FP16))]
    check_in_parts(n, parts, {number: drawn(form, ways, n, number) for number in PARTS})


@FORMS
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("n", IN_PARTS)
def test_a_product_in_parts_without_clusters(n, parts, form):
    """The short form: on one architecture and with one rounding of the sum."""
    ways = [(*way, BF16) for way in itertools.product((80, 89), (LLAMA, FP32_SUM))]
    check_in_parts(n, parts, {number: drawn(form, ways, n, number) for number in PARTS})


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
