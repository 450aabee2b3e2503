"""Cases of rows that are written quantised: what each op writes, and how far a provider may be from fp64.

A provider of such an op gives (rows, scales, normed or None, sum), and may write the sum into its residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..numerics.quantisation import GROUP, QuantSpec, new_scales
from .rows import FUSED

SCALE = 0.02
"""Of fp8_static: the largest number that fits is above what a norm of random rows gives."""


@dataclass(frozen=True)
class Written:
    """What a launch writes beside the sum. both: the unquantised rows too, for a second reader."""

    quant: QuantSpec
    both: bool = False

    def bytes(self, m: int, n: int, dtype: torch.dtype) -> int:
        return m * (n * (1 + self.both * dtype.itemsize) + 4 * self.quant.groups(n))


_COLUMNS = QuantSpec("fp8_block", layout="tma_aligned")
QUANTISED = {
    f"{FUSED}_fp8_static": Written(QuantSpec("fp8_static")),
    f"{FUSED}_fp8_token": Written(QuantSpec("fp8_token")),
    f"{FUSED}_fp8_block": Written(QuantSpec("fp8_block")),
    f"{FUSED}_fp8_block_columns": Written(_COLUMNS),
    f"{FUSED}_fp8_block_both": Written(_COLUMNS, both=True),
    f"{FUSED}_int8_token": Written(QuantSpec("int8_token")),
}
"""Ops: an add, a norm and a quantisation in one launch. "columns": scales as a TMA descriptor reads them; "both": with
bf16 rows beside them, as a router reads them."""

HALF_STEP = {torch.float8_e4m3fn: 2**-4, torch.int8: 0.0}
"""Of a quantised number's own magnitude, at most."""
LEAST_HALF_STEP = {torch.float8_e4m3fn: 2**-10, torch.int8: 0.5}
"""Of the scale: below it the numbers have one distance."""
VALUE_ERROR = 2**-7
"""Two roundings of a bf16 value in front of the quantisation, as `cases.MAX_REL_ERROR`; a scale has that error too."""
MEAN_ERROR = 2**-8
"""Of all rows together, where the roundings of single numbers cancel out."""


def wrong(op: str, results: tuple[Any, ...], want: torch.Tensor, total: torch.Tensor) -> str:
    """Empty where results are those of `op`, else what is wrong. want: fp64 [M, N], the norms; total: the sum."""
    written = QUANTISED[op]
    rows, scales, normed, residual_sum = results
    if not torch.equal(residual_sum, total):
        return f"residual sum differs in {(residual_sum != total).float().mean().item():.2%} of elements"
    if rows.shape != want.shape or rows.dtype != written.quant.dtype:
        return f"returned {tuple(rows.shape)} {rows.dtype}"
    if written.both and not _near(normed, want):
        return "the unquantised rows differ"
    whole = _scales_of_columns(written.quant, scales, want)
    return whole if isinstance(whole, str) else _wrong_rows(rows, whole, want)


def _near(normed: Any, want: torch.Tensor) -> bool:
    error = (normed.double() - want).abs() / want.abs().clamp_min(2**-6)
    return bool((error <= VALUE_ERROR).all())


def _scales_of_columns(quant: QuantSpec, scales: torch.Tensor, want: torch.Tensor) -> torch.Tensor | str:
    """A scale for each element; or what is wrong with the scales."""
    if quant.scheme == "fp8_static":
        return torch.full_like(want[:, :1], torch.tensor(SCALE, dtype=torch.float32).item())
    like = new_scales(want.to(torch.bfloat16), quant)
    if scales.shape != like.shape or scales.stride() != like.stride() or scales.dtype != torch.float32:
        return f"scales {tuple(scales.shape)} of strides {scales.stride()}, and not {tuple(like.shape)} {like.stride()}"
    size = GROUP if quant.scheme == "fp8_block" else want.shape[-1]
    exact = want.unflatten(-1, (-1, size)).abs().amax(-1) / quant.limit
    error = ((scales.double() - exact).abs() / exact).max().item()
    if not error <= VALUE_ERROR:
        return f"relative error of a scale {error:.3g} > {VALUE_ERROR:.3g}"
    return scales.double().repeat_interleave(size, -1)


def _wrong_rows(rows: torch.Tensor, scales: torch.Tensor, want: torch.Tensor) -> str:
    restored = rows.double() * scales
    allowed = want.abs() * (HALF_STEP[rows.dtype] + 2 * VALUE_ERROR) + scales * LEAST_HALF_STEP[rows.dtype] * (
        1 + 2**-6
    )
    beyond = ~((restored - want).abs() <= allowed + 2**-14)
    if beyond.any():
        return f"{beyond.double().mean().item():.2%} of elements are beyond half a step of the exact value"
    mean = ((restored * want).sum() / want.square().sum()).item()
    return "" if abs(mean - 1) <= MEAN_ERROR else f"all rows together are {mean:.4f} of the exact ones"
