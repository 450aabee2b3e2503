"""The Triton kernel: for devices without the CUDA kernel, and for CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.bindings import by_variant
from ...backends.triton import backend, loader
from ...numerics.contract import RMS_NORM
from ...numerics.gating import GateSpec
from ...numerics.spec import NormSpec
from .kernel import new_result

MODULE = "rms_norm_gated"


def bound(spec: NormSpec, gating: GateSpec, enable_pdl: bool | None = None) -> BoundPortable:
    """As `kernel.bound`, for gates of any dtype."""
    return _bound(gating, spec, enable_pdl=enable_pdl)


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
        self.dependent = dependent
        self._layouts: dict[tuple[Any, ...], backend.Layout] = {}

    def _layout(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None) -> backend.Layout:
        dtype = None if weight is None else weight.dtype
        key = (x.dtype, gate.dtype, x.shape[-1], dtype, x.device)
        if key not in self._layouts:
            target = backend.Target.of(x.device, self.dependent)
            self._layouts[key] = backend.Layout(RMS_NORM.name, self.spec, x.dtype, x.shape[-1], dtype, target)
        return self._layouts[key]

    def __call__(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        normed = new_result(x, weight, self.spec, self.gating)
        if not x.numel():
            return normed
        layout = self._layout(x, gate, weight)
        (placed, gates), (rows, gate_rows) = backend.place_rows(layout, x, gate)
        strides = (stride // layout.vec for where in (rows, gate_rows) for stride in where[1:])
        function = getattr(loader.load(MODULE, interpreted=not x.is_cuda), MODULE)
        with torch.cuda.device_of(x):
            function[(-(-(x.numel() // layout.columns) // layout.schedule.rows), 1, 1)](
                placed,
                gates,
                placed if weight is None else backend.aligned(weight, layout),
                normed,
                eps,
                x.numel() // layout.columns,
                rows.inner,
                *strides,
                NESTED=rows.inner > 1,
                **constants(layout, self.gating),
                **layout.options,
            )
        return normed
