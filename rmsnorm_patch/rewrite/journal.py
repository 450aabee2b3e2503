"""The log of what `apply` changed, so that a failure half way undoes all of it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn

from ..patch_state import STATE, set_class


class Journal:
    """Every change to a module goes through here; `rollback` undoes them in reverse."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def swap_class(self, module: nn.Module, cls: type) -> None:
        before = type(module)
        self._undo.append(lambda: None if type(module) is before else set_class(module, before))
        set_class(module, cls)

    def set_state(self, module: nn.Module, name: str, value: object) -> None:
        """Put `value` under `module.__dict__[STATE][name]`, past `nn.Module.__setattr__`."""
        created = STATE not in module.__dict__
        missing = object()
        before = module.__dict__.get(STATE, {}).get(name, missing)

        def undo() -> None:
            if created:
                module.__dict__.pop(STATE, None)
            elif before is missing:
                module.__dict__[STATE].pop(name, None)
            else:
                module.__dict__[STATE][name] = before

        self._undo.append(undo)
        module.__dict__.setdefault(STATE, {})[name] = value

    def record(self, undo: Callable[[], None]) -> None:
        """For a change that is neither of the above. Call it before the change, so that nothing, not even an interrupt,
        falls between; `undo` must then do no harm where the change did not happen."""
        self._undo.append(undo)

    def rollback(self) -> None:
        """Undo everything, whatever single steps say; the first of their errors is raised at the end. Interrupted in
        between, it can be called again."""
        failed: Exception | None = None
        while self._undo:
            try:
                self._undo[-1]()
            except Exception as error:
                failed = failed or error
            self._undo.pop()
        if failed is not None:
            raise failed
