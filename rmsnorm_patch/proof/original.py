"""Run the original model in place of the patched one, and come back to exactly the patched one.

`unpatched` reverts through the public path, so that what is measured is what `revert` gives a user, and puts classes,
bound forwards and state back from a snapshot rather than by applying again: the very same objects return, whatever
happens in between, and a patch that a second `apply` would not make the same way is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn

from .. import rewrite
from ..errors import PatchConflict
from ..rewrite.classes import STATE, is_patched
from ..rewrite.instance_forward import SLOTS

_ENTRIES = (STATE, *SLOTS)


@contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """`model` is the original until the block ends, then the patched object that it was, on exceptions too."""
    with rewrite.LOCK:
        snapshots = [_Snapshot(module) for module in model.modules()]
        try:
            rewrite.revert_model(model)
            left = [path for path, module in model.named_modules() if is_patched(type(module))]
            if left:
                raise PatchConflict(left[0], "a class that revert left patched", "models that revert", "report this")
            yield
        finally:
            for snapshot in snapshots:
                snapshot.restore()


class _Snapshot:
    """What `revert_model` may change in one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.entries = {name: module.__dict__[name] for name in _ENTRIES if name in module.__dict__}
        self.wrapped: list[tuple[dict[str, Any], Any]] = [
            (method.__dict__, method.__dict__["__wrapped__"])
            for name in SLOTS
            if "__wrapped__" in getattr(method := module.__dict__.get(name), "__dict__", {})
        ]

    def restore(self) -> None:
        self.module.__class__ = self.cls
        for name in _ENTRIES:
            if name in self.entries:
                self.module.__dict__[name] = self.entries[name]
            else:
                self.module.__dict__.pop(name, None)
        for holder, value in self.wrapped:
            holder["__wrapped__"] = value
