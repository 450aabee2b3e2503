"""One place where patched code says what it ran, so that a proof can count it and replay it.

Patched forwards do `if observe.active: observe.report(Event(...))`; with nobody watching that is one global read, which
is why it is a module attribute and not a registry of listeners. An observer hears its own thread alone: what other
threads serve meanwhile is none of its business. Calls of ops, whoever makes them, are heard through `ops.listeners`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

EventKind = Literal["norm", "norm_add", "in_layer", "cross_layer", "kept", "taken", "together", "single", "unrotated"]


@dataclass(frozen=True)
class RotatedNorm:
    """A query's or a key's norm, rotated: rotated [batch, heads, length, N], cos and sin [batch or 1, length, N].
    head_axis: of the norm's own result."""

    rotated: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    head_axis: int


@dataclass(frozen=True)
class Event:
    """One call at a patched site.

    kind: "norm" = a norm alone; "in_layer"/"cross_layer" = residual-add and norm in one call; "kept" = a layer's last
        add that handed nothing over to the norm that it is linked to, for `reason`; "taken" = a norm that returned what
        the previous layer's tail had computed for it; "norm_add" = a norm in one call with the add of its result;
        "together" = one of the query's and the key's norm, computed in one call; "single" = one of the two that its
        attention has to call by itself, for `reason`; "unrotated" = one whose rotation is not part of the launch, for
        `reason`; these two have no operands.
    norm: the norm module. operands: (x,) or the add's (left, right) in source order, for "norm_add" (what is normed,
        what that is added to); (sum,) where it was made before. normed, total: the results (`total` None but for an
        add, and for "norm_add" where the event of the norm that reads the sum follows; for "kept", which norms
        nothing, both are the sum). A kernel that norms and adds writes no `normed`: for the observer it is computed.
    backend: "cuda", "triton" or "reference"; a guard that sent the call to the original arithmetic reports
        "original" with `reason`.
    gate: what a gated norm was called with beside its operand.
    rotation: of "together", what became of `normed` in the same call; `normed` is computed for the observer then.
    """

    kind: EventKind
    norm: nn.Module
    operands: tuple[torch.Tensor, ...]
    normed: torch.Tensor
    total: torch.Tensor | None
    backend: str
    reason: str = ""
    gate: torch.Tensor | None = None
    rotation: RotatedNorm | None = None


active: set[int] = set()
"""Threads that observe now. Events are built only while there is one."""

_here = threading.local()


def report(event: Event) -> None:
    """Tell this thread's observer, if it has one."""
    callback = getattr(_here, "callback", None)
    if callback is not None:
        callback(event)


@contextmanager
def observing(callback: Callable[[Event], None]) -> Iterator[None]:
    """Send every event of this thread to `callback` until the block ends; nesting replaces, then restores."""
    before = getattr(_here, "callback", None)
    thread = threading.get_ident()
    active.add(thread)
    _here.callback = callback
    try:
        yield
    finally:
        _here.callback = before
        if before is None:
            active.discard(thread)
