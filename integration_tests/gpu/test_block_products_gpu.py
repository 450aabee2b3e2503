"""The product of FP8 blocks with rows that a norm quantised, on a Hopper with vLLM's own libraries: every bit is that
of vLLM's op on the rows as the norm writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made_rows import rows

from rmsnorm_patch import ops
from rmsnorm_patch.fused.norm_quantised.op import quant_args
from rmsnorm_patch.numerics.quantisation import QuantSpec, new_scales, quantise
from rmsnorm_patch.numerics.spec import NormSpec
from rmsnorm_patch.vllm_plugin.passes import block_products, block_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = torch.bfloat16
EPS = 1e-6
SPEC = NormSpec(round_before_weight="none", output="input", sum="fp32")
FLASHINFER = QuantSpec("fp8_block", "rounded", "flashinfer", "tma_aligned")
ROWS = (1, 2, 3, 5, 8, 31, 32, 33, 64, 200)
BACKENDS = ("cuda", "triton")


@pytest.fixture
def theirs() -> Any:
    """vLLM's op."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    pytest.importorskip("flashinfer", reason="FlashInfer is not installed here")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FlashInfer's product of blocks is one for sm_90")
    block_products._libraries()
    return getattr(torch.ops.vllm, block_rows.NAME)


def weights(n: int, k: int, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(-(n // -128), k // 128, generator=generator, device="cuda") * 0.1 + 0.001
    return weight, torch.exp2(scales.log2().ceil()) if power_of_two else scales


def normal(m: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(BF16)


def written(x: Any, residual: Any, weight: Any, quant: QuantSpec, backend: str = "cuda") -> Any:
    """(rows, scales, the plain rows, the sum) of one launch."""
    total = residual.clone()
    rest = (weight, None, quant.scheme, EPS, *ops.spec_args(SPEC, backend), *quant_args(quant, True))
    return *torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, total, *rest), total


def test_scales_that_are_no_powers_of_two_are_left_to_vllm() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert "powers of two" in block_products._declined(4096, 128, False, device)


@pytest.mark.parametrize("power_of_two", [True])
@pytest.mark.parametrize(("n", "k"), [(384, 512), (6144, 4096)])
def test_every_bit_is_that_of_vllms_op(n: int, k: int, power_of_two: bool, theirs: Any) -> None:
    matrix = weights(n, k, power_of_two)
    weight = normal(1, k, 1)[0]
    for m in ROWS:
        x, residual = normal(m, k, 2), normal(m, k, 3)
        x[0, :128] = residual[0, :128] = 0  # a group of zeros
        quantised, scales, normed, _ = written(x, residual, weight, block_rows.spec_of(power_of_two))
        assert torch.equal(normed, ops.bind_fused_add_rms_norm(SPEC, "cuda")(x, residual, weight, EPS)[0])
        want = theirs(normed, *matrix, 128, power_of_two)
        found = torch.ops.rmsnorm_patch.block_product(quantised, scales, *matrix, power_of_two)
        assert torch.equal(found, want), (m, (found != want).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_scales_are_those_of_flashinfers_quantiser(backend: str, theirs: Any) -> None:
    """Its own kernel's, ties of the format among them: its quotients are approximate, and so are ours."""
    from flashinfer.gemm.gemm_base import get_fp8_blockscale_gemm_runner_sm90

    quantiser = get_fp8_blockscale_gemm_runner_sm90()
    for m, k in ((1, 512), (7, 4096), (31, 8192)):
        for seed in range(40):
            x, residual = normal(m, k, seed), normal(m, k, seed + 100) * 0
            weight = torch.exp2(torch.randint(-3, 4, (k,), device="cuda")).to(BF16)
            found, scales, normed, _ = written(x, residual, weight, FLASHINFER, backend)
            want = torch.empty_like(found)
            column = -(m // -4) * 4
            want_scales = torch.empty(k // 128 * column, device="cuda")
            quantiser.fp8_quantize_1x128(normed, want, want_scales, False)
            assert torch.equal(scales, want_scales.as_strided((m, k // 128), (1, column))), (m, k, seed)
            assert torch.equal(found.view(torch.uint8), want.view(torch.uint8)), (m, k, seed)


def test_the_trial_finds_nothing(theirs: Any) -> None:
    for power_of_two in (False, True):
        assert block_products._trial(4096, power_of_two, torch.device("cuda", torch.cuda.current_device())) == ""


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition_differs_in_last_bits_alone(backend: str) -> None:
    """Its quotients are rounded: a scale is two units off at most, a byte here and there is the next one. Zeros,
    infinities, NaN and tiny numbers are among the rows."""
    for n in (128, 1000, 4096, 8192):
        x, residual, weight = rows(31, n, 1), rows(31, n, 2), torch.randn(n, device="cuda").to(BF16)
        found, scales, normed, _ = written(x, residual, weight, FLASHINFER, backend)
        want, want_scales = quantise(normed, FLASHINFER)
        torch.testing.assert_close(scales, want_scales, rtol=2.0**-21, atol=0, equal_nan=True)
        assert scales.stride() == new_scales(normed, FLASHINFER).stride()
        steps = (found.view(torch.uint8).int() - want.view(torch.uint8).int()).abs()
        assert steps.max() <= 1
        assert (steps != 0).float().mean() < 0.01
