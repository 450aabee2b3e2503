"""The Triton kernel: for devices without the CUDA kernel, and for CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.bindings import by_variant
from ...backends.triton import backend
from ...backends.triton.row_kernel import RowKernel
from ...numerics.quantisation import GROUP, QuantSpec
from ...numerics.spec import NormSpec
from .kernel import Operands, Results, new_results, norm_of, scale_strides

MODULE = "rms_norm_quantised"
LEAN_FROM = 32768
"""Columns of a program from which its fp32 results would take half of a multiprocessor's registers. Its rows are kept
as they came, and what is quantised is computed twice."""
KEPT_SUMS = 3
"""Chunks of fp32 sums that stay in registers where some are read again: the norm's own four leave too few here."""


def bound(
    spec: NormSpec, quant: QuantSpec, fused_add: bool, both: bool, dependent: bool | None = None
) -> BoundPortable:
    """As `kernel.bound`."""
    return _bound(quant, fused_add, both, spec, dependent=dependent)


@by_variant
def _bound(quant: QuantSpec, fused_add: bool, both: bool, spec: NormSpec, dependent: bool) -> BoundPortable:
    return BoundPortable(spec, quant, fused_add, both, dependent)


def constants(layout: backend.Layout, spec: NormSpec, quant: QuantSpec, fused_add: bool, both: bool) -> dict[str, Any]:
    """The kernel's compile-time constants but NESTED and GIVEN."""
    names = ("N", "WIDTH", "VEC", "ROWS", "BLOCK", "CHUNKS", "HAS_WEIGHT", "OFFSET", "ROUNDED", "PRODUCT", "OUT")
    schedule = layout.schedule
    lean = schedule.rows * schedule.block * schedule.chunks >= LEAN_FROM
    streamed = schedule.streamed
    if streamed and layout.wide_sum:
        streamed = max(streamed, schedule.chunks - KEPT_SUMS)
    return {
        **{name: layout.constants[name] for name in (*names, "PACKED", "DEPENDENT")},
        "STREAMED": streamed,
        "LEAN": lean,
        "ROUND_SUM": spec.sum == "rounded",
        "FUSED_ADD": fused_add,
        **quant_constants(quant, layout),
        "BOTH": both,
    }


def quant_constants(quant: QuantSpec, layout: backend.Layout) -> dict[str, Any]:
    """Those of a quantisation of such rows."""
    arithmetic, n = quant.arithmetics, layout.columns
    return {
        "GROUP": {"fp8_static": 0, "fp8_block": GROUP if n > GROUP else n}.get(quant.scheme, n),
        "INT8": quant.dtype == torch.int8,
        "LIMIT": quant.limit,
        "STEP": arithmetic.step,
        "NOT_A_NUMBER": arithmetic.not_a_number,
        "LARGEST_AT_LEAST": arithmetic.largest_at_least,
        "SCALE_AT_LEAST": arithmetic.scale_at_least,
        "ROUNDED_SCALE_AT_LEAST": arithmetic.rounded_scale_at_least,
        "POWER_OF_TWO": quant.power_of_two,
        "FROM_F32": quant.value == "fp32",
        "APPROXIMATE": layout.nvidia and arithmetic.step == "inverse_first",
    }


class BoundPortable:
    """f(operands) -> results, as `kernel.BoundQuantised`."""

    def __init__(self, spec: NormSpec, quant: QuantSpec, fused_add: bool, both: bool, dependent: bool) -> None:
        self.spec = spec
        self.quant = quant
        self.both = both
        self.fused_add = fused_add
        self.kernel = RowKernel(MODULE, norm_of(fused_add), spec, dependent)

    def __call__(self, operands: Operands) -> Results:
        x, residual, weight, given, eps = operands
        results = new_results(x, weight, self.spec, self.quant, self.both)
        if not x.numel():
            return results
        layout = self.kernel.layout(x, weight)
        (placed, total), rows = backend.place_rows(layout, x, x if residual is None else residual)
        quantised, scales, normed = results
        taken = (
            placed,
            total,
            placed if weight is None else backend.aligned(weight, layout),
            placed if given is None else given,
            quantised.view(torch.uint8),
            scales if scales.numel() else placed,
            normed if self.both else placed,
            eps,
        )
        made = constants(layout, self.spec, self.quant, self.fused_add, self.both) | {"GIVEN": given is not None}
        self.kernel.start(layout, x, taken, rows, made, scale_strides(scales, self.quant))
        if residual is not None and total is not residual:
            residual.copy_(total)
        return results
