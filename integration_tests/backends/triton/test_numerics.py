"""The Triton kernels in the CPU interpreter, against the reference arithmetic and fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsnorm_patch import ops
from rmsnorm_patch.backends.triton import backend as triton_backend
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import (
    FP32_WEIGHT_MULTIPLY,
    GEMMA,
    LLAMA,
    OUTPUT_DTYPES,
    ROUNDINGS,
    SUM_ROUNDINGS,
    T5,
    WEIGHT_OFFSETS,
    NormSpec,
    SumRounding,
)
from rmsnorm_patch.numerics.tolerances import SITE
from rmsnorm_patch.proof.difference import compare

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN and 1/0 on purpose

EPS = 1e-6
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
SPECS = {
    f"{rounding}-{offset}-{output}-{rounded_sum}": NormSpec(
        round_before_weight=rounding, weight_offset=offset, output=output, sum=rounded_sum
    )
    for rounding in ROUNDINGS
    for offset in WEIGHT_OFFSETS
    for output in OUTPUT_DTYPES
    for rounded_sum in SUM_ROUNDINGS
}


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check(actual: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, rounded: torch.dtype | None = None) -> None:
    """rounded: dtype that x * rstd was rounded to. Where that is a half type and the result fp32, a flip is one unit of
    the half type and thousands of fp32's."""
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    if expected.dtype == torch.float32:
        narrow = x.dtype if rounded in (None, torch.float32) else rounded
        actual, expected = actual.to(narrow), expected.to(narrow)
    assert compare(actual, expected).violations(SITE[expected.dtype], expected.dtype) == ()


def check_all_ops(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float = EPS
) -> None:
    rounded = spec.rounded_dtype(x.dtype, None if weight is None else weight.dtype)
    check(ops.bind_rms_norm(spec, "triton")(x, weight, eps), reference.rms_norm(x, weight, spec, eps), x, rounded)
    normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, eps)
    fused_normed, fused_total = ops.bind_fused_add_rms_norm(spec, "triton")(x, residual, weight, eps)
    check(fused_normed, normed, x, rounded)
    assert torch.equal(fused_total, total)
    assert fused_total.is_contiguous()
    if normed.dtype == x.dtype:
        in_x, in_residual = x.clone(), residual.clone()
        ops.bind_fused_add_rms_norm_(spec, "triton")(in_x, in_residual, weight, eps)
        assert torch.equal(in_x, fused_normed)
        assert torch.equal(in_residual, total)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_rounding_offset_output_and_sum(name: str, dtype: torch.dtype) -> None:
    for weight_dtype in (dtype, torch.float32):
        weight = rand(96, dtype=weight_dtype, seed=3)
        check_all_ops(rand(5, 96, dtype=dtype, seed=1), rand(5, 96, dtype=dtype, seed=2), weight, SPECS[name])


@pytest.mark.parametrize("spec", [LLAMA, GEMMA, T5, FP32_WEIGHT_MULTIPLY], ids=["llama", "gemma", "t5", "fp32"])
def test_fp32_inputs_and_crossed_weight_dtypes(spec: NormSpec) -> None:
    for x_dtype, weight_dtype in ((torch.float32,) * 2, (torch.float32, HALVES[0]), tuple(HALVES), (*HALVES[::-1],)):
        x, residual = rand(5, 96, dtype=x_dtype, seed=1), rand(5, 96, dtype=x_dtype, seed=2)
        check_all_ops(x, residual, rand(96, dtype=weight_dtype, seed=3), spec)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounded_sum", SUM_ROUNDINGS)
def test_a_residual_of_another_dtype(weight_dtype: torch.dtype, rounded_sum: SumRounding) -> None:
    """The sum has the dtype that PyTorch gives it, fp32. Lengths in registers, ragged, and read twice."""
    spec = replace(T5, sum=rounded_sum)
    for x_dtype, residual_dtype in ((torch.float32, torch.float16), (torch.bfloat16, torch.float32), tuple(HALVES)):
        for n in (96, 111, 40000) if weight_dtype is torch.float16 else (96,):
            x, residual = rand(3, n, dtype=x_dtype, seed=1), rand(3, n, dtype=residual_dtype, seed=2)
            weight = rand(n, dtype=weight_dtype, seed=3)
            normed, total = ops.bind_fused_add_rms_norm(spec, "triton")(x, residual, weight, EPS)
            assert total.dtype == torch.float32
            assert torch.equal(total, x + residual)
            check(normed, reference.rms_norm(x + residual, weight, spec, EPS), total, weight_dtype)


def test_a_residual_of_another_dtype_is_not_written() -> None:
    with pytest.raises(UnsupportedInput, match=r"residual of dtype torch\.float16 and x of dtype torch\.float32"):
        ops.bind_fused_add_rms_norm_(T5, "triton")(rand(2, 96).float(), rand(2, 96).half(), rand(96).half(), EPS)


@pytest.mark.parametrize("n", [96, 1600, pytest.param(40000, marks=pytest.mark.long)])
def test_weightless_width_and_group(n: int) -> None:
    x, residual, weight = rand(3, n, seed=1), rand(3, n, seed=2), rand(n, seed=3)
    for spec in (replace(LLAMA, has_weight=False), replace(FP32_WEIGHT_MULTIPLY, has_weight=False)):
        check_all_ops(x, residual, None, spec)
        assert torch.equal(
            ops.bind_rms_norm(spec, "triton")(x, weight, EPS), ops.bind_rms_norm(spec, "triton")(x, None, EPS)
        )
    check_all_ops(x, residual, None, LLAMA)
    for width in (1, 33, n - 1, n):
        check_all_ops(x, residual, weight, replace(LLAMA, width=width))
    for group in (max(32, n // 50), n // 2, n):  # the interpreter runs one program after the other
        check_all_ops(x, residual, weight, replace(LLAMA, group=group))
        check_all_ops(x, residual, None, replace(LLAMA, group=group, has_weight=False))


@pytest.mark.parametrize(
    ("dtype", "n", "width"),
    [
        *((torch.bfloat16, 5125, width) for width in (1000, 3000, 5000)),  # a chunk of three each
        *((torch.float32, 33000, width) for width in (3000, 5000, 14000, 20000)),  # four chunks are read twice
    ],
    ids=str,
)
def test_a_part_of_a_row_of_several_chunks(dtype: torch.dtype, n: int, width: int) -> None:
    """It ends between two numbers that none can miss."""
    x, residual, weight = rand(2, n, dtype=dtype, seed=1), rand(2, n, dtype=dtype, seed=2), rand(n, dtype=dtype, seed=3)
    x[:, width - 1], x[:, width] = 300, 500
    check_all_ops(x, residual, weight, replace(LLAMA, width=width))


@pytest.mark.parametrize(
    "n", [1, 2, 7, 64, 111, 128, 256, 512, 513, 769, 1024, 2880, 3584, 5120, 5125, 7168, 16384, 24449, 32769, 65536]
)
def test_lengths(n: int) -> None:
    check_all_ops(rand(2, n, seed=1), rand(2, n, seed=2), rand(n, seed=3), LLAMA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [128, 4100, 16385, 40000])
def test_lengths_of_other_dtypes(n: int, dtype: torch.dtype) -> None:
    check_all_ops(rand(2, n, dtype=dtype, seed=1), rand(2, n, dtype=dtype, seed=2), rand(n, dtype=dtype, seed=3), LLAMA)


def test_the_unrounded_sum_of_a_long_row_in_place() -> None:
    """The long kernel reads its inputs twice there, so that writing in place takes another way."""
    check_all_ops(rand(2, 40000, seed=1), rand(2, 40000, seed=2), rand(40000, seed=3), replace(T5, sum="fp32"))


@pytest.mark.parametrize("n", [128, 4096])
def test_error_against_fp64_is_no_larger_than_the_originals(n: int) -> None:
    x, residual, weight = rand(8, n), rand(8, n, seed=1), rand(n, seed=2)
    normed, _ = ops.bind_fused_add_rms_norm(LLAMA, "triton")(x, residual, weight, EPS)
    original, total = reference.fused_add_rms_norm(x, residual, weight, LLAMA, EPS)
    exact = reference.rms_norm_fp64(total, weight, LLAMA, EPS)
    error, own = ((y.double() - exact).square().mean().sqrt().item() for y in (normed, original))
    assert error <= own * 1.02


@pytest.mark.parametrize("n", [7, 128, 4096, 5125])
def test_a_row_does_not_depend_on_its_batch_or_the_run(n: int) -> None:
    x, residual, weight = rand(21, n), rand(21, n, seed=1), rand(n, seed=2)
    fused = ops.bind_fused_add_rms_norm(LLAMA, "triton")
    normed, _ = fused(x, residual, weight, EPS)
    for _ in range(3):
        assert torch.equal(fused(x, residual, weight, EPS)[0], normed)
    for rows in (slice(3, 4), slice(17, 20)):
        assert torch.equal(fused(x[rows], residual[rows], weight, EPS)[0], normed[rows])


@pytest.mark.parametrize("offset", [1, 3])
def test_storage_offsets(offset: int) -> None:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        store = torch.full((tensor.numel() + 8,), float("nan"), dtype=tensor.dtype)
        return store[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)

    for n in (96, 111):
        x, residual, weight = rand(4, n), rand(4, n, seed=1), rand(n, seed=2)
        for operands in ((moved(x), residual, weight), (x, moved(residual), weight), (x, residual, moved(weight))):
            check_all_ops(*operands, LLAMA)
        inner, outer = moved(x), moved(residual)
        ops.bind_fused_add_rms_norm_(LLAMA, "triton")(inner, outer, weight, EPS)
        check(inner, reference.fused_add_rms_norm(x, residual, weight, LLAMA, EPS)[0], x)
        assert torch.equal(outer, x + residual)


def test_views() -> None:
    weight, dense = rand(128, seed=2), rand(3, 2, 4, 128, seed=4)
    qkv = rand(3, 2, 8 * 128)
    heads = qkv[..., 2 * 128 : 6 * 128].unflatten(-1, (4, 128))  # [3, 2, 4, 128], two strides
    check_all_ops(heads, dense, weight, LLAMA)
    check_all_ops(dense, heads, weight, LLAMA)
    check_all_ops(heads, rand(3, 2, 12 * 128)[..., : 4 * 128].unflatten(-1, (4, 128)), weight, LLAMA)
    check_all_ops(heads, dense, weight, replace(LLAMA, group=32))
    check_all_ops(heads.transpose(1, 2), dense.transpose(1, 2), weight, LLAMA)  # three strides: copied
    check_all_ops(heads.transpose(0, 2), rand(4, 2, 3, 128), weight, LLAMA)
    check_all_ops(rand(5, 300)[:, 4:132], rand(5, 200, seed=1)[:, 1:129], weight, LLAMA)
    check_all_ops(rand(5, 256)[:, ::2], rand(128, 5, seed=4).t(), weight, LLAMA)
    check_all_ops(rand(1, 128).expand(5, 128), rand(5, 128, seed=4), weight, LLAMA)
    check_all_ops(rand(5, 128), rand(5, 128, seed=1), rand(256, seed=2)[::2], LLAMA)
    check_all_ops(rand(128), rand(128, seed=1), weight, LLAMA)


def test_the_residual_may_be_the_hidden_states() -> None:
    x, weight = rand(5, 128), rand(128, seed=2)
    before = x.clone()
    check_all_ops(x, x, weight, LLAMA)
    assert torch.equal(x, before)


def test_in_place_on_strided_views_leaves_the_gaps_alone() -> None:
    weight = rand(128, seed=2)
    for start, other in ((8, 200), (1, 3)):  # addressed in place; through copies
        x, residual = rand(6, 300), rand(6, 400, seed=1)
        before = x.clone(), residual.clone()
        views = x[:, start : start + 128], residual[:, other : other + 128]
        normed, total = reference.fused_add_rms_norm(*views, weight, LLAMA, EPS)
        ops.bind_fused_add_rms_norm_(LLAMA, "triton")(*views, weight, EPS)
        check(views[0].contiguous(), normed, x)
        assert torch.equal(views[1], total)
        for now, then, first in ((x, before[0], start), (residual, before[1], other)):
            assert torch.equal(now[:, :first], then[:, :first])
            assert torch.equal(now[:, first + 128 :], then[:, first + 128 :])


def test_in_place_calls_count_as_writes() -> None:
    x, residual = rand(3, 64), rand(3, 64, seed=1)
    versions = x._version, residual._version
    ops.bind_fused_add_rms_norm_(LLAMA, "triton")(x, residual, None, EPS)
    assert x._version > versions[0]
    assert residual._version > versions[1]


@pytest.mark.parametrize("n", [7, 100, 128, 1025, 40001])
def test_nothing_is_written_outside_and_nothing_is_left_out(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs poisoned with NaN, each between two canaries."""
    stores = []

    def poisoned(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        store = torch.full((x.numel() + 64,), float("nan"), dtype=dtype, device=x.device)
        store[:32], store[-32:] = 7.0, 7.0
        stores.append(store)
        return store[32:-32].view(x.shape)

    x, residual, weight = rand(3, n), rand(3, n, seed=1), rand(n, seed=2)
    monkeypatch.setattr(triton_backend, "new_result", poisoned)
    normed, total = ops.bind_fused_add_rms_norm(LLAMA, "triton")(x, residual, weight, EPS)
    alone = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    assert len(stores) == 3
    assert not any(y.isnan().any() for y in (normed, total, alone))
    for store in stores:
        assert (store[:32] == 7).all()
        assert (store[-32:] == 7).all()


@pytest.mark.parametrize("n", [128, 1600, 40000])
def test_nan_and_inf_stay_in_their_row(n: int) -> None:
    x, weight = rand(9, n), rand(n, seed=2)
    clean = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    x[2, n // 2], x[5, n - 1] = float("nan"), float("inf")
    y = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    assert torch.equal(y.isnan(), reference.rms_norm(x, weight, LLAMA, EPS).isnan())
    others = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(y[others], clean[others])


def test_extreme_values() -> None:
    weight = rand(1000, dtype=torch.float16, seed=2)
    large = torch.full((3, 1000), 6e4, dtype=torch.float16)
    y = ops.bind_rms_norm(LLAMA, "triton")(large, weight, EPS)
    assert y.isfinite().all()
    check(y, reference.rms_norm_fp64(large, weight, LLAMA, EPS).half(), large)
    tail = torch.zeros(3, 1000, dtype=torch.bfloat16)
    tail[:, -2:] = 5.0
    check_all_ops(tail, rand(3, 1000, seed=1, scale=1e-3), weight.bfloat16(), LLAMA)
    check_all_ops(rand(3, 1000, scale=1e-3), rand(3, 1000, seed=1, scale=1e-3), weight.bfloat16(), LLAMA)
    subnormal = torch.full((3, 1000), 1e-6, dtype=torch.float16)
    check_all_ops(subnormal, subnormal, weight, LLAMA)


def test_zero_rows_without_eps_are_what_the_reference_gives() -> None:
    x, weight = rand(3, 64), rand(64, seed=2)
    x[1] = 0
    y = ops.bind_rms_norm(LLAMA, "triton")(x, weight, 0.0)
    assert y[1].isnan().all()
    assert torch.equal(y.isnan(), reference.rms_norm(x, weight, LLAMA, 0.0).isnan())
    assert not ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS).isnan().any()


def test_a_subnormal_mean_square() -> None:
    """1e-20 squared is subnormal in fp32: the device's approximate reciprocal root would flush it to zero."""
    x = rand(3, 128, dtype=torch.float32, scale=1e-20)
    y = ops.bind_rms_norm(LLAMA, "triton")(x, None, 0.0)
    expected = reference.rms_norm_fp64(x, None, LLAMA, 0.0)
    assert ((y - expected).abs() <= 1e-3 * expected.abs()).all()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1, None])
def test_eps_is_taken_as_it_comes(eps: float | None) -> None:
    x, weight = rand(4, 64, scale=1e-2, dtype=torch.float32), rand(64, dtype=torch.float32, seed=2)
    used = torch.finfo(torch.float32).eps if eps is None else eps
    check(ops.bind_rms_norm(LLAMA, "triton")(x, weight, eps), reference.rms_norm(x, weight, LLAMA, used), x)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (1, 64), (17, 64), (2, 3, 4, 8)])
def test_row_counts(shape: tuple[int, ...]) -> None:
    check_all_ops(rand(*shape), rand(*shape, seed=1), rand(shape[-1], seed=2), LLAMA)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    n=st.integers(1, 700),
    padding=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([*DTYPES, None]),
    spec=st.sampled_from(list(SPECS.values())),
    width=st.none() | st.integers(1, 700),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_any_shape_and_spec(
    rows: int,
    n: int,
    padding: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    spec: NormSpec,
    width: int | None,
    scale: float,
) -> None:
    x = rand(rows, n + padding, dtype=dtype, seed=n, scale=scale)[:, padding:]
    residual = rand(rows, n, dtype=dtype, seed=rows, scale=scale)
    weight = None if weight_dtype is None else rand(n, dtype=weight_dtype, seed=3)
    check_all_ops(x, residual, weight, replace(spec, width=None if width is None else min(width, n)))
