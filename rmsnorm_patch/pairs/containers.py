"""Modules that hold others in a list: which of them run code of their own, and which a loop may run over."""

from __future__ import annotations

import torch.nn as nn

from ..patch_state import original_class

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def is_container(module: nn.Module) -> bool:
    """Whether it only holds modules, or runs them in turn: it has no forward of its own."""
    return is_sequence(module) or _has_no_forward(module)


def is_sequence(module: nn.Module) -> bool:
    """Whether it runs its children in turn, as `nn.Sequential` does."""
    cls = original_class(type(module))
    return issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward


def may_be_looped_over(module: nn.Module) -> bool:
    """Whether another module's loop may run its children. A forward of its own, which that loop does not call, is no
    obstacle."""
    return isinstance(module, LISTS) or _has_no_forward(module)


def _has_no_forward(module: nn.Module) -> bool:
    return original_class(type(module)).forward is nn.Module.forward  # type: ignore[attr-defined, no-any-return]
