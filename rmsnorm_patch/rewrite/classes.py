"""Patched classes: a subclass in the guise of the original, swapped in through `module.__class__`.

Measured against the alternatives: an instance-level `MethodType` loses the kernel on pickling and to `kernelize()`;
replacing the module loses forward hooks; a wrapper changes state_dict keys; a closure makes a deepcopy use the
original's weights. The class swap keeps all of these.

A class is built by a factory from (original class, key). The key is plain data, so that a pickle holds
(original, role, key) by reference and a fresh process builds the same class again.
"""

from __future__ import annotations

import copyreg
import functools
from abc import ABCMeta
from collections.abc import Callable, Hashable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch.nn as nn

from .. import patch_state
from ..locks import Lock
from ..pairs.source import rewrapping_hooks
from ..patch_state import is_patched
from . import registries


class Body(NamedTuple):
    """namespace: methods and attributes of a patched subclass. made: called with it before anything uses it."""

    namespace: Mapping[str, Any]
    made: Callable[[type], None]


Factory = Callable[[type, Any], Body]

_FACTORIES: dict[str, Factory] = {}
_CLASSES: dict[tuple[type, str, Hashable], type] = {}
_LOCK = Lock()

_MADE_BY = {"norm": "norms", "layer": "layers", "attention": "query_key"}
"""Role -> the module of this folder that registers its factory."""


def install_factories() -> None:
    """Make every patched class buildable in this process; what unpickling a patched model calls."""
    for name in _MADE_BY.values():
        import_module(f"{__package__}.{name}")


def register_factory(role: str, factory: Factory) -> None:
    """`factory(original, key)` gives the body of the patched subclass."""
    _FACTORIES[role] = factory


def patched_class(original: type, role: str, key: Hashable) -> type:
    """The one subclass of `original` for (role, key); made on first use, the same object as long as `original` has the
    functions that it had then."""
    if is_patched(original):
        raise TypeError(f"{original.__qualname__} is already a patched class")
    with _LOCK:
        known = _CLASSES.get((original, role, key))
        if known is not None and patch_state.runs_what_was_read(known):
            return known
        body = _FACTORIES[role](original, key)
        namespace = {"_rmsnorm_patch_read": patch_state.read_of(original), **body.namespace}
        namespace.update(
            __init__=_init_of(original),
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            _rmsnorm_patch_original=original,
            _rmsnorm_patch_role=role,
            _rmsnorm_patch_key=key,
        )
        patched = _subclass(original, namespace)
        type.__setattr__(patched, "__reduce_ex__", _reduce_ex_of(patched))
        body.made(patched)
        patch_state.FORWARDS[patched.forward] = original  # type: ignore[attr-defined]
        _CLASSES[(original, role, key)] = patched
    registries.enter([patched])  # also where a patched model is unpickled, which no `apply` sees
    return patched


def _subclass(original: type, namespace: dict[str, Any]) -> type:
    """A subclass of which nobody hears. A base class or a metaclass may register each class as it is made, by its
    name: who builds another model from that register would get a patched one."""
    kind = type(original)
    maker = ABCMeta if issubclass(kind, ABCMeta) else type
    try:
        made: type = maker.__new__(kind, original.__name__, (nn.Module,), namespace)
        made.__bases__ = (original,)
    except TypeError:  # instances of `original` have slots
        return kind(original.__name__, (original,), namespace)
    for hook in rewrapping_hooks(original):
        hook(made)
    return made


def _init_of(original: type) -> Callable[..., None]:
    """For who makes another module by `type(module)(...)`: that one is nobody's patched module."""
    own: Any = original.__init__  # type: ignore[misc]

    @functools.wraps(own)
    def __init__(self: nn.Module, *args: Any, **named: Any) -> None:
        if is_patched(type(self)):
            patch_state.set_class(self, original)
        own(self, *args, **named)

    return __init__


def _reduce_ex_of(patched: type) -> Callable[[Any, Any], Any]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(patched, self).__reduce_ex__(protocol)  # type: ignore[arg-type, misc]
        if type(self) is patched and isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            key = vars(patched)
            original, role = key["_rmsnorm_patch_original"], key["_rmsnorm_patch_role"]
            return (_rebuild, (original, role, key["_rmsnorm_patch_key"]), *reduced[2:])
        if type(self) is patched and isinstance(reduced, tuple):  # the class's own, which may name it: as it is found
            return (unpatch(reduced[0]), tuple(map(unpatch, reduced[1])), *reduced[2:])
        return reduced

    def unpatch(value: Any) -> Any:
        return vars(patched)["_rmsnorm_patch_original"] if value is patched else value

    return __reduce_ex__


def _rebuild(original: type, role: str, key: Hashable) -> nn.Module:
    """Unpickling and deepcopy: an empty instance of the patched class."""
    install_factories()  # the fresh process may not have imported the rewriter yet
    cls = patched_class(original, role, key)
    module: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    return module
