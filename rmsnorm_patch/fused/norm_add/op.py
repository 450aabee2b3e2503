"""A norm, the residual-add behind it, and the norm that reads the sum: what sandwich layouts run around each sub-layer.

    rms_norm_add(x, residual, weight?, eps, ...)                                          -> sum
    rms_norm_add_rms_norm(x, residual, weight?, eps, next_weight?, next_eps, ...)         -> (normed, sum)

sum = norm(x) + residual; normed = the norm of that sum with `next_weight` and `next_eps`. x, residual: [..., N] of one
dtype; weights: [N], of one dtype, or both None. The other arguments are `ops.spec_args`: both norms have one spec,
whose result has x's dtype. normed and sum are contiguous.

Every step is rounded as the separate ops round it: the bits are those of `rms_norm` and `fused_add_rms_norm`, which
reads the sum as the spec's `sum` says. With "rounded" they are those of an addition and `rms_norm` too. `kernel.py` and
`portable.py` do all in one launch. Where the norms' own kernels have other reduction trees than theirs, the op runs
those norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ... import ops
from ...backends.bindings import kept
from ...backends.launch_mode import dependent
from ...backends.names import BACKENDS, Backend
from ...errors import UnsupportedInput
from ...numerics import operands, reference
from ...numerics.contract import IMPLIED_EPS, SPEC_ARGUMENTS
from ...numerics.spec import NormSpec
from ...ops import dispatch, listeners
from ...ops.library import of_arguments, positional, register

NORM_ADD, NORM_ADD_NORM = "rms_norm_add", "rms_norm_add_rms_norm"
_REST = SPEC_ARGUMENTS.removeprefix("float? eps, ")
SCHEMAS = {
    NORM_ADD: f"(Tensor x, Tensor residual, Tensor? weight, float? eps, {_REST}) -> Tensor",
    NORM_ADD_NORM: "(Tensor x, Tensor residual, Tensor? weight, float? eps, Tensor? next_weight, float? next_eps, "
    f"{_REST}) -> (Tensor, Tensor)",
}
Call = Callable[..., Any]


def bind_norm_add(spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> BoundNormAdd:
    """f(x, residual, weight, eps) -> sum. UnsupportedInput for a value of RMSNORM_PATCH_PDL that is none."""
    return bind(NORM_ADD, spec, backend, enable_pdl)


def bind_norm_add_norm(spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> BoundNormAdd:
    """f(x, residual, weight, eps, next_weight, next_eps) -> (normed, sum). Errors as `bind_norm_add`."""
    return bind(NORM_ADD_NORM, spec, backend, enable_pdl)


def bind(op: str, spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> BoundNormAdd:
    """The callable of NORM_ADD or NORM_ADD_NORM: one object for each variant, backend and mode, and for each value of
    RMSNORM_PATCH_BACKEND, which is read here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}")
    if op == NORM_ADD:  # no norm reads its sum
        spec = replace(spec, sum="rounded")
    return _bound(op, spec.variant, backend, dependent(enable_pdl), dispatch.variable_for(backend))


@kept
def _bound(op: str, variant: NormSpec, backend: Backend, pdl: bool, variable: str) -> BoundNormAdd:
    """variable: what the norms, which are bound with it, read."""
    return BoundNormAdd(op, variant, backend, pdl)


class BoundNormAdd:
    """One of the two ops, bound to a numerics variant and a backend; called as the op without the spec's arguments.

    table: what launcher.c knows of it once a call was served by CUDA kernels that it starts; else None.
    """

    def __init__(self, op: str, spec: NormSpec, backend: Backend, pdl: bool) -> None:
        self.op = op
        self.spec = spec
        self.backend = backend
        self.dependent = pdl
        self.table: object | None = None
        self.plain = ops.bind_rms_norm(spec, backend, pdl)
        self.fused = ops.bind_fused_add_rms_norm(spec, backend, pdl)
        self._routes: dict[tuple[Any, ...], tuple[str, Call]] = {}
        self._bound: dict[str, tuple[Call, object | None]] = {}

    def __repr__(self) -> str:
        return f"BoundNormAdd({self.op!r}, {self.spec!r}, backend={self.backend!r})"

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, *rest: Any) -> Any:
        """rest: eps, and for NORM_ADD_NORM next_weight and next_eps. Raises UnsupportedInput."""
        run = self._route(x, weight)[1]
        result = run(x, residual, weight, *rest)
        if listeners.active and run != self._apart:  # the norms that it runs apart tell of themselves
            made = result[0] if isinstance(result, tuple) else result
            listeners.tell(listeners.Call(self.op, self.spec, self.dependent, x, weight, made))
        return result

    def backend_for(self, x: torch.Tensor, weight: torch.Tensor | None) -> str:
        """What a call with `x` runs: "cuda" or "triton", in one launch or by the norms' own ops; or "reference"."""
        return self.plain.backend_for(x, weight)

    def why_apart(self, x: torch.Tensor, weight: torch.Tensor | None) -> str:
        """Why a call with `x` runs the norms' own ops; "" where it is one launch, or the reference."""
        backend = self.backend_for(x, weight)
        if backend == "reference":
            return ""
        if self.fused.backend_for(x, weight, x) != backend:
            return "the norm and the fused add have different backends"
        module = _module(backend)
        return module.cannot_serve(self.spec, x, weight)  # type: ignore[no-any-return]

    def warmup(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Compile what calls with rows like those of `x` need, by one call on zeros; where the op runs the norms' own
        ops, theirs."""
        rows = torch.zeros(2, x.shape[-1], dtype=x.dtype, device=x.device)
        if self.spec.output_dtype(x.dtype, None if weight is None else weight.dtype) == x.dtype:
            self(rows, rows, weight, 1e-6, *((weight, 1e-6) if self.op == NORM_ADD_NORM else ()))

    def check(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float | None,
        next_weight: torch.Tensor | None = None,
        next_eps: float | None = None,
    ) -> None:
        """Raise UnsupportedInput for operands that the op does not take."""
        operands.check_fused_add(x, residual, weight, self.spec, self.op)
        made = self.spec.output_dtype(x.dtype, None if weight is None else weight.dtype)
        if made != x.dtype:
            raise UnsupportedInput(
                self.op,
                f"a norm that gives {made} for x of dtype {x.dtype}",
                "norms whose result has x's dtype",
                "norm first, then add",
            )
        if self.op == NORM_ADD_NORM:
            operands.check_rms_norm(x, next_weight, self.spec, self.op)
            one, other = (None if each is None else each.dtype for each in (weight, next_weight))
            if one != other:
                raise UnsupportedInput(
                    self.op, f"weights of dtype {one} and {other}", "weights of one dtype", "cast one of them"
                )

    def _route(self, x: torch.Tensor, weight: torch.Tensor | None) -> tuple[str, Call]:
        """By (dtypes, N, device), never by the number of rows, as in `ops.Bound`."""
        key = (x.dtype, x.shape[-1:], None if weight is None else weight.dtype, x.device)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._new_route(x, weight)
        return route

    def _new_route(self, x: torch.Tensor, weight: torch.Tensor | None) -> tuple[str, Call]:
        operands.check_rms_norm(x, weight, self.spec, self.op)
        backend = self.backend_for(x, weight)
        if backend == "reference":
            return backend, self._reference
        if self.why_apart(x, weight):
            return backend, self._apart
        if backend not in self._bound:  # one table for all routes: launcher.c looks into the first that it is told of
            self._bound.setdefault(backend, _module(backend).bind(self, self.dependent))
        call, table = self._bound[backend]
        self.table = table or self.table
        return backend, call

    def _reference(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float | None,
        *following: Any,
    ) -> Any:
        self.check(x, residual, weight, eps, *following)
        eps = IMPLIED_EPS if eps is None else eps
        if not following:
            return reference.norm_add(x, residual, weight, self.spec, eps).contiguous()
        next_weight, next_eps = following
        next_eps = IMPLIED_EPS if next_eps is None else next_eps
        normed, total = reference.norm_add_norm(x, residual, weight, next_weight, self.spec, eps, next_eps)
        return normed.contiguous(), total.contiguous()

    def _apart(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float | None,
        *following: Any,
    ) -> Any:
        self.check(x, residual, weight, eps, *following)
        normed = self.plain(x, weight, eps)
        if following:
            return self.fused(normed, residual, *following)
        return normed.add_(residual)


def _module(backend: str) -> Any:
    """Imported when it is first needed, since Triton may be missing."""
    if backend == "cuda":
        from . import kernel

        return kernel
    from . import portable

    return portable


_bound_of = of_arguments(bind)


def _bound_for(op: str, weight: object, rest: tuple[Any, ...], named: dict[str, Any]) -> BoundNormAdd:
    return _bound_of(op, weight is not None, *positional(rest, named))


def _norm_add(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    bound = _bound_for(NORM_ADD, weight, spec, named)
    return bound(x, residual, weight, eps)


def _norm_add_norm(x, residual, weight, eps, next_weight, next_eps, *spec, **named):  # type: ignore[no-untyped-def]
    bound = _bound_for(NORM_ADD_NORM, weight, spec, named)
    return bound(x, residual, weight, eps, next_weight, next_eps)


def _fake_norm_add(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    _bound_for(NORM_ADD, weight, spec, named).check(x, residual, weight, eps)
    return x.new_empty(x.shape)


def _fake_norm_add_norm(x, residual, weight, eps, next_weight, next_eps, *spec, **named):  # type: ignore[no-untyped-def]
    bound = _bound_for(NORM_ADD_NORM, weight, spec, named)
    bound.check(x, residual, weight, eps, next_weight, next_eps)
    return x.new_empty(x.shape), x.new_empty(x.shape)


_LIBRARY = register(
    "FRAGMENT",
    {
        NORM_ADD: (SCHEMAS[NORM_ADD], _norm_add, _fake_norm_add),
        NORM_ADD_NORM: (SCHEMAS[NORM_ADD_NORM], _norm_add_norm, _fake_norm_add_norm),
    },
)
"""Kept for the life of the process."""
