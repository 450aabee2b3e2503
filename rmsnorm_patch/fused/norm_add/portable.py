"""The Triton kernel: for devices without the CUDA kernel, and for CPU tensors under TRITON_INTERPRET=1.

Both of Triton's norms must have one schedule for the row length, since that is the order in which they add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...backends.triton import backend
from ...backends.triton.row_kernel import RowKernel
from ...numerics.contract import FUSED_ADD, IMPLIED_EPS, RMS_NORM
from ...numerics.spec import NormSpec

MODULE = "rms_norm_add"
_NAMES = ("N", "WIDTH", "VEC", "ROWS", "BLOCK", "CHUNKS", "HAS_WEIGHT", "OFFSET", "ROUNDED", "PRODUCT", "OUT", "PACKED")


def layouts(spec: NormSpec, x: torch.Tensor, weight: torch.Tensor | None, dependent: bool) -> list[backend.Layout]:
    """Those of `rms_norm` and `fused_add_rms_norm` for rows like those of `x`."""
    target, dtype = backend.Target.of(x.device, dependent), None if weight is None else weight.dtype
    return [backend.Layout(name, spec, x.dtype, x.shape[-1], dtype, target) for name in (RMS_NORM.name, FUSED_ADD.name)]


def cannot_serve(spec: NormSpec, x: torch.Tensor, weight: torch.Tensor | None) -> str:
    """Why no kernel gives the norms' own bits for rows like those of `x`; "" if one does."""
    if spec.group is not None:
        return f"groups of {spec.group} columns"
    plain, fused = (layout.schedule for layout in layouts(spec, x, weight, True))
    if plain.streamed or fused.streamed:
        return f"rows of {x.shape[-1]} do not stay in registers"
    order = ("rows", "block", "chunks", "num_warps")
    unlike = [name for name in order if getattr(plain, name) != getattr(fused, name)]
    return f"the norms' schedules differ in {', '.join(unlike)}" if unlike else ""


def constants(layout: backend.Layout, spec: NormSpec, following: bool) -> dict[str, Any]:
    """The kernel's compile-time constants but NESTED."""
    made = {name: layout.constants[name] for name in (*_NAMES, "DEPENDENT")}
    return {**made, "ROUND_SUM": spec.sum == "rounded", "NVIDIA": layout.nvidia, "NEXT": following}


def bind(op: Any, dependent: bool) -> tuple[Callable[..., Any], None]:
    """The callable of an `op.BoundNormAdd`; launcher.c starts no kernel of Triton's."""
    return BoundPortable(op, dependent), None


class BoundPortable:
    """f(x, residual, weight, eps) -> sum, or f(..., next_weight, next_eps) -> (normed, sum), as
    `kernel.BoundKernel`."""

    def __init__(self, op: Any, dependent: bool) -> None:
        self.op = op
        self.kernel = RowKernel(MODULE, FUSED_ADD.name, op.spec, dependent)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None, *following: Any
    ) -> Any:
        self.op.check(x, residual, weight, eps, *following)
        next_weight, next_eps = following or (weight, eps)
        total = backend.new_result(x, x.dtype)
        normed = backend.new_result(x, x.dtype) if following else total
        if x.numel():
            layout = self.kernel.layout(x, weight)
            (x, residual), rows = backend.place_rows(layout, x, residual)
            weights = (x if each is None else backend.aligned(each, layout) for each in (weight, next_weight))
            added = (IMPLIED_EPS if each is None else float(each) for each in (eps, next_eps))
            operands = x, residual, *weights, normed, total, *added
            self.kernel.start(layout, x, operands, rows, constants(layout, self.op.spec, bool(following)))
        return (normed, total) if following else total
