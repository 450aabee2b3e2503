"""Difficult numbers on a device, cases 17 to 27: right against fp64, or a named error."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from bad_input import (
    BF16,
    EPS,
    FP16,
    FP32,
    WEIGHTLESS,
    case,
    check,
    fused,
    norm,
    parameter,
    rand,
    same,
    sanitized,
)

import rmsnorm_patch
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec

pytestmark = pytest.mark.gpu


@sanitized
@case(17)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("n", [128, 4096, 5125])
def test_an_fp32_weight(n, dtype, backend):
    """Once with the result in x's dtype, once promoted to fp32 as Llama's own norm does."""
    x, residual, weight = rand(9, n, dtype=dtype), rand(9, n, dtype=dtype, seed=1), parameter(n, FP32)
    check(x, residual, weight, backend, FP32_WEIGHT_MULTIPLY)
    promoted = norm(LLAMA, backend)(x, weight, EPS)
    assert promoted.dtype == FP32
    exact, step = reference.rms_norm_fp64(x, weight, LLAMA, EPS), torch.finfo(dtype)
    least = step.eps * step.smallest_normal  # between subnormals of x's dtype, in which x * rstd is rounded
    assert ((promoted.double() - exact).abs() <= step.eps * exact.abs() + least).all()


@case(18)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_a_kernel(dtype, backend):
    x = torch.ones(4, 512, device="cuda").to(dtype)
    with pytest.raises(UnsupportedInput, match=rf"{dtype}.*float32, bfloat16, float16"):
        norm(LLAMA, backend)(x, None, EPS)
    with pytest.raises(UnsupportedInput, match=rf"weight of dtype {dtype}"):
        norm(LLAMA, backend)(rand(4, 512), x[0], EPS)


@case(19)
@pytest.mark.parametrize("n", [128, 4096, 65536])
def test_large_fp16_values(n, backend):
    x = torch.full((3, n), 6e4, dtype=FP16, device="cuda")
    x[1, ::2] = -6e4
    weight = parameter(n, FP16)
    got = norm(LLAMA, backend)(x, weight, EPS)
    assert got.isfinite().all()
    exact = reference.rms_norm_fp64(x, weight, LLAMA, EPS)
    assert ((got.double() - exact).abs() <= 2**-10 * exact.abs()).all()


@case(20)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_row_of_zeros(dtype, backend):
    x, weight = torch.zeros(3, 1024, dtype=dtype, device="cuda"), parameter(1024, dtype)
    for eps in (0.0, EPS):
        got, want = norm(LLAMA, backend)(x, weight, eps), reference.rms_norm(x, weight, LLAMA, eps)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@case(21)
@pytest.mark.parametrize("n", [7, 128, 4096, 65536])
def test_nan_and_inf_stay_in_their_row(n, backend):
    x, weight = rand(9, n), parameter(n)
    clean = norm(LLAMA, backend)(x, weight, EPS)
    x[2, n // 2], x[5, n - 1] = float("nan"), float("inf")
    got, want = norm(LLAMA, backend)(x, weight, EPS), reference.rms_norm(x, weight, LLAMA, EPS)
    others = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(got[others], clean[others])
    assert torch.equal(got.isnan(), want.isnan())


@case(22)
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-39])
def test_tiny_values(scale, backend):
    for dtype in (BF16, FP32) if scale < 1e-7 else (BF16, FP16, FP32):
        x, residual = rand(5, 1024, dtype=dtype, scale=scale), rand(5, 1024, dtype=dtype, seed=1, scale=scale)
        check(x, residual, parameter(1024, dtype), backend)


@case(22)
def test_squares_that_are_subnormal(backend):
    x = rand(5, 1024, dtype=FP32, scale=1e-20)
    got, exact = norm(WEIGHTLESS, backend)(x, None, 0.0), reference.rms_norm_fp64(x, None, WEIGHTLESS, 0.0)
    assert ((got.double() - exact).abs() <= 1e-3 * exact.abs() + 1e-6).all()


@sanitized
@case(23)
@pytest.mark.parametrize("n", [513, 4096, 5125, 65536])
def test_energy_in_the_last_columns(n, backend):
    x = torch.zeros(3, n, dtype=BF16, device="cuda")
    x[:, -2:] = 5.0
    check(x, rand(3, n, scale=1e-3), parameter(n), backend)


@sanitized
@case(24)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    "spec", [GEMMA, NormSpec(weight_offset="weight_dtype"), WEIGHTLESS], ids=["1+w", "1+w in w", "no weight"]
)
def test_offset_weights_and_none(spec, dtype, backend):
    weight = (parameter(768, dtype) - 1).detach() if spec.has_weight else None
    check(rand(9, 768, dtype=dtype), rand(9, 768, dtype=dtype, seed=1), weight, backend, spec)


class Holder(nn.Module):
    """The norms of a model, one beside the other."""

    def __init__(self, **norms: nn.Module) -> None:
        super().__init__()
        for name, module in norms.items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [module(x) for module in self.children()]


@case(25)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 0.25])
def test_eps_under_every_name(eps, backend):
    """At an rms of 1e-3 each of these values gives another result, and `a or b` another one for 0.0."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    llama, gemma, torchs = LlamaRMSNorm(256, eps=eps), GemmaRMSNorm(256, eps=eps), nn.RMSNorm(256, eps=eps)
    model = Holder(llama=llama, gemma=gemma, torchs=torchs, default=nn.RMSNorm(256, eps=None)).cuda().to(BF16).eval()
    x = rand(6, 256, scale=1e-3)
    with torch.no_grad():
        want = model(x)
        report = rmsnorm_patch.apply(model, backend=backend)
        assert len(list(report.plan.fused_norms())) == 4, report.plan
        for got, expected in zip(model(x), want, strict=True):
            same(got, expected)
        for module, name in ((llama, "variance_epsilon"), (gemma, "eps"), (torchs, "eps")):
            setattr(module, name, 1.0)  # read at each call, as the original does
        changed = model(x)
        rmsnorm_patch.revert(model)
        for got, expected in zip(changed, model(x), strict=True):
            same(got, expected)


@case(26)
@pytest.mark.parametrize("n", [7, 128, 4096, 5125, 65536])
def test_poisoned_outputs_are_written_everywhere(n, backend):
    x, residual, weight = rand(5, n), rand(5, n, seed=1), parameter(n)
    torch.cuda.empty_cache()
    poison = [torch.full((5, n), float("nan"), dtype=BF16, device="cuda") for _ in range(3)]
    addresses = {tensor.data_ptr() for tensor in poison}
    del poison  # the allocator hands these blocks to the outputs
    normed, total = fused(LLAMA, backend)(x, residual, weight, EPS)
    alone = norm(LLAMA, backend)(x, weight, EPS)
    assert {normed.data_ptr(), total.data_ptr()} & addresses
    for result in (normed, total, alone):
        assert not result.isnan().any()


@case(27)
@pytest.mark.parametrize("n", [64, 4096, 5125, 16384, 131072])
def test_repeats_and_batches_are_bitwise_equal(n, backend):
    m = 700 if n <= 16384 else 40
    x, residual, weight = rand(m, n), rand(m, n, seed=1), parameter(n)
    normed, total = fused(LLAMA, backend)(x, residual, weight, EPS)
    alone = norm(LLAMA, backend)(x, weight, EPS)
    for _ in range(100):
        again = fused(LLAMA, backend)(x, residual, weight, EPS)
        assert torch.equal(again[0], normed)
        assert torch.equal(again[1], total)
    for rows in (slice(0, 1), slice(m - 1, m), slice(7, 30)):
        assert torch.equal(fused(LLAMA, backend)(x[rows], residual[rows], weight, EPS)[0], normed[rows])
        assert torch.equal(norm(LLAMA, backend)(x[rows], weight, EPS), alone[rows])
