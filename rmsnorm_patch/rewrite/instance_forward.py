"""Instance-level forwards: what accelerate's hooks, `kernelize`, Liger and others leave in a module's `__dict__`.

They hold methods bound when the module had another class, so a class swap alone would be without effect: accelerate
calls `_old_forward`, the others put a `forward`. compressed-tensors puts one too, which calls a function of its own
entry. `adopt` follows a swap, `release` follows its undoing.

A kernel that `kernelize` or Liger put there computes what the class's own forward computes; ours takes its place, and
`revert` puts it back. Whatever else stands there computes something unknown, and is left alone (`patch_state.foreign`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.nn as nn

from ..patch_state import (
    OFFLOADED,
    SLOTS,
    STATE,
    class_forward,
    is_known_kernel,
    is_offloaded,
    run_by,
    unpatched_forward,
)
from .journal import Journal

DISPLACED = "displaced"
"""Key in a module's state: {slot: Displaced}."""


class Displaced:
    """The function that a slot held before. Pickles and deep copies keep none of a hub kernel's code by value."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> Displaced:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Displaced, (None,)


def adopt(module: nn.Module, before: type, journal: Journal) -> None:
    """`module` was of class `before`: let its class's forward run now, and remember what stood over it.

    An own `forward` is removed (a fused pair calls only norms that have none); under accelerate's hooks the method that
    they wrap is exchanged, under compressed-tensors' wrapper the function that it calls.
    """
    own, ours = class_forward(before), class_forward(type(module))
    displaced: dict[str, Displaced] = {}
    for slot in SLOTS:
        method = module.__dict__.get(slot)
        if not isinstance(method, MethodType) or method.__self__ is not module:
            continue
        held = run_by(module, slot)
        function = unpatched_forward(held)  # left there by who held ours beyond `revert`
        if function is not own and not is_known_kernel(module, function):
            continue
        displaced[slot] = Displaced(None if function is own else function)
        if slot == "forward" and is_offloaded(module):
            journal.record(functools.partial(module.__dict__.__setitem__, OFFLOADED, held))
            module.__dict__[OFFLOADED] = ours
            continue
        journal.record(functools.partial(module.__dict__.__setitem__, slot, method))
        if slot == "forward":
            del module.__dict__[slot]
        else:
            module.__dict__[slot] = MethodType(ours, module)
    if displaced:
        journal.set_state(module, DISPLACED, displaced)


def release(module: nn.Module, patched: type, unpatched: type) -> None:
    """`module` is of class `patched`, with its state still in place, and will be of `unpatched`. Called twice, it does
    nothing more."""
    ours, own = class_forward(patched), class_forward(unpatched)
    displaced: dict[str, Displaced] = module.__dict__.get(STATE, {}).get(DISPLACED, {})
    kept = displaced.get("_old_forward", displaced.get("forward"))
    back = own if kept is None or kept.function is None else kept.function
    if "forward" in displaced and not any(slot in module.__dict__ for slot in SLOTS):
        module.__dict__["forward"] = MethodType(back, module)
    if module.__dict__.get(OFFLOADED) is ours:
        module.__dict__[OFFLOADED] = back
    for slot in SLOTS:
        # accelerate's wrapper remembers the method that it wraps for `inspect`, too
        wrapper = getattr(module.__dict__.get(slot), "__dict__", {})
        for holder, name in ((wrapper, "__wrapped__"), (module.__dict__, slot)):
            bound = holder.get(name)
            if isinstance(bound, MethodType) and bound.__self__ is module and bound.__func__ is ours:
                holder[name] = MethodType(back, module)
