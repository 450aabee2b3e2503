"""`torch.ops.rmsnorm_patch.*`: the plain ops as graphs hold them, registered from the rows of `numerics.contract`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch

from ..backends.bindings import kept
from ..numerics.contract import FUNCTIONAL, PLAIN_OPS, PlainOp
from ..numerics.spec import NormSpec
from .bound import Bound, bind, spec_args

NAMESPACE = "rmsnorm_patch"
B = TypeVar("B")

OPTIONS = ("round_before_weight", "weight_offset", "output", "sum", "width", "group", "backend", "enable_pdl")
"""The arguments behind eps of every op here and in `fused`: a spec, then how it is served."""
DEFAULTS = spec_args(NormSpec())

Registered = Mapping[str, tuple[str, Callable[..., Any], Callable[..., Any]]]
"""Name of an op -> its schema, what runs it, what runs it on fake tensors."""


def register(kind: Literal["DEF", "FRAGMENT"], made: Registered) -> torch.library.Library:
    """The ops of a module, for the CPU and CUDA. The caller keeps the Library, which takes its ops with it."""
    library = torch.library.Library(NAMESPACE, kind)
    for name, (schema, run, fake) in made.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            library.impl(name, run, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


def positional(
    given: tuple[Any, ...],
    named: dict[str, Any] | None,
    names: tuple[str, ...] = OPTIONS,
    defaults: tuple[Any, ...] = DEFAULTS,
) -> tuple[Any, ...]:
    """All of the arguments `names`: those `given` by position, and of the others what a tracer passed by name."""
    if not named:
        return given + defaults[len(given) :]
    missing = zip(names[len(given) :], defaults[len(given) :], strict=True)
    return given + tuple(named.get(name, default) for name, default in missing)


def spec_of(
    has_weight: bool,
    round_before_weight: str,
    weight_offset: str,
    output: str,
    sum: str,
    width: int | None,
    group: int | None,
) -> NormSpec:
    """The numerics that arguments of an op describe; eps is an argument of its own."""
    return NormSpec(0.0, round_before_weight, weight_offset, has_weight, output, sum, width, group)  # type: ignore[arg-type]


def of_arguments(bind: Callable[..., B]) -> Callable[..., B]:
    """f(op, has_weight, *options): what `bind` binds for the arguments behind eps (OPTIONS), at their first call, until
    `ops.forget`. bind: as that of the plain ops."""

    @kept
    def bound_of(op: str, has_weight: bool, *options: Any) -> B:
        *spec, backend, enable_pdl = options
        return bind(op, spec_of(has_weight, *spec), backend, enable_pdl)

    return bound_of


_bound_of = of_arguments(bind)


def bound_for(
    op: str, weight: torch.Tensor | None, given: tuple[Any, ...], named: dict[str, Any] | None = None
) -> Bound:
    """What a plain op runs for such arguments behind eps."""
    return _bound_of(op, weight is not None, *positional(given, named))


def _implementation(op: PlainOp) -> Callable[..., Any]:
    """What runs the op; the parameters have the schema's names, since a tracer may pass any of them by name."""

    name = op.name

    def plain(x, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
        return bound_for(name, weight, spec, named).run(x, weight, eps)

    def with_residual(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
        return bound_for(name, weight, spec, named).run(x, residual, weight, eps)

    return with_residual if op.fused_add else plain


def _fake(op: PlainOp) -> Callable[..., Any]:
    def fake(tensors, spec, named):  # type: ignore[no-untyped-def]
        numerics = bound_for(op.name, tensors[-1], spec, named).spec
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
            bound = bound_for(op.name, args[tensors - 1], args[tensors + 1 :], named)
            return bound._reference(*args[: tensors + 1])

        return run

    return {getattr(torch.ops.rmsnorm_patch, name).default: decompose(PLAIN_OPS[name]) for name in FUNCTIONAL}


_LIBRARY = register("DEF", {name: (op.schema, _implementation(op), _fake(op)) for name, op in PLAIN_OPS.items()})
"""Kept for the life of the process."""
