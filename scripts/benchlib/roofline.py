"""The same memory traffic without the norm: what the device allows, measured in the same run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _fused_add_traffic(x, residual, normed, total, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    a = tl.load(x + offsets, mask=inside)
    b = tl.load(residual + offsets, mask=inside)
    tl.store(total + offsets, a + b, mask=inside)
    tl.store(normed + offsets, a - b, mask=inside)


@triton.jit
def _norm_traffic(x, normed, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    tl.store(normed + offsets, tl.load(x + offsets, mask=inside) * 0.5, mask=inside)


CONFIGS = ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16))
"""(elements per program, warps); the fastest of them is the roofline of a shape."""


def fused_add_traffic(x, residual, normed, total, config) -> None:
    """Two reads and two writes of x's size; `normed` and `total` may be `x` and `residual` themselves."""
    block, warps = config
    _fused_add_traffic[(triton.cdiv(x.numel(), block),)](
        x, residual, normed, total, x.numel(), BLOCK=block, num_warps=warps
    )


def norm_traffic(x, normed, config) -> None:
    """One read and one write of x's size."""
    block, warps = config
    _norm_traffic[(triton.cdiv(x.numel(), block),)](x, normed, x.numel(), BLOCK=block, num_warps=warps)


def bytes_moved(op: str, m: int, n: int, dtype: torch.dtype) -> int:
    """Bytes that `op` must move, the weight left out: each operand read once, each result written once."""
    return m * n * dtype.itemsize * (4 if op == "fused_add_rms_norm" else 2)
