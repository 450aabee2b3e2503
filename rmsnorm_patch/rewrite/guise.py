"""A function in place of a module's forward, under the names, defaults and attributes of that forward."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn

from .counts import calls_of

MORE_ARGUMENTS = "the norm is called with more than its input"

_is_dynamo_tracing = torch.compiler.is_dynamo_compiling


def in_the_guise_of(original: type[nn.Module], forward: Any) -> FunctionType:
    """`forward` with the names, defaults and signature of the original's.

    forward: of `self` and positional parameters. Where the original takes more than these, a call that gives exactly
    the first ones goes to `forward`, and any other to the original.
    """
    own: Any = original.forward
    parameters = [*inspect.signature(own).parameters.values()]
    code, taken = forward.__code__, forward.__code__.co_argcount
    if len(parameters) == taken:
        names = (*(each.name for each in parameters), *code.co_varnames[taken:])
        defaults = tuple(each.default for each in parameters if each.default is not each.empty)
        renamed = code.replace(co_varnames=names)
        disguised = FunctionType(renamed, forward.__globals__, forward.__name__, defaults or None, forward.__closure__)
    else:
        disguised = _of_first_arguments(original, forward, tuple(each.name for each in parameters[1:taken]))
        disguised.__signature__ = inspect.signature(own)
    for name in ("__doc__", "__name__", "__qualname__", "__module__"):
        setattr(disguised, name, getattr(own, name, None))
    return disguised


def _of_first_arguments(original: type[nn.Module], forward: Any, names: tuple[str, ...]) -> Any:
    """names: of the arguments that `forward` takes."""
    count = len(names)

    def disguised(self, *args, **named):  # type: ignore[no-untyped-def]
        if len(args) == count and not named:
            return forward(self, *args)
        rest = names[len(args) :]
        if len(args) + len(named) == count and named.keys() == {*rest}:
            return forward(self, *args, *(named[name] for name in rest))
        if not _is_dynamo_tracing():
            calls_of(self).fallen_back.add(MORE_ARGUMENTS)
        return original.forward(self, *args, **named)

    return disguised
