"""What a rewritten layer calls in place of `residual + norm(y)`, with the norm that reads the sum where there is one:
one call where the guards hold, else the norm as a module and what `layer_calls` does with the sum.

The three functions are as hot as those of `layer_calls`, and made alike: `native` first, then every check in Python.
`side` says which operand the norm `inner` is to norm, 0 for the left one.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from ..patch_state import STATE, unhooked
from . import layer_calls, native, observe
from .counts import CALLS, calls_of
from .handover import CARRIED, Carry, put
from .layer_calls import NormKernel, kernel_of, why_not

_is_tracing = torch.compiler.is_dynamo_compiling
_Two = tuple[torch.Tensor, torch.Tensor]


def norm_add(inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, one of which `inner` norms before."""
    if not _is_tracing():
        total: torch.Tensor | None = native.norm_add(inner, side, a, b)
        if total is None:
            return _norm_add(inner, side, a, b)
        try:  # noqa: SIM105 - suppress() costs more than the count
            inner.__dict__[STATE][CALLS].added += 1
        except KeyError:
            pass
        if observe.active:
            _report(inner, side, a, b, total, "cuda")
        return total
    a, b = _normed(inner, side, a, b)
    return a + b


def norm_add_norm(norm: nn.Module, inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor) -> _Two:
    """(norm(sum), sum), the sum as of `norm_add`."""
    if _is_tracing():
        return layer_calls.in_layer(norm, *_normed(inner, side, a, b))
    done = native.norm_add_norm(norm, inner, side, a, b)
    if done is None:
        return _norm_add_norm(norm, inner, side, a, b)
    try:
        inner.__dict__[STATE][CALLS].added += 1
        norm.__dict__[STATE][CALLS].fused += 1
    except KeyError:
        pass
    normed, total = done
    if observe.active:
        given = _report(inner, side, a, b, None, "cuda")
        observe.report(observe.Event("in_layer", norm, given, normed, total, "cuda"))
    return normed, total


def norm_add_tail(layer: nn.Module, inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum as of `norm_add`; where the layer has a Link and the guards hold, with the next norm's result on it."""
    if _is_tracing():
        a, b = _normed(inner, side, a, b)
        return a + b
    total: torch.Tensor | None = native.norm_hand_over(layer, inner, side, a, b)
    if total is None:
        return _norm_add_tail(layer, inner, side, a, b)
    carried: Carry = total.__dict__[CARRIED]
    carried.link.given += 1
    try:  # noqa: SIM105
        inner.__dict__[STATE][CALLS].added += 1
    except KeyError:
        pass
    if observe.active:
        given = _report(inner, side, a, b, None, "cuda")
        observe.report(observe.Event("cross_layer", carried.norm, given, carried.normed, total, "cuda"))
    return total


def _norm_add(inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`norm_add` with every check in Python."""
    kernel = kernel_of(inner)
    reason = _why_apart(inner, kernel, side, a, b)
    if reason or kernel is None:
        a, b = _apart(inner, side, a, b, reason)
        return a + b
    x, residual = (a, b) if side == 0 else (b, a)
    if kernel.norm_add is None or not kernel.serves(x):
        a, b = _reference(inner, kernel, side, a, b)
        return a + b
    weight = kernel.weight_of(inner)
    total: torch.Tensor = kernel.norm_add(x, residual, weight, kernel.eps_of(inner))
    if kernel.norm_add.table is not None:
        native.enroll_norm_add(inner.__class__, kernel, kernel.norm_add.table, following=False)
    calls_of(inner).added += 1
    if observe.active:
        _report(inner, side, a, b, total, kernel.norm_add.backend_for(x, weight))
    return total


def _norm_add_norm(norm: nn.Module, inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor) -> _Two:
    """`norm_add_norm` with every check in Python."""
    kernel, following = kernel_of(inner), kernel_of(norm)
    reason = _why_apart(inner, kernel, side, a, b)
    if reason or kernel is None:
        return layer_calls.in_layer(norm, *_apart(inner, side, a, b, reason))
    x = (a, b)[side]
    if not kernel.serves(x):
        return layer_calls.in_layer(norm, *_reference(inner, kernel, side, a, b))
    apart = why_not(norm, following, a, b) or _unlike(kernel, following, inner, norm)
    if apart or following is None:
        total = _norm_add(inner, side, a, b)
        calls_of(norm).apart.add(apart)
        normed = norm(total)
        if observe.active:
            observe.report(observe.Event("in_layer", norm, (total,), normed, total, "original", apart))
        return normed, total
    normed, total = _run(kernel, inner, following, norm, side, a, b)
    calls_of(norm).fused += 1
    if observe.active:
        backend = following.plain.backend_for(x, following.weight_of(norm))
        given = _report(inner, side, a, b, None, backend)
        observe.report(observe.Event("in_layer", norm, given, normed, total, backend))
    return normed, total


def _norm_add_tail(layer: nn.Module, inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`norm_add_tail` with every check in Python."""
    link, norm = layer_calls.link_of(layer)
    if link is None or norm is None:
        return _norm_add(inner, side, a, b)
    kept = layer_calls.why_kept(layer, link, norm, a, b)
    kernel, following = kernel_of(inner), kernel_of(norm)
    reason = _why_apart(inner, kernel, side, a, b)
    if reason or kernel is None:
        return layer_calls.hand_over(link, norm, kept, *_apart(inner, side, a, b, reason))
    x = (a, b)[side]
    if not kernel.serves(x):
        return layer_calls.hand_over(link, norm, kept, *_reference(inner, kernel, side, a, b))
    kept = kept or why_not(norm, following, a, b) or _unlike(kernel, following, inner, norm)
    if kept or following is None:
        total = _norm_add(inner, side, a, b)
        calls_of(norm).apart.add(kept)
        if observe.active:
            observe.report(observe.Event("kept", norm, (total,), total, total, "original", kept))
        return total
    normed, total = _run(kernel, inner, following, norm, side, a, b)
    weight, backend = following.weight_of(norm), ""
    if observe.active:
        backend = following.plain.backend_for(x, weight)
        given = _report(inner, side, a, b, None, backend)
        observe.report(observe.Event("cross_layer", norm, given, normed, total, backend))
    put(normed, total, norm, weight, following.eps_of(norm), following, link, backend)
    return total


def _run(
    kernel: NormKernel,
    inner: nn.Module,
    following: NormKernel,
    norm: nn.Module,
    side: int,
    a: torch.Tensor,
    b: torch.Tensor,
) -> _Two:
    """(norm(sum), sum) in one call; the guards hold for both norms."""
    assert kernel.norm_add_norm is not None
    x, residual = (a, b) if side == 0 else (b, a)
    own, other = (
        (each.weight_of(module), each.eps_of(module)) for each, module in ((kernel, inner), (following, norm))
    )
    normed, total = kernel.norm_add_norm(x, residual, *own, *other)
    if kernel.norm_add_norm.table is not None:
        for each, module in ((kernel, inner), (following, norm)):
            native.enroll_norm_add(module.__class__, each, kernel.norm_add_norm.table, following=True)
    calls_of(inner).added += 1
    return normed, total


def _why_apart(inner: nn.Module, kernel: NormKernel | None, side: int, a: torch.Tensor, b: torch.Tensor) -> str:
    """Why the add behind `inner` is not one call with it, or ""."""
    if kernel is None or not unhooked(inner):
        return why_not(inner, kernel, a, b)
    x, residual = (a, b) if side == 0 else (b, a)
    if not kernel.serves(x):
        return ""
    reason = why_not(inner, kernel, x, residual)
    if reason:
        return reason
    weight = kernel.weight_of(inner)
    normed = kernel.spec.output_dtype(x.dtype, None if weight is None else weight.dtype)
    if x.dtype is not residual.dtype or normed is not x.dtype:
        return f"the norm makes {normed} of {x.dtype}, and adds {residual.dtype}: a kernel has one dtype for all three"
    return ""


def _unlike(kernel: NormKernel, following: NormKernel | None, inner: nn.Module, norm: nn.Module) -> str:
    """Why one kernel does not serve both norms, each of which one could; "" where it does."""
    if following is None or following.spec.variant != kernel.spec.variant or following.on_cpu != kernel.on_cpu:
        return "the norm of the sum has other numerics than the one behind which it stands"
    weights = kernel.weight_of(inner), following.weight_of(norm)
    one, other = (None if weight is None else weight.dtype for weight in weights)
    return "" if one is other else f"the norms' weights differ in dtype: {one} and {other}"


def _normed(inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor) -> _Two:
    """The operands of the add, by the norm as a module."""
    return (inner(a), b) if side == 0 else (a, inner(b))


def _apart(inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor, reason: str) -> _Two:
    """`_normed`, counted and reported as a norm that was to be one call with its add."""
    calls_of(inner).apart.add(reason)
    given = _normed(inner, side, a, b)
    if observe.active:
        operands = (a, b) if side == 0 else (b, a)
        observe.report(observe.Event("norm_add", inner, operands, given[side], None, "original", reason))
    return given


def _reference(inner: nn.Module, kernel: NormKernel, side: int, a: torch.Tensor, b: torch.Tensor) -> _Two:
    """The operands of the add, by the norm's own operations."""
    x, residual = (a, b) if side == 0 else (b, a)
    normed = kernel.original(inner, x)
    calls_of(inner).reference += 1
    if observe.active:
        observe.report(observe.Event("norm_add", inner, (x, residual), normed, None, "reference"))
    return (normed, residual) if side == 0 else (residual, normed)


def _report(
    inner: nn.Module, side: int, a: torch.Tensor, b: torch.Tensor, total: torch.Tensor | None, backend: str
) -> _Two:
    """Reports a call in which a kernel did all, and gives the operands of its add. The norm's own result was never
    written: its own op computes it for the observer, whose bits the kernel has to have added."""
    kernel = kernel_of(inner)
    assert kernel is not None
    x, residual = (a, b) if side == 0 else (b, a)
    normed = kernel.plain(x, kernel.weight_of(inner), kernel.eps_of(inner))
    observe.report(observe.Event("norm_add", inner, (x, residual), normed, total, backend))
    return (normed, residual) if side == 0 else (residual, normed)
