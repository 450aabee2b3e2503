"""One place where patched code says what it ran, so that a proof can count it and replay it.

Patched forwards do `if observe.active is not None: observe.active(Event(...))`; with nobody watching that is one
global read (about 30 ns), which is why it is a module attribute and not a registry of listeners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

EventKind = Literal["norm", "in_layer", "cross_layer", "taken"]


@dataclass(frozen=True)
class Event:
    """One call at a patched site.

    kind: "norm" = a norm alone; "in_layer"/"cross_layer" = residual-add and norm in one call; "taken" = a norm that
        returned what the previous layer's tail had computed for it.
    norm: the norm module. operands: (x,) or the add's (left, right) in source order. normed, total: the results
        (`total` None for "norm" and "taken").
    backend: "cuda", "triton" or "reference"; a guard that sent the call to the original arithmetic reports
        "original" with `reason`.
    """

    kind: EventKind
    norm: nn.Module
    operands: tuple[torch.Tensor, ...]
    normed: torch.Tensor
    total: torch.Tensor | None
    backend: str
    reason: str = ""


active: Callable[[Event], None] | None = None


@contextmanager
def observing(callback: Callable[[Event], None]) -> Iterator[None]:
    """Send every event of this process to `callback` until the block ends; nesting replaces, then restores."""
    global active
    before = active
    active = callback
    try:
        yield
    finally:
        active = before
