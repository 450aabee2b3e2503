"""The Triton kernel: for devices without the CUDA kernel, and for CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.bindings import kept
from ...backends.triton import backend
from ...backends.triton.row_kernel import RowKernel
from ...numerics.contract import RMS_NORM
from ...numerics.quantisation import QuantSpec
from ...numerics.silu import Silu
from ..norm_quantised.kernel import scale_strides
from ..norm_quantised.portable import quant_constants
from .kernel import SPEC, Results, new_results

MODULE = "silu_and_mul_quantised"


@kept
def bound(silu: Silu, quant: QuantSpec, dependent: bool) -> BoundPortable:
    """As `kernel.bound`, of any N."""
    return BoundPortable(silu, quant, dependent)


def constants(layout: backend.Layout, silu: Silu, quant: QuantSpec) -> dict[str, Any]:
    """The kernel's compile-time constants but NESTED and GIVEN."""
    names = ("N", "VEC", "ROWS", "BLOCK", "CHUNKS", "DEPENDENT")
    return {**{name: layout.constants[name] for name in names}, "SILU": silu, **quant_constants(quant, layout)}


class BoundPortable:
    """f(x, given) -> results, as `kernel.BoundSilu`."""

    def __init__(self, silu: Silu, quant: QuantSpec, dependent: bool) -> None:
        self.silu = silu
        self.quant = quant
        self.kernel = RowKernel(MODULE, RMS_NORM.name, SPEC, dependent)

    def __call__(self, x: torch.Tensor, given: torch.Tensor | None) -> Results:
        quantised, scales = results = new_results(x, self.quant)
        if not x.numel():
            return results
        gates, ups = x.chunk(2, -1)
        layout = self.kernel.layout(gates, None)
        (gates, ups), rows = backend.place_rows(layout, gates, ups)
        taken = (
            gates,
            ups,
            gates if given is None else given,
            quantised.view(torch.uint8),
            scales if scales.numel() else gates,
        )
        made = constants(layout, self.silu, self.quant) | {"GIVEN": given is not None}
        self.kernel.start(layout, gates, taken, rows, made, scale_strides(scales, self.quant))
        return results
