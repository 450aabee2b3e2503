"""The Triton kernel: for devices without the CUDA kernel, and for CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.bindings import by_variant
from ...backends.triton import backend
from ...backends.triton.row_kernel import RowKernel
from ...numerics.contract import RMS_NORM
from ...numerics.gating import GateSpec
from ...numerics.spec import NormSpec
from .kernel import new_result

MODULE = "rms_norm_gated"


def bound(spec: NormSpec, gating: GateSpec, dependent: bool | None = None) -> BoundPortable:
    """As `kernel.bound`, for gates of any dtype."""
    return _bound(gating, spec, dependent=dependent)


@by_variant
def _bound(gating: GateSpec, spec: NormSpec, dependent: bool) -> BoundPortable:
    return BoundPortable(spec, gating, dependent)


def constants(layout: backend.Layout, gating: GateSpec) -> dict[str, Any]:
    """The kernel's compile-time constants but NESTED."""
    names = ("N", "WIDTH", "VEC", "ROWS", "BLOCK", "CHUNKS", "GROUPS", "HAS_WEIGHT", "OFFSET", "ROUNDED", "PRODUCT")
    return {
        **{name: layout.constants[name] for name in (*names, "OUT", "DEPENDENT")},
        "GATE_FIRST": gating.order == "gate_first",
        "ACTIVATION": gating.activation,
    }


class BoundPortable:
    """f(x, gate, weight, eps), as `kernel.BoundGated`."""

    def __init__(self, spec: NormSpec, gating: GateSpec, dependent: bool) -> None:
        self.spec = spec
        self.gating = gating
        self.kernel = RowKernel(MODULE, RMS_NORM.name, spec, dependent)

    def __call__(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        normed = new_result(x, weight, self.spec, self.gating)
        if x.numel():
            layout = self.kernel.layout(x, weight)
            (placed, gates), rows = backend.place_rows(layout, x, gate)
            own = placed if weight is None else backend.aligned(weight, layout)
            operands = placed, gates, own, normed, eps
            self.kernel.start(layout, x, operands, rows, constants(layout, self.gating))
        return normed
