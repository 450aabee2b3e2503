"""The same memory traffic without the norm: what the device allows, measured in the same run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..backends.triton.backend import COMPILE_OPTIONS


@triton.jit
def _fused_add_traffic(x, residual, normed, total, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    a = tl.load(x + offsets, mask=inside)
    b = tl.load(residual + offsets, mask=inside)
    tl.store(total + offsets, a + b, mask=inside)
    tl.store(normed + offsets, a - b, mask=inside)


@triton.jit
def _quantised_traffic(x, residual, rows, normed, total, numel, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    a = tl.load(x + offsets, mask=inside)
    b = tl.load(residual + offsets, mask=inside)
    tl.store(total + offsets, a + b, mask=inside)
    tl.store(rows + offsets, (a - b).to(tl.int8), mask=inside)
    if BOTH:
        tl.store(normed + offsets, a - b, mask=inside)


@triton.jit
def _norm_traffic(x, normed, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    tl.store(normed + offsets, tl.load(x + offsets, mask=inside) * 0.5, mask=inside)


@triton.jit
def _strided_half(x, normed, row, row_stride, columns, block, BLOCK: tl.constexpr):
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    value = tl.load(x + row * row_stride + offsets, mask=inside)
    tl.store(normed + row * columns + offsets, value * 0.5, mask=inside)


@triton.jit
def _pair_traffic(q, k, q_out, k_out, q_stride, k_stride, q_columns, k_columns, q_blocks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if block < q_blocks:
        _strided_half(q, q_out, row, q_stride, q_columns, block, BLOCK)
    else:
        _strided_half(k, k_out, row, k_stride, k_columns, block - q_blocks, BLOCK)


CONFIGS = ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16))
"""(elements per program, warps); the fastest of them is the roofline of a shape."""


def fused_add_traffic(x, residual, normed, total, config) -> None:
    """Two reads and two writes of x's size; `normed` and `total` may be `x` and `residual` themselves."""
    block, warps = config
    _fused_add_traffic[(triton.cdiv(x.numel(), block),)](
        x, residual, normed, total, x.numel(), BLOCK=block, num_warps=warps, **COMPILE_OPTIONS
    )


def quantised_traffic(x, residual, rows, normed, total, config) -> None:
    """As `fused_add_traffic`, with `rows` of a byte an element; `normed`: rows of x's dtype beside them, or None."""
    block, warps = config
    both = normed is not None
    _quantised_traffic[(triton.cdiv(x.numel(), block),)](
        x,
        residual,
        rows,
        normed if both else x,
        total,
        x.numel(),
        BOTH=both,
        BLOCK=block,
        num_warps=warps,
        **COMPILE_OPTIONS,
    )


def norm_traffic(x, normed, config) -> None:
    """One read and one write of x's size."""
    block, warps = config
    _norm_traffic[(triton.cdiv(x.numel(), block),)](
        x, normed, x.numel(), BLOCK=block, num_warps=warps, **COMPILE_OPTIONS
    )


def pair_traffic(q: torch.Tensor, k: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor, config) -> None:
    """q and k [tokens, heads, n], the heads of a token together, read once and written contiguously, in one launch."""
    block, warps = config
    columns = [x.shape[1] * x.shape[2] for x in (q, k)]
    blocks = [triton.cdiv(c, block) for c in columns]
    grid = (q.shape[0], sum(blocks))
    strides = (q.stride(0), k.stride(0))
    _pair_traffic[grid](
        q, k, q_out, k_out, *strides, *columns, blocks[0], BLOCK=block, num_warps=warps, **COMPILE_OPTIONS
    )
