"""The arithmetic of comparisons: ulp distances, bit equality, shares, scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof_models import honest

from rmsnorm_patch.numerics import reference, tolerances
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, T5
from rmsnorm_patch.proof import difference
from rmsnorm_patch.proof.difference import FAR, Difference, bit_mismatches, compare, digest, row_keys, ulp_distance
from rmsnorm_patch.proof.probes import FAMILIES, operands

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def steps(x: torch.Tensor, count: int) -> torch.Tensor:
    """`x` moved by `count` representable values, by nextafter."""
    for _ in range(abs(count)):
        x = torch.nextafter(x, torch.full_like(x, math.copysign(math.inf, count)))
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 1.9999, 3e-5, -3e-5])
@pytest.mark.parametrize("count", [0, 1, -1, 2, 7, -7])
def test_distance_is_the_number_of_steps(dtype: torch.dtype, value: float, count: int) -> None:
    x = torch.tensor([value], dtype=dtype)
    assert int(ulp_distance(steps(x, count), x)) == abs(count)
    assert int(ulp_distance(x, steps(x, count))) == abs(count)


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32), st.floats(width=32), st.floats(width=32))
def test_distance_is_a_metric(a: float, b: float, c: float) -> None:
    x, y, z = (torch.tensor([v], dtype=torch.float32) for v in (a, b, c))
    xy, yz, xz = (int(ulp_distance(*pair)) for pair in ((x, y), (y, z), (x, z)))
    assert xy == int(ulp_distance(y, x))
    assert (xy == 0) == (a == b or (math.isnan(a) and math.isnan(b)))
    assert xz <= xy + yz


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_values(dtype: torch.dtype) -> None:
    inf, nan, top = math.inf, math.nan, torch.finfo(dtype).max
    left = torch.tensor([inf, -inf, nan, inf, inf, nan, top, 0.0], dtype=dtype)
    right = torch.tensor([inf, -inf, nan, -inf, top, 1.0, top, -0.0], dtype=dtype)
    assert ulp_distance(left, right).tolist() == [0, 0, 0, FAR, FAR, FAR, 0, 0]
    assert bit_mismatches(left, right) == 4  # +0 and -0 are equal as values, not as bits


def test_negative_nan_is_nan() -> None:
    nan = torch.tensor([float("nan")])
    assert bit_mismatches(nan, -nan) == 0
    assert compare(nan, -nan).max_ulp == 0


def test_shape_and_dtype_are_compared() -> None:
    x = torch.ones(3, 4)
    for other in (x[:2], x.half(), x.flatten()):
        assert compare(other, x).violations(tolerances.SITE[torch.float32], torch.float32)
        assert bit_mismatches(other, x) > 0


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    left = torch.randn(37, 5, 16).bfloat16()
    right = left.clone()
    right[30, 2, 3] = steps(right[30, 2, 3], 5)
    right[4, 4, 0] = steps(right[4, 4, 0], -2)
    whole = compare(left, right)
    monkeypatch.setattr(difference, "_CHUNK", 40)
    parts = compare(left, right)
    assert (parts.max_ulp, parts.differing, parts.elements, parts.worst_row) == (5, 2, left.numel(), 30 * 5 + 2)
    assert (whole.max_ulp, whole.differing, whole.worst_row) == (5, 2, 152)
    assert parts.bias == pytest.approx(whole.bias)
    assert digest(left) != digest(right)


def test_checksums_see_place_sign_and_dtype() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert digest(x) == digest(x.clone())
    for other in (x.flip(0), x.flip(1), x.reshape(4, 3), x.double(), -x, x.clone().view(torch.int32)):
        assert digest(other) != digest(x)
    keys = row_keys(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [1.0, -2.0]]))
    assert keys[0] == keys[2]
    assert len(set(keys.tolist())) == 3


def test_a_small_scale_error_is_seen_where_no_element_is_far() -> None:
    torch.manual_seed(0)
    exact = torch.randn(4096, 512)
    found = compare((exact * (1 + 2e-6)).bfloat16(), exact.bfloat16())
    row = tolerances.SITE[torch.bfloat16]
    assert found.max_ulp == 1
    assert found.differing <= row.allowed(found.elements, 512, torch.bfloat16)
    assert [text for text in found.violations(row, torch.bfloat16) if "scale is off" in text]


@pytest.mark.parametrize("spec", [LLAMA, GEMMA, T5], ids=["llama", "gemma", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [64, 768, 4096, 5120])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_order_of_the_sum_is_within_every_tolerance(family, hidden_size, dtype, spec) -> None:
    (x,) = operands(family, 1, hidden_size, dtype, torch.device("cpu"), 1e-6, seed=3)
    assert torch.isfinite(x).all()
    weight = (0.5 + torch.rand(hidden_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = compare(honest(x, weight, spec, 1e-6), reference.rms_norm(x, weight, spec, 1e-6))
    assert found.violations(tolerances.SITE[dtype], dtype) == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_flip_in_one_long_row_is_no_alarm(dtype: torch.dtype) -> None:
    """All elements of one magnitude flip together: in a row of 8192, more than 0.1%."""
    torch.manual_seed(0)
    x = torch.randn(1, 8192).to(dtype)
    value = x.abs().flatten().mode().values
    moved = torch.where(x.abs() == value, torch.where(x > 0, steps(x, 1), steps(x, -1)), x)
    found = compare(moved, x)
    assert found.differing > 1
    assert found.violations(tolerances.SITE[dtype], dtype) == ()


def test_empty() -> None:
    assert compare(torch.zeros(0, 8), torch.zeros(0, 8)) == Difference()
    assert compare(torch.zeros(0, 8), torch.zeros(0, 8)).violations(tolerances.EXACT, torch.float32) == ()
