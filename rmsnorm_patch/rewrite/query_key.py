"""The q and k norms of an attention in one launch: the class of such an attention, and what its forward calls.

`together` is asked before anything else runs. Where it says no, the model's own statements run, in their own order: a
norm that somebody watches is called when the model calls it. `query_key` gets the rows of both and norms them in one
launch, or by the norms themselves where that cannot be. `rotated` also takes the rotation that follows them into the
launch; where that cannot be, it is `query_key` and the model's own rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from .. import ops
from ..fused.query_key_norm.kernel import BoundPair, bind_rms_norm_pair
from ..fused.query_key_norm.rotated import bind_rms_norm_rotated
from ..pairs.layout import ModelLayout
from ..pairs.query_key import AttentionKey, rewrite_attention, rotations_of
from ..pairs.rotation import known, why_other
from ..pairs.source import read_again
from ..patch_state import STATE, unhooked
from ..scan.plan import Plan, QueryKeySite
from . import guards, instance_forward, native, observe
from .classes import Body, patched_class, register_factory
from .counts import CALLS, calls_of
from .journal import Journal
from .layer_calls import NormKernel, kernel_of, unpatched_reason, watch

ROLE = "attention"

Two = tuple[torch.Tensor, torch.Tensor]
_is_tracing = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_NO_TENSOR = torch.empty(0, device="cpu")


def attention_factory(original: type, key: AttentionKey) -> Body:
    """The patched class has a `forward` of its own, unless the source is not the one that the key was made for."""
    key = AttentionKey(*key)
    source = read_again(original, key.digest)
    if source is None:
        return Body({}, lambda cls: None)
    for name in rotations_of(source, key):  # another process may have judged them, which made the key
        why_other(source.function.__globals__.get(name))
    helpers: dict[str, Callable[..., Any]] = {"watch": watch, "together": together, "query_key": query_key}
    helpers["rotated"] = rotated
    return Body(*rewrite_attention(source, key, original, helpers))


register_factory(ROLE, attention_factory)


def install(plan: Plan, layout_read: ModelLayout, journal: Journal) -> None:
    """Swap the classes of the attentions that the plan fuses. layout_read: of the model when `plan` was made."""
    fused: dict[str, list[QueryKeySite]] = {}
    for site in plan.fused_query_key():
        fused.setdefault(site.layer, []).append(site)
    for attention in layout_read.attentions.values():
        key = attention.key(fused.get(attention.path, ()))
        if key is not None:
            original = type(attention.module)
            journal.swap_class(attention.module, patched_class(original, ROLE, key))
            instance_forward.adopt(attention.module, original, journal)


def together(query_norm: nn.Module, key_norm: nn.Module) -> bool:
    """Whether what the key's norm reads may be computed before the query's norm: nobody watches the norms, and no
    gradient or graph keeps their order."""
    if _is_tracing():
        return False
    if not _is_grad_enabled() and unhooked(query_norm) and unhooked(key_norm):
        return True
    reason = "a gradient may be wanted" if _is_grad_enabled() else "a norm has hooks or a forward of its own"
    _apart(query_norm, key_norm, reason)
    return False


def query_key(query_norm: nn.Module, key_norm: nn.Module, query: torch.Tensor, key: torch.Tensor) -> Two:
    """(query_norm(query), key_norm(key)), in one launch where the guards hold. query, key: [..., N]."""
    done: Two | None = native.query_key(query_norm, key_norm, query, key)
    if done is None:
        return _query_key(query_norm, key_norm, query, key)
    try:
        query_norm.__dict__[STATE][CALLS].together += 1
        key_norm.__dict__[STATE][CALLS].together += 1
    except KeyError:  # another thread reverts the model
        pass
    if observe.active:
        _report(query_norm, key_norm, (query, key), done, "cuda")
    return done


def _query_key(query_norm: nn.Module, key_norm: nn.Module, query: torch.Tensor, key: torch.Tensor) -> Two:
    """`query_key` with every check in Python."""
    kernels = kernel_of(query_norm), kernel_of(key_norm)
    first, second = kernels
    if first is not None and second is not None and not (first.serves(query) or second.serves(key)):
        normed = first.original(query_norm, query), second.original(key_norm, key)
        for norm in (query_norm, key_norm):
            calls_of(norm).reference += 1
        if observe.active:
            _report(query_norm, key_norm, (query, key), normed, "reference")
        return normed
    reason, both_norms = _both_norms_for(query_norm, key_norm, kernels, query, key)
    if both_norms is None or first is None or second is None:
        _apart(query_norm, key_norm, reason)
        return query_norm(query), key_norm(key)
    weights = first.weight_of(query_norm), second.weight_of(key_norm)
    normed = both_norms(query, key, *weights, first.eps_of(query_norm))
    for norm, kernel in ((query_norm, first), (key_norm, second)):
        calls_of(norm).together += 1
        if both_norms.in_c is not None:
            native.enroll_query_key(type(norm), kernel, both_norms.in_c)
    if observe.active:
        _report(query_norm, key_norm, (query, key), normed, "cuda")
    return normed


def _both_norms_for(
    query_norm: nn.Module,
    key_norm: nn.Module,
    kernels: tuple[NormKernel | None, NormKernel | None],
    query: torch.Tensor,
    key: torch.Tensor,
) -> tuple[str, BoundPair | None]:
    """The kernel that norms both, or why there is none."""
    first, second = kernels
    settings: list[Any] = []
    for norm, kernel, x in ((query_norm, first, query), (key_norm, second, key)):
        if kernel is None:
            return unpatched_reason(norm), None
        weight, eps = kernel.weight_of(norm), kernel.eps_of(norm)
        why = guards.TRAINING if norm.training else guards.reason(x, weight) or guards.eps_reason(eps)
        if not why and not kernel.attributes.fits(weight):
            why = kernel.attributes.missing()
        if why:
            return why, None
        of_class: Any = vars(type(norm))["_rmsnorm_patch_key"]
        settings.append((of_class.spec.variant, of_class.backend, float(eps)))
    if settings[0] != settings[1]:
        return "the two norms compute differently: their numerics, eps or backend are not the same", None
    assert first is not None
    assert second is not None
    weights = first.weight_of(query_norm), second.weight_of(key_norm)
    spec, backend, _ = settings[0]
    serving = ops.bind_rms_norm(spec, backend).backend_for(query, weights[0])
    if serving != "cuda":
        return f"backend {serving} has no kernel for two norms", None
    both_norms = bind_rms_norm_pair(spec)
    why = both_norms.why_apart(query, key, *weights)
    return why, None if why else both_norms


class Turned(NamedTuple):
    """What a rotation gave, of the query and of the key, and what it was given."""

    both: Two
    cos: torch.Tensor
    sin: torch.Tensor
    head_axis: int


def rotated(
    query_norm: nn.Module,
    key_norm: nn.Module,
    head_axis: int,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotate: Any,
) -> Two:
    """rotate(query_norm(query), key_norm(key), cos, sin), in one launch where the guards hold.

    query, key: [batch, length, heads, N] (head_axis 2: the norms' results are transposed in front of `rotate`) or
    [batch, heads, length, N] (head_axis 1). rotate: the model's own function.
    """
    judged = known(rotate) is not None
    done = native.rotated(query_norm, key_norm, head_axis, query, key, cos, sin) if judged else None
    if done is None:
        return _rotated(query_norm, key_norm, head_axis, query, key, cos, sin, rotate, judged)
    try:
        query_norm.__dict__[STATE][CALLS].rotated += 1
        key_norm.__dict__[STATE][CALLS].rotated += 1
    except KeyError:  # another thread reverts the model
        pass
    if observe.active:
        _report_rotated(query_norm, key_norm, (query, key), Turned(done, cos, sin, head_axis))
    return done


def _rotated(
    query_norm: nn.Module,
    key_norm: nn.Module,
    head_axis: int,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotate: Any,
    judged: bool,
) -> Two:
    """`rotated` with every check in Python. judged: whether `rotate` is known to be what the kernel computes."""
    kernels = first, second = kernel_of(query_norm), kernel_of(key_norm)
    if judged and first is not None and second is not None and not (first.serves(query) or second.serves(key)):
        normed = first.original(query_norm, query), second.original(key_norm, key)
        turned = Turned(rotate(*_for_rotation(normed, head_axis), cos, sin), cos, sin, head_axis)
        for norm in (query_norm, key_norm):
            calls_of(norm).reference += 1
        if observe.active:
            _report(query_norm, key_norm, (query, key), normed, "reference", turned)
        return turned.both
    reason, both_norms = "its rotation is another function than the one that was judged", None
    if judged:
        reason, both_norms = _both_norms_for(query_norm, key_norm, kernels, query, key)
    if both_norms is not None and first is not None and second is not None:
        weights = first.weight_of(query_norm), second.weight_of(key_norm)
        op = bind_rms_norm_rotated(both_norms.spec)
        reason = guards.reason(cos, None) or guards.reason(sin, None)
        reason = reason or op.why_apart(query, key, *weights, cos, sin, head_axis)
        if not reason:
            both = op(query, key, *weights, first.eps_of(query_norm), cos, sin, head_axis)
            for norm, kernel in ((query_norm, first), (key_norm, second)):
                calls_of(norm).rotated += 1
                if op.in_c is not None:
                    native.enroll_rotated(type(norm), kernel, op.in_c)
            if observe.active:
                _report_rotated(query_norm, key_norm, (query, key), Turned(both, cos, sin, head_axis))
            return both
    for norm in (query_norm, key_norm):
        calls_of(norm).unrotated.add(reason)
        if observe.active:
            observe.report(observe.Event("unrotated", norm, (), _NO_TENSOR, None, "original", reason))
    normed = query_key(query_norm, key_norm, query, key)
    turned_both: Two = rotate(*_for_rotation(normed, head_axis), cos, sin)
    return turned_both


def _for_rotation(normed: Two, head_axis: int) -> Two:
    """What the model gives its rotation."""
    return normed if head_axis == 1 else (normed[0].transpose(1, 2), normed[1].transpose(1, 2))


def _report_rotated(query_norm: nn.Module, key_norm: nn.Module, rows: Two, turned: Turned) -> None:
    """The kernel writes no normed rows: they are computed here."""
    normed = []
    for norm, x in zip((query_norm, key_norm), rows, strict=True):
        kernel = kernel_of(norm)
        if kernel is None:  # another thread reverts the model
            return
        normed.append(kernel.plain(x, kernel.weight_of(norm), kernel.eps_of(norm)))
    _report(query_norm, key_norm, rows, (normed[0], normed[1]), "cuda", turned)


def _apart(query_norm: nn.Module, key_norm: nn.Module, reason: str) -> None:
    """Count, and tell an observer, that two norms are not one launch."""
    for norm in (query_norm, key_norm):
        calls_of(norm).single.add(reason)
        if observe.active:
            observe.report(observe.Event("single", norm, (), _NO_TENSOR, None, "original", reason))


def _report(
    query_norm: nn.Module, key_norm: nn.Module, rows: Two, normed: Two, backend: str, turned: Turned | None = None
) -> None:
    for at, (norm, x, y) in enumerate(zip((query_norm, key_norm), rows, normed, strict=True)):
        rotation = None if turned is None else observe.RotatedNorm(turned.both[at], *turned[1:])
        observe.report(observe.Event("together", norm, (x,), y, None, backend, rotation=rotation))
