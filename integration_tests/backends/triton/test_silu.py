"""The Triton kernel of silu(gate) * up, quantised: in the CPU interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import ahead
from triton.backends.compiler import GPUTarget

from rmsnorm_patch.backends.triton.backend import Layout
from rmsnorm_patch.fused.silu_quantised import kernel, op, portable
from rmsnorm_patch.numerics.contract import RMS_NORM
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.silu import SILUS, Silu, silu_and_mul_quantised

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN and 1/0 on purpose

BF16, FP16 = torch.bfloat16, torch.float16
QUANTS = {
    "static": QuantSpec("fp8_static"),
    "static native": QuantSpec("fp8_static", "fp32", "native"),
    "token": QuantSpec("fp8_token"),
    "token native": QuantSpec("fp8_token", "fp32", "native"),
    "block": QuantSpec("fp8_block", "fp32"),
    "block separate": QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True),
    "block for FlashInfer": QuantSpec("fp8_block", "rounded", "flashinfer", "tma_aligned"),
    "block by rows": QuantSpec("fp8_block", "rounded", "by_rows", "tma_aligned", True),
    "int8": QuantSpec("int8_token", arithmetic="separate"),
}


def run(x: torch.Tensor, silu: Silu, quant: QuantSpec, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (x, given, quant.scheme, *op.silu_args(silu, quant), "triton")
    return torch.ops.rmsnorm_patch.silu_and_mul_quantised(*arguments)  # type: ignore[no-any-return]


def near(found: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal but where an exponential that differs in its last bit has put a value across the middle of two steps."""
    apart = (found.view(torch.uint8).to(torch.int32) - want.view(torch.uint8).to(torch.int32)).abs()
    return bool((apart <= 1).all()) and bool((apart == 0).float().mean() > 0.99)


@pytest.mark.parametrize("silu", SILUS)
@pytest.mark.parametrize("n", [64, 200, 384, 1003])
@pytest.mark.parametrize("name", QUANTS)
def test_interpreted_rows_are_those_of_the_definition(
    name: str, n: int, silu: Silu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quant, dtype = QUANTS[name], FP16 if n == 200 else BF16
    if quant.scheme == "fp8_static":
        given: torch.Tensor | None = torch.tensor([0.02])
    else:
        given = torch.tensor([1.5]) if name == "token" else None
    x = torch.randn(7, 2 * n, generator=torch.Generator().manual_seed(n))
    x[0] = 0
    x[1, n // 2 :] *= 30
    x[2] *= 1e-3
    found, scales = run(x.to(dtype), silu, quant, given)
    want, want_scales = silu_and_mul_quantised(x.to(dtype), silu, quant, given)
    assert near(found, want)
    torch.testing.assert_close(scales, want_scales, rtol=2.0**-7, atol=0)
    assert scales.numel() == 0 or (scales == want_scales).float().mean() > 0.8
    assert scales.stride() == want_scales.stride()


@pytest.mark.parametrize("name", QUANTS)
def test_interpreted_numbers_that_are_none_and_infinities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates far out, whose exponential is 0 or infinite, and NaN."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quant = QUANTS[name]
    given = torch.tensor([0.02]) if quant.scheme == "fp8_static" else None
    x = torch.ones(6, 512, dtype=BF16)
    for row, gate in enumerate((float("inf"), -float("inf"), float("nan"), 1e30, -1e30, -100.0)):
        x[row, :3] = gate
    found, scales = run(x, "rounded", quant, given)
    want, want_scales = silu_and_mul_quantised(x, "rounded", quant, given)
    assert torch.equal(found.view(torch.uint8), want.view(torch.uint8))
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)


def test_interpreted_rows_with_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quant = QUANTS["block separate"]
    x = torch.randn(2, 6, 1024).to(BF16)[:, ::2, :512]
    found, scales = run(x, "rounded", quant, None)
    flat, flat_scales = run(x.reshape(6, 512), "rounded", quant, None)
    assert torch.equal(found.view(6, 256).view(torch.uint8), flat.view(torch.uint8))
    assert torch.equal(scales.reshape(6, 2), flat_scales)


@pytest.mark.parametrize(
    ("target", "name", "n"),
    [
        (GPUTarget("cuda", 80, 32), "int8", 14336),
        (GPUTarget("cuda", 90, 32), "block separate", 3584),
        (GPUTarget("cuda", 90, 32), "block for FlashInfer", 4096),
        (GPUTarget("cuda", 100, 32), "token", 1003),
        (GPUTarget("hip", "gfx942", 64), "block", 4096),
    ],
    ids=str,
)
def test_it_compiles_for_devices_that_are_not_here(target: GPUTarget, name: str, n: int) -> None:
    layout = Layout(RMS_NORM.name, kernel.SPEC, BF16, n, None, ahead.known(target))
    made = portable.constants(layout, "rounded", QUANTS[name]) | {"NESTED": False, "GIVEN": False}
    types = {"rows_ptr": "*u8", "scales_ptr": "*fp32", "given_ptr": "*fp32"}
    compiled = ahead.compiled(target, portable.MODULE, layout, made, BF16, types)
    ahead.check_waits_and_quotients(compiled, target, name == "block for FlashInfer")
