"""How a library splits a product, found by comparing: which numbers of parts are tried, and which one is taken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rmsnorm_patch.fused.linear_norm import kernel as linear_norm_kernel
from rmsnorm_patch.fused.linear_norm import splits as linear_norm_splits
from rmsnorm_patch.fused.linear_norm.splits import HIDDEN, UNKNOWN, WHOLE, Split, SplitFinder, in_parts
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec

pytestmark = pytest.mark.usefixtures("products_unknown")

FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")
N, K = 64, 96


def operands(m: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """rows, matrix, residual, weight."""
    tensors = torch.randn(m, K) / 100, torch.randn(N, K) / 10, torch.randn(m, N) / 100, torch.randn(N)
    return [tensor.to(dtype) for tensor in tensors]


def test_a_split_is_judged_by_many_elements() -> None:
    """Draws differ, and are alike from call to call."""
    for m, n in ((1, 512), (1, 4099), (3, 2880), (256, 16384)):
        rows = torch.randn(m, 8).bfloat16()
        draws = linear_norm_splits._draws(rows, n)
        assert len(draws) >= 2
        assert len(draws) * m * n >= linear_norm_splits.COMPARED
        assert {(draw.shape, draw.dtype) for draw in draws} == {(rows.shape, rows.dtype)}
        assert not torch.equal(draws[0], draws[1])
        again = linear_norm_splits._draws(rows, n)
        assert all(map(torch.equal, draws, again))


def library(split: int) -> Any:
    """`product_in_parts`, for which the CPU has no op, of a library that splits in so many parts; 0: in any."""

    def product_in_parts(rows: torch.Tensor, matrix: torch.Tensor, parts: int) -> torch.Tensor:
        whole = torch.mm(rows, matrix.t()).float()
        rest = torch.zeros(parts - 1, *whole.shape)
        return torch.cat([whole[None] if split in (0, parts) else whole[None] * 1.5, rest])

    return product_in_parts


def find_split(k: int, reordering: bool = False) -> Split:
    rows, matrix, _, weight = operands(3)
    return linear_norm_splits._find_split(
        rows.repeat(1, k)[:, :k], matrix.repeat(1, k)[:, :k], weight, LLAMA, reordering
    )


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's library, as if its products of few rows were split."""
    monkeypatch.setattr(linear_norm_splits, "_is_whole", lambda *_: False)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    ("k", "expected"),
    [(64, []), (100, []), (448, [7]), (768, [2, 3, 4, 6]), (4096, [2, 4, 8]), (320 * 8, [2, 4, 5, 8])],
)
def test_splits_considered_leave_parts_of_whole_tiles(
    k: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(linear_norm_splits, "_same_products", lambda products, matrix, parts: seen.append(parts))
    assert find_split(k) == HIDDEN
    assert seen == expected
    assert all(parts <= linear_norm_kernel.MOST_PARTS for parts in linear_norm_splits.SPLITS)


@pytest.mark.usefixtures("split")
def test_a_split_is_taken_if_product_and_norm_have_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for same_norm in (True, False):
        monkeypatch.setattr(linear_norm_splits, "_same_norms", lambda *_, same=same_norm: same)
        for split in (2, 3, 4, 6):
            monkeypatch.setattr(linear_norm_splits, "product_in_parts", library(split))
            assert find_split(768) == (in_parts(split) if same_norm else HIDDEN)
        monkeypatch.setattr(linear_norm_splits, "product_in_parts", library(5))
        assert find_split(768) == HIDDEN


@pytest.mark.usefixtures("split")
def test_where_every_split_has_the_bits_none_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_norm_splits, "_same_norms", lambda *_: True)
    monkeypatch.setattr(linear_norm_splits, "product_in_parts", library(0))
    assert find_split(768) == HIDDEN


@pytest.mark.usefixtures("split")
def test_what_cannot_be_compared_is_served_whole() -> None:
    """The CPU has no product of bf16 with an fp32 result."""
    rows, matrix, _, weight = operands(3, torch.bfloat16)
    with pytest.raises(NotImplementedError):
        linear_norm_splits.product_in_parts(rows, matrix, 2)
    assert linear_norm_splits._find_split(rows.repeat(1, 8), matrix.repeat(1, 8), weight, FP32_SUM, False) == HIDDEN


@pytest.mark.parametrize("whole", [True, False])
def test_other_sums_only_where_they_are_allowed(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four parts, of which the library of the test adds up to what `torch.mm` gives only where there are four."""
    monkeypatch.setattr(linear_norm_splits, "_is_whole", lambda *_: whole)
    monkeypatch.setattr(linear_norm_splits, "_same_products", lambda *_: False)
    monkeypatch.setattr(linear_norm_splits, "filling", lambda *_: 4)
    same_norms = [True]
    monkeypatch.setattr(linear_norm_splits, "_same_norms", lambda *_: same_norms[0])
    for split, agrees, allowed in itertools.product((4, 3), (True, False), (True, False)):
        monkeypatch.setattr(linear_norm_splits, "product_in_parts", library(split))
        same_norms[0] = agrees
        taken = split == 4 and agrees and allowed
        assert find_split(768, reordering=allowed) == (in_parts(4) if taken else WHOLE if whole else HIDDEN)


@pytest.mark.usefixtures("split")
def test_a_split_with_the_bits_comes_before_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_norm_splits, "_same_norms", lambda *_: True)
    monkeypatch.setattr(linear_norm_splits, "filling", lambda *_: 4)
    monkeypatch.setattr(linear_norm_splits, "product_in_parts", library(3))
    assert find_split(768, reordering=True) == in_parts(3)


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"),
    [(1, 2048, 2048, 4), (32, 2048, 8192, 4), (33, 2048, 8192, 1), (8, 1024, 4096, 8), (8, 1024, 256, 4),
     (8, 1024, 128, 1), (8, 2176, 8192, 1), (8, 4096, 4096, 1), (1, 256, 1024, 8)],
)  # fmt: skip
def test_parts_that_fill_a_device(m: int, n: int, k: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert linear_norm_splits.filling(torch.empty(m, k), torch.empty(n, k)) == parts


def test_close_is_a_rounding_apart() -> None:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rounded = exact.bfloat16()
    assert linear_norm_splits._is_close(rounded, (exact * (1 + 1e-6)).bfloat16())
    for wrong in (exact + 0.01, exact * 1.02, torch.full_like(exact, torch.nan)):
        assert not linear_norm_splits._is_close(wrong.bfloat16(), rounded)


@pytest.mark.parametrize("up_to", [0, 2, 3, 100, linear_norm_splits.TALL - 1])
def test_a_product_with_the_bits_of_many_rows_is_not_split(up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library that splits products of up to so many rows, which shows in one element."""

    def product(rows: torch.Tensor, transposed: torch.Tensor) -> torch.Tensor:
        whole = (1000 * rows).double().round() @ (1000 * transposed).double().round()  # exact, whatever the BLAS
        whole[-1, -1] += len(rows) <= up_to
        return whole.to(rows.dtype)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(linear_norm_splits, "_same_norms", lambda *_: True)
    assert find_split(768) == (HIDDEN if up_to >= 3 else WHOLE)


@pytest.mark.parametrize("m", [0, linear_norm_kernel.MOST_ROWS + 1])
def test_no_split_is_looked_for_outside_the_kernels_rows(m: int) -> None:
    """None, where a look at the device would raise: there is none."""
    rows, matrix, residual, weight = operands(m)
    assert SplitFinder().split_of(rows, matrix, residual, weight, LLAMA) == UNKNOWN
