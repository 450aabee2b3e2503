"""`torch.ops.rmsnorm_patch.*`: the plain ops as graphs hold them, registered from the rows of `numerics.contract`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..backends.bindings import kept
from ..numerics.contract import FUNCTIONAL, PLAIN_OPS, PlainOp
from ..numerics.spec import NormSpec
from .bound import Bound, bind

NAMESPACE = "rmsnorm_patch"


@kept
def _bound_of(
    op: str,
    has_weight: bool,
    round_before_weight: str,
    weight_offset: str,
    output: str,
    sum: str,
    width: int | None,
    group: int | None,
    backend: str,
    enable_pdl: bool,
) -> Bound:
    spec = NormSpec(0.0, round_before_weight, weight_offset, has_weight, output, sum, width, group)  # type: ignore[arg-type]
    return bind(op, spec, backend, enable_pdl)


_DEFAULTS = ("input", "none", "promote", "rounded", None, None, "auto", True)


def _bound_for(op: str, weight: torch.Tensor | None, spec: tuple[Any, ...]) -> Bound:
    return _bound_of(op, weight is not None, *spec, *_DEFAULTS[len(spec) :])


_NAMES = ("round_before_weight", "weight_offset", "output", "sum", "width", "group", "backend", "enable_pdl")


def _positional(spec: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    if not named:
        return spec
    return spec + tuple(
        named.get(name, default) for name, default in zip(_NAMES[len(spec) :], _DEFAULTS[len(spec) :], strict=True)
    )


def _implementation(op: PlainOp) -> Callable[..., Any]:
    """What runs the op; the parameters have the schema's names, since a tracer may pass any of them by name."""

    name = op.name

    def plain(x, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
        return _bound_for(name, weight, _positional(spec, named))(x, weight, eps)

    def with_residual(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
        return _bound_for(name, weight, _positional(spec, named))(x, residual, weight, eps)

    return with_residual if op.fused_add else plain


def _fake(op: PlainOp) -> Callable[..., Any]:
    def fake(tensors, spec, named):  # type: ignore[no-untyped-def]
        numerics = _bound_for(op.name, tensors[-1], _positional(spec, named)).spec
        op.check(*tensors, numerics, op.name)
        return op.fake(*tensors, numerics)

    def plain(x, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
        return fake((x, weight), spec, named)

    def with_residual(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
        return fake((x, residual, weight), spec, named)

    return with_residual if op.fused_add else plain


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The functional ops as reference arithmetic: a table for `make_fx`, `run_decompositions` and AOTAutograd."""

    def decompose(op: PlainOp) -> Callable[..., Any]:
        tensors = op.operands + 1

        def run(*args: Any, **named: Any) -> Any:
            bound = _bound_for(op.name, args[tensors - 1], _positional(args[tensors + 1 :], named))
            return bound._reference(*args[: tensors + 1])

        return run

    return {getattr(torch.ops.rmsnorm_patch, name).default: decompose(PLAIN_OPS[name]) for name in FUNCTIONAL}


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, op in PLAIN_OPS.items():
        library.define(name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            library.impl(name, _implementation(op), key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake(op), lib=library)
    return library


_LIBRARY = _register()
"""Kept for the life of the process: a Library takes its ops with it."""
