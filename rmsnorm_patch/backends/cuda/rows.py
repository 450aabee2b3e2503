"""Where the rows of a tensor lie, as the CUDA kernels take it, and how far its addresses are aligned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_ALIGN = 32


@dataclass(frozen=True)
class Rows:
    """A tensor [..., N] as rows: row r starts at (r // inner) * outer + (r % inner) * stride elements (one level: inner
    is the number of rows)."""

    tensor: torch.Tensor
    stride: int
    inner: int
    outer: int

    @property
    def two_level(self) -> bool:
        return self.outer != 0


def rows_of(x: torch.Tensor) -> Rows:
    """The rows of `x`, of a contiguous copy where no kernel can address them in place."""
    n = x.shape[-1]
    if n > 1 and x.stride(-1) != 1:
        return rows_of(x.contiguous())
    levels: list[list[int]] = []  # [size, stride], outermost first, after merging what lies evenly
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if not levels:
        return Rows(x, n, 1, 0)
    if len(levels) == 1:
        return Rows(x, levels[0][1], levels[0][0], 0)
    if len(levels) == 2 and levels[0][1] != 0:
        return Rows(x, levels[1][1], levels[1][0], levels[0][1])
    return rows_of(x.contiguous())


def power_of_two(*values: int) -> int:
    """The largest power of two, at most MAX_ALIGN, that divides all of them."""
    bits = MAX_ALIGN
    for value in values:
        bits |= value
    return bits & -bits


def outer_stride(rows: Rows, inner: int) -> int:
    return rows.outer if rows.two_level else rows.stride * inner
