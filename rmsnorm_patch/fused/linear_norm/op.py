"""A product and the fused norm that reads it, as one op: what of the product the norm's kernel can do is left to it.

    linear_fused_add_rms_norm_(rows, matrix, residual!, weight?, eps, ...) -> normed

x = rows @ matrix.T, rounded to rows' dtype; residual <- x + residual; the result is the norm of that sum. rows: [M, K],
matrix: [N, K], residual: [M, N], of one dtype; weight: [N] or None; the arguments after eps are `ops.spec_args`
and `splits`: what `splits.settings_of` gives.

The bits are those of `torch.mm` and `fused_add_rms_norm_`. Where `torch.mm` splits K, adds the parts in a kernel of its
own and rounds, the op asks for the parts and leaves that to the norm (`kernel.py`). A `SplitFinder` finds
out which parts these are; where it cannot, the norm gets the product. No result depends on which it was, unless
`splits` allows other sums.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import ops
from ...backends.bindings import kept
from ...backends.names import Backend
from ...errors import UnsupportedInput
from ...numerics import operands
from ...numerics.contract import FUSED_ADD_IN_PLACE, IMPLIED_EPS
from ...numerics.spec import NormSpec
from ...ops import dispatch
from ...ops.library import register, spec_of
from .splits import UNKNOWN, SplitFinder, finder_of, product_in_parts

NAME = "linear_fused_add_rms_norm_"
_NORM = FUSED_ADD_IN_PLACE.schema.replace("Tensor(a!) x", "Tensor rows, Tensor matrix")
SCHEMA = _NORM.replace(") -> ()", ", str splits='') -> Tensor")


def _linear_fused_add_rms_norm_(  # type: ignore[no-untyped-def]
    rows, matrix, residual, weight, eps, *spec
):
    variant, backend, fused, plain, finder = _bound(weight is not None, *spec)
    check(rows, matrix)
    split = UNKNOWN
    if rows.is_cuda and backend in ("auto", "cuda"):
        split = finder.split_of(rows, matrix, residual, weight, variant)
    if split.kind != "parts":
        x = torch.mm(rows, matrix.t())
        # A product's own kernel lets nothing start early: behind it a dependent launch costs. Behind the kernel that
        # adds up parts it saves.
        (plain if split.kind == "whole" else fused)(x, residual, weight, eps)
        return x
    from . import kernel

    normed = _for_result(rows, matrix)
    operands.check_in_place(normed, residual, weight, variant, NAME)
    add_up, eps = kernel.bound(variant, split.parts, dependent=False), IMPLIED_EPS if eps is None else eps
    add_up(product_in_parts(rows, matrix, split.parts), residual, weight, eps, normed)
    operands.count_write(residual)
    return normed


DEFAULTS = (*ops.spec_args(NormSpec()), "")


@kept
def _bound(has_weight: bool, *spec: object) -> tuple[NormSpec, Backend, ops.Bound, ops.Bound, SplitFinder]:
    """Of the arguments after eps, of which those at the end may be missing: numerics, the backend that is asked for,
    the fused op, the same launched plainly, and who knows how the library splits."""
    arguments: tuple[Any, ...] = (*spec, *DEFAULTS[len(spec) :])
    before, offset, output, sum_of, width, group, backend, enable_pdl, splits = arguments
    variant = spec_of(has_weight, before, offset, output, sum_of, width, group)
    asked, plain = (ops.bind_fused_add_rms_norm_(variant, backend, pdl) for pdl in (enable_pdl, False))
    return variant, dispatch.requested_backend(backend), asked, plain, finder_of(splits)


def check(rows: torch.Tensor, matrix: torch.Tensor) -> None:
    """Raise UnsupportedInput for operands that make no product; the norm's own are checked where it is called."""
    if (
        rows.dim() != 2
        or matrix.dim() != 2
        or rows.shape[1] != matrix.shape[1]
        or rows.dtype != matrix.dtype
        or rows.device != matrix.device
    ):
        got = (f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in (rows, matrix))
        raise UnsupportedInput(
            NAME, " times ".join(got), "rows [M, K] and a matrix [N, K] of one dtype on one device", "correct the call"
        )


def _for_result(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """What takes the place of the product, which the norm reads and overwrites."""
    return rows.new_empty(rows.shape[0], matrix.shape[0])


def _fake(rows, matrix, residual, weight, eps, *spec):  # type: ignore[no-untyped-def]
    check(rows, matrix)
    normed = _for_result(rows, matrix)
    operands.check_in_place(normed, residual, weight, _bound(weight is not None, *spec)[0], NAME)
    return normed


_LIBRARY = register("FRAGMENT", {NAME: (SCHEMA, _linear_fused_add_rms_norm_, _fake)})
"""Kept for the life of the process."""
