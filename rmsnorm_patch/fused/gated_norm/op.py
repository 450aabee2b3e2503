"""The gated norm as an op of graphs, and as a callable for eager code.

    rms_norm_gated(x, gate, weight?, activation, order, eps, ...) -> normed

x, gate: [..., N] of fp16, bf16 or fp32 each, any strides; weight: [N] or None. activation, order: of a `GateSpec`. The
arguments after eps are `ops.spec_args`. The result is contiguous, of the shape of x, of `GateSpec.output_dtype`.
There is no backward: under grad patched modules use the original arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import ops
from ...backends import launch_mode
from ...backends.bindings import kept
from ...backends.names import Backend
from ...numerics.contract import IMPLIED_EPS, SPEC_ARGUMENTS
from ...numerics.gating import GateSpec, check_gated, gated_rms_norm
from ...numerics.spec import NormSpec
from ...ops import dispatch, listeners
from ...ops.library import positional, register, spec_of
from . import kernel

NAME = "rms_norm_gated"
SCHEMA = f"(Tensor x, Tensor gate, Tensor? weight, str activation, str order, {SPEC_ARGUMENTS}) -> Tensor"


def bind(spec: NormSpec, gating: GateSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> Bound:
    """f(x, gate, weight, eps) -> normed: one object for each variant, backend and mode, and for each value of
    RMSNORM_PATCH_BACKEND, which is read here. eps=None is fp32's epsilon. UnsupportedInput for a value of
    RMSNORM_PATCH_PDL that is none."""
    return _bound(spec.variant, gating, backend, launch_mode.dependent(enable_pdl), dispatch.variable_for(backend))


@kept
def _bound(spec: NormSpec, gating: GateSpec, backend: Backend, dependent: bool, variable: str) -> Bound:
    return Bound(spec, gating, backend, dependent, variable)


class Bound:
    """The gated norm of one numerics variant on one backend.

    An instance, not a function: held as a class attribute it does not turn into a method.
    """

    def __init__(self, spec: NormSpec, gating: GateSpec, backend: Backend, dependent: bool, variable: str) -> None:
        """variable: what RMSNORM_PATCH_BACKEND says for backend "auto"."""
        self.spec = spec
        self.gating = gating
        self.backend = backend
        self.dependent = dependent
        self._arguments = ops.spec_args(spec, backend, dependent)
        self._variable = variable
        self._routes: dict[tuple[Any, ...], tuple[str, Callable[..., torch.Tensor]]] = {}

    def __repr__(self) -> str:
        return f"Bound({NAME!r}, {self.spec!r}, {self.gating!r}, backend={self.backend!r})"

    def __call__(
        self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> torch.Tensor:
        weight = weight if self.spec.has_weight else None
        _, run = self._route(x, gate, weight)
        if gate.shape != x.shape or gate.device != x.device or (weight is not None and weight.device != x.device):
            check_gated(x, gate, weight, self.spec, NAME)
        normed = run(x, gate, weight, IMPLIED_EPS if eps is None else eps)
        if listeners.active:
            more = {"activation": self.gating.activation, "order": self.gating.order}
            listeners.tell(listeners.Call(NAME, self.spec, self.dependent, x, weight, normed, more))
        return normed

    def traced(
        self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> torch.Tensor:
        """The call as the op of a graph."""
        op = getattr(getattr(torch.ops, ops.NAMESPACE), NAME).default
        gating = self.gating
        return op(x, gate, weight, gating.activation, gating.order, eps, *self._arguments)  # type: ignore[no-any-return]

    def backend_for(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None) -> str:
        """ "cuda", "triton" or "reference": what serves such a call, whatever its number of rows. KernelBuildError
        where a forced backend does not."""
        return self._route(x, gate, weight if self.spec.has_weight else None)[0]

    def prepare(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None) -> str:
        """Compile what serves contiguous rows like those of `x`, and name the backend."""
        backend, run = self._route(x, gate, weight)
        if isinstance(run, kernel.BoundGated):
            run.prepare(x, weight)
        elif backend == "triton":
            run(torch.zeros_like(x), torch.zeros_like(gate), weight, 1e-6)
        return backend

    def _route(
        self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None
    ) -> tuple[str, Callable[..., torch.Tensor]]:
        shape = None if weight is None else weight.shape
        key = (x.dtype, gate.dtype, x.shape[-1:], None if weight is None else weight.dtype, shape, x.device)
        route = self._routes.get(key)
        if route is None:
            check_gated(x, gate, weight, self.spec, NAME)
            route = self._routes[key] = self._new_route(x, gate)
        return route

    def _new_route(self, x: torch.Tensor, gate: torch.Tensor) -> tuple[str, Callable[..., torch.Tensor]]:
        asked = dispatch.requested_backend(self.backend, self._variable)
        supported = "rows of a multiple of 16 bytes on sm_80 and newer"
        backend = dispatch.serving(NAME, asked, x.device, lambda: kernel.serves(self.spec, x), supported)
        if backend == "cuda":
            return backend, kernel.bound(self.spec, self.gating, gate.dtype, self.dependent)
        if backend == "triton":
            from . import portable

            return backend, portable.bound(self.spec, self.gating, self.dependent)
        return backend, self._reference

    def _reference(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return gated_rms_norm(x, gate, weight, self.spec, self.gating, eps).contiguous()


@kept
def _of_arguments(has_weight: bool, activation: str, order: str, *options: Any) -> Bound:
    *spec, backend, enable_pdl = options
    return bind(spec_of(has_weight, *spec), GateSpec(activation, order), backend, enable_pdl)  # type: ignore[arg-type]


def _variant(weight: object, activation: str, order: str, rest: tuple[Any, ...], named: dict[str, Any]) -> Bound:
    return _of_arguments(weight is not None, activation, order, *positional(rest, named))


def _run(x, gate, weight, activation, order, eps, *rest, **named):  # type: ignore[no-untyped-def]
    return _variant(weight, activation, order, rest, named)(x, gate, weight, eps)


def _fake(x, gate, weight, activation, order, eps, *rest, **named):  # type: ignore[no-untyped-def]
    bound = _variant(weight, activation, order, rest, named)
    check_gated(x, gate, weight, bound.spec, NAME)
    return kernel.new_result(x, weight, bound.spec, bound.gating)


_LIBRARY = register("FRAGMENT", {NAME: (SCHEMA, _run, _fake)})
"""Kept for the life of the process."""
