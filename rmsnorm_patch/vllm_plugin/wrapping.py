"""One function of vLLM's in place of another, once a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "__rmsnorm_patch_original__"


def wrap_once(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by `make(original)`; a second call changes nothing."""
    standing = getattr(owner, name)
    if hasattr(standing, _MARK):
        return
    is_classmethod = hasattr(standing, "__func__")
    original = standing.__func__ if is_classmethod else standing
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, original)
    setattr(owner, name, classmethod(wrapper) if is_classmethod else wrapper)


def original_of(function: Any) -> Callable[..., Any] | None:
    """What `wrap_once` put `function` around; None for any other."""
    return getattr(function, _MARK, None)
