"""The kernels that write quantised rows: every byte and scale is that of quantising what the norms' kernels give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_rows import given, rows

from rmsnorm_patch import ops
from rmsnorm_patch.fused.norm_quantised.op import quant_args
from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec
from rmsnorm_patch.vllm_plugin import trial

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 1e-6
FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")
QUANTS = {
    "static": (QuantSpec("fp8_static"), LLAMA),
    "static native": (QuantSpec("fp8_static", "fp32", "native"), FP32_WEIGHT_MULTIPLY),
    "token": (QuantSpec("fp8_token"), FP32_SUM),
    "token native": (QuantSpec("fp8_token", "fp32", "native"), FP32_WEIGHT_MULTIPLY),
    "block": (QuantSpec("fp8_block"), GEMMA),
    "block native": (QuantSpec("fp8_block", "fp32", "native", "column_major", True), FP32_WEIGHT_MULTIPLY),
    "block separate": (QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True), FP32_SUM),
    "int8": (QuantSpec("int8_token"), LLAMA),
    "int8 separate": (QuantSpec("int8_token", "fp32", "separate"), FP32_WEIGHT_MULTIPLY),
}
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89"
)


def normed_values(x, residual, weight, quant, spec, backend):  # type: ignore[no-untyped-def]
    """(what is quantised, the norm's result, the sum) by the kernels of the unquantised ops."""
    normed, total = ops.bind_fused_add_rms_norm(spec, backend)(x, residual, weight, EPS)
    if quant.value == "rounded":
        return normed, normed, total
    wide = replace(spec, output="promote")  # an fp32 weight leaves the product unrounded
    return ops.bind_fused_add_rms_norm(wide, backend)(x, residual, weight.float(), EPS)[0], normed, total


def check(x, residual, weight, quant, spec, backend="cuda", both=False, scale=None):  # type: ignore[no-untyped-def]
    values, normed, total = normed_values(x, residual, weight, quant, spec, backend)
    want, want_scales = quantise(values, quant, scale)
    kept = residual.clone()
    rest = (weight, scale, quant.scheme, EPS, *ops.spec_args(spec, backend), *quant_args(quant, both))
    found, scales, second = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, kept, *rest)
    assert torch.equal(kept.view(torch.int16), total.view(torch.int16))
    assert torch.equal(found.view(torch.uint8), want.view(torch.uint8))
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    assert scales.stride() == want_scales.stride()
    assert not both or torch.equal(second.view(torch.int16), normed.view(torch.int16))
    return found, scales


@needs_fp8
@pytest.mark.case(90, 91)
@pytest.mark.parametrize("n", [64, 128, 1000, 2880, 4096, 7168, 8192, 16384, 32768])
@pytest.mark.parametrize("name", QUANTS)
def test_bits_are_those_of_quantising_the_norm(name: str, n: int) -> None:
    """Row counts of every schedule, and some that are no multiple of four."""
    quant, spec = QUANTS[name]
    weight = torch.randn(n, device="cuda").to(BF16)
    for m in (1, 17, 33, 100, 300, 1029):
        x, residual = rows(m, n, 1), rows(m, n, 2)
        for both in (False, True):
            check(x, residual, weight, quant, spec, both=both, scale=given(quant, both))


@needs_fp8
@pytest.mark.parametrize("n", [999, 1002, 5124])
@pytest.mark.parametrize("name", [name for name in QUANTS if not name.startswith("block")])
def test_odd_lengths_in_fp16(name: str, n: int) -> None:
    quant, spec = QUANTS[name]
    for m in (3, 700):
        x, residual = rows(m, n, 3, FP16), rows(m, n, 4, FP16)
        check(x, residual, torch.randn(n, device="cuda").to(FP16), quant, spec, both=True, scale=given(quant, False))


@needs_fp8
def test_few_rows_and_many_give_the_same_bits() -> None:
    for name, (quant, spec) in QUANTS.items():
        x, residual = rows(1000, 8192, 5), rows(1000, 8192, 6)
        weight = torch.randn(8192, device="cuda").to(BF16)
        found, scales = check(x, residual, weight, quant, spec, scale=given(quant, False))
        few, few_scales = check(x[20:23], residual[20:23], weight, quant, spec, scale=given(quant, False))
        assert torch.equal(few.view(torch.uint8), found[20:23].view(torch.uint8)), name
        assert scales.numel() == 0 or torch.equal(few_scales, scales[20:23])


@needs_fp8
def test_strided_rows_and_residuals() -> None:
    quant, spec = QUANTS["block separate"]
    weight = torch.randn(4096, device="cuda").to(BF16)
    x = rows(2 * 7, 8192, 7).view(2, 7, 8192)[:, :6:2, :4096]
    residual = rows(2 * 7, 4096, 8).view(2, 7, 4096)[:, :6:2]
    kept, total = residual.clone(), residual
    rest = (weight, None, quant.scheme, EPS, *ops.spec_args(spec, "cuda"), *quant_args(quant))
    found, scales, _ = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, total, *rest)
    flat = kept.reshape(6, 4096)
    want, want_scales, _ = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x.reshape(6, 4096), flat, *rest)
    assert torch.equal(found.view(6, 4096).view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scales.reshape(6, 32), want_scales)
    assert torch.equal(total.reshape(6, 4096).view(torch.uint8), flat.view(torch.uint8))


@needs_fp8
def test_a_scale_and_a_weight_written_by_the_kernel_in_front_are_read() -> None:
    """Case 88: the launch is dependent, the reads stand behind the wait."""
    quant, spec = QUANTS["static"]
    x, residual = rows(4, 4096, 9), rows(4, 4096, 10)
    weight, scale = torch.zeros(4096, device="cuda", dtype=BF16), torch.zeros(1, device="cuda")
    for turn in range(200):
        new_weight, new_scale = torch.full_like(weight, 1.0 + turn % 7), torch.full_like(scale, 0.01 * (1 + turn % 5))
        values, _, _ = normed_values(x, residual, new_weight, quant, spec, "cuda")
        want, _ = quantise(values, quant, new_scale)
        rest = (quant.scheme, EPS, *ops.spec_args(spec, "cuda"), *quant_args(quant))
        kept = residual.clone()
        weight.copy_(new_weight)
        scale.copy_(new_scale)
        found, _, _ = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, kept, weight, scale, *rest)
        assert torch.equal(found.view(torch.uint8), want.view(torch.uint8)), turn


@pytest.mark.parametrize("n", [128, 1003, 4096])
@pytest.mark.parametrize("name", [name for name, (quant, _) in QUANTS.items() if quant.value == "rounded"])
def test_triton_bits_are_those_of_quantising_its_own_rows(name: str, n: int) -> None:
    """Its own: those that the same launch writes unquantised."""
    quant, spec = QUANTS[name]
    x, residual, weight = rows(37, n, 11), rows(37, n, 12), torch.randn(n, device="cuda").to(BF16)
    scale = given(quant, False)
    rest = (weight, scale, quant.scheme, EPS, *ops.spec_args(spec, "triton"), *quant_args(quant, True))
    found, scales, normed = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, residual, *rest)
    want, want_scales = quantise(normed, quant, scale)
    assert torch.equal(found.view(torch.uint8), want.view(torch.uint8))
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)


@needs_fp8
@pytest.mark.parametrize("n", [192, 512, 4096, 8192])
@pytest.mark.parametrize("name", QUANTS)
def test_the_trial_of_an_engine_passes(name: str, n: int) -> None:
    """In front of which vLLM's graph keeps its own norm."""
    quant, spec = QUANTS[name]
    x, weight = torch.empty(0, n, dtype=BF16, device="cuda"), torch.empty(n, dtype=BF16, device="cuda")
    for adds in (False, True):
        assert trial.declined_quantised(x, weight, spec, quant, adds, quant.scheme == "fp8_static") == ""
