"""What is bound to an op is kept for the life of the process, until `ops.forget` drops all of it together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

from . import launch_mode

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])
_KEPT: list[Callable[[], None]] = []
_forgotten = [0]
"""How often."""


def kept(function: F) -> F:
    """`functools.cache`, emptied by `forget`. What another thread makes meanwhile is made again."""

    @wraps(function)
    def made(*given: Any, **named: Any) -> object:
        while True:
            before = _forgotten[0]
            result = function(*given, **named)
            if before == _forgotten[0]:
                return result

    cached = cache(made)
    forgotten_with(cached.cache_clear)
    return cached  # type: ignore[return-value]


def by_variant(make: Callable[..., T]) -> Callable[..., T]:
    """`make(..., spec, dependent)`, kept, as f(..., spec, dependent=None): specs of one variant share what is bound.
    dependent: as `launch_mode.decided` takes it."""
    made = kept(make)

    def bound(*which: Any, dependent: bool | None = None) -> T:
        *others, spec = which
        return made(*others, spec.variant, launch_mode.decided(dependent))

    return bound


def forgotten_with(clear: Callable[[], None]) -> None:
    """Have `forget` call `clear` too."""
    _KEPT.append(clear)


def forget() -> None:
    """Bind anew from now on: schedules, launcher and settings are read again by ops that are bound after this.

    What is held already (a patched module's op, a captured graph) stays what it is. Machine code is kept.
    """
    _forgotten[0] += 1
    for clear in tuple(_KEPT):
        clear()
