"""Where the rows of a tensor lie, as the CUDA kernels take it, and how far its addresses are aligned."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_ALIGN = 32


class Rows(NamedTuple):
    """A tensor [..., N] as rows: row r starts at (r // inner) * outer + (r % inner) * stride elements (one level: inner
    is the number of rows)."""

    tensor: torch.Tensor
    stride: int
    inner: int
    outer: int

    @property
    def two_level(self) -> bool:
        return self.outer != 0

    def offsets(self, size: int) -> tuple[int, int, int]:
        """Where its rows start, each element taken for `size` bytes: `power_of_two` reads an alignment from them."""
        return self.tensor.data_ptr() // self.tensor.element_size() * size, self.stride * size, self.outer * size


class InStep(NamedTuple):
    """The rows of a tensor, and those of another that a kernel reads beside them (None where there is none).

    inner_rows and the outer strides, in elements, are what a two-level kernel takes; all are 0 where one stride is
    enough for each of the tensors.
    """

    rows: Rows
    other: Rows | None
    inner_rows: int
    outer_stride: int
    other_outer_stride: int

    @property
    def two_level(self) -> bool:
        return self.inner_rows != 0


def in_step(x: torch.Tensor, other: torch.Tensor | None, group: int | None) -> InStep:
    """The rows of `x` and of `other`, of the same shape, with one number of inner rows; of a copy of `other` where
    theirs differ. group: as `NormSpec.group`."""
    rows, beside = rows_of(x, group), None if other is None else rows_of(other, group)
    if other is not None and beside is not None and rows.two_level and beside.two_level and rows.inner != beside.inner:
        beside = rows_of(other.contiguous(), group)
    if not (rows.two_level or (beside is not None and beside.two_level)):
        return InStep(rows, beside, 0, 0, 0)
    inner = rows.inner if rows.two_level or beside is None else beside.inner
    return InStep(rows, beside, inner, outer_stride(rows, inner), 0 if beside is None else outer_stride(beside, inner))


def one_level(x: torch.Tensor) -> Rows:
    """The rows of `x`, of a contiguous copy where one stride does not describe them."""
    rows = rows_of(x)
    return rows_of(x.contiguous()) if rows.two_level else rows


def rows_of(x: torch.Tensor, group: int | None = None) -> Rows:
    """The rows of `x`, of a contiguous copy where no kernel can address them in place. group: as `NormSpec.group`."""
    if group is not None:
        x = x.unflatten(-1, (-1, group))
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


def address_of(tensor: torch.Tensor | None) -> int:
    """0 for what a call has not; aligned as far as can be."""
    return 0 if tensor is None else tensor.data_ptr()


def outer_stride(rows: Rows, inner: int) -> int:
    """Elements from the first of `inner` rows to the first of the next ones."""
    return rows.outer if rows.two_level else rows.stride * inner
