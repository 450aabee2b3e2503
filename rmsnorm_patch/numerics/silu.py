"""silu(gate) * up, of rows [..., 2 * N] that hold the gates and then what they multiply, and its quantised rows.

The exponential is that of the device at hand: CUDA's `expf` on a GPU, PyTorch's on a CPU. They differ in last bits.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..errors import UnsupportedInput
from .quantisation import QuantSpec, quantise

Silu = Literal["rounded", "fp32", "product"]
SILUS: tuple[Silu, ...] = ("rounded", "fp32", "product")
"""Who computes silu so. "rounded": gate / (1 + e^-gate), rounded to x.dtype in front of the product: vLLM's
`silu_and_mul` and `silu_and_mul_quant`, PyTorch's `silu`. "fp32": the same, not rounded: Inductor. "product":
gate * (1 / (1 + e^-gate)), not rounded: vLLM's `silu_and_mul_per_block_quant`."""
DTYPES = (torch.bfloat16, torch.float16)


def silu_and_mul(x: torch.Tensor, silu: Silu = "rounded", rounded: bool = True) -> torch.Tensor:
    """[..., N] of x [..., 2 * N] (fp16 or bf16), of x.dtype; the fp32 product where it is not to be rounded."""
    gate, up = x.to(torch.float32).chunk(2, -1)
    denominator = 1.0 + torch.exp(-gate)
    factor = gate * (1.0 / denominator) if silu == "product" else gate / denominator
    if silu == "rounded":
        factor = factor.to(x.dtype).to(torch.float32)
    values = factor * up
    return values.to(x.dtype) if rounded else values


def silu_and_mul_quantised(
    x: torch.Tensor, silu: Silu, quant: QuantSpec, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [..., N] of `quant.dtype`, scales) of x [..., 2 * N]; given: as `quantise` takes it."""
    rows, scales = quantise(silu_and_mul(x, silu, rounded=quant.value == "rounded"), quant, given)
    return rows.contiguous(), scales


def check_silu(x: torch.Tensor, silu: str, op: str) -> None:
    """Raise UnsupportedInput unless `silu_and_mul` of x is defined."""
    if silu not in SILUS:
        raise UnsupportedInput(op, f"silu={silu!r}", ", ".join(map(repr, SILUS)), "correct the argument")
    if x.dtype not in DTYPES:
        raise UnsupportedInput(op, f"x of dtype {x.dtype}", "x of dtype bfloat16 or float16", "cast x")
    if x.dim() == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
        got = f"x of shape {tuple(x.shape)}"
        raise UnsupportedInput(op, got, "rows of gates and of as many numbers behind them", "pass both halves")
