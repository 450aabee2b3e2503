"""Operands on a GPU: random ones, rows with everything in them that a kernel may meet, scales; and equal bits."""

from __future__ import annotations

import torch

from rmsnorm_patch.numerics.quantisation import QuantSpec


def rows(m: int, n: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Case 90: zeros, infinities, NaN, huge and tiny numbers in the first rows."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(m, n, device="cuda", generator=generator)
    if m >= 10:
        values[0] = 0
        values[1, 5], values[2, 7], values[6, 3] = float("inf"), float("nan"), -float("inf")
        values[3] *= 1e30
        values[4] *= 1e-38
        values[8, : n // 2] = 0
        values[9] = 0
        values[9, seed % n] = 1e4
    return values.to(dtype)


def rand(
    *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 1.0, device: str = "cuda"
) -> torch.Tensor:
    """Normal values, the same for one seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included, and of one dtype."""
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def given(quant: QuantSpec, bound: bool = False) -> torch.Tensor | None:
    """The scale of static rows, or the upper bound of rows with a scale each."""
    if quant.scheme == "fp8_static":
        return torch.tensor([0.037], device="cuda")
    return torch.tensor([1.5], device="cuda") if bound and quant.scheme == "fp8_token" else None
