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
from collections.abc import Callable, Hashable, Mapping
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch.nn as nn

from ..locks import Lock


class Body(NamedTuple):
    """namespace: methods and attributes of a patched subclass. made: called with it before anything uses it."""

    namespace: Mapping[str, Any]
    made: Callable[[type], None]


Factory = Callable[[type, Any], Body]

_FACTORIES: dict[str, Factory] = {}
_CLASSES: dict[tuple[type, str, Hashable], type] = {}
_FORWARDS: dict[Any, type] = {}
"""The forward of every patched class -> the class under the patch."""
_LOCK = Lock()

STATE = "_rmsnorm_patch"
"""The one `__dict__` entry that a patched module may carry (links to other modules, what was displaced); `revert`
removes it."""


def register_factory(role: str, factory: Factory) -> None:
    """`factory(original, key)` gives the body of the patched subclass."""
    _FACTORIES[role] = factory


def patched_class(original: type, role: str, key: Hashable) -> type:
    """The one subclass of `original` for (role, key); made on first use, the same object ever after."""
    if is_patched(original):
        raise TypeError(f"{original.__qualname__} is already a patched class")
    with _LOCK:
        known = _CLASSES.get((original, role, key))
        if known is not None:
            return known
        body = _FACTORIES[role](original, key)
        namespace = dict(body.namespace)
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            _rmsnorm_patch_original=original,
            _rmsnorm_patch_role=role,
            _rmsnorm_patch_key=key,
        )
        made = type(original)(original.__name__, (original,), namespace)
        type.__setattr__(made, "__reduce_ex__", _reduce_ex_of(made))
        body.made(made)
        _FORWARDS[made.forward] = original  # type: ignore[attr-defined]
        _CLASSES[(original, role, key)] = made
        return made


def is_patched(cls: type) -> bool:
    return "_rmsnorm_patch_original" in vars(cls)


def original_class(cls: type) -> type:
    """The class under the patch; `cls` itself where it is not patched."""
    return vars(cls).get("_rmsnorm_patch_original", cls)


def running_now(module: nn.Module, original: type, own: Callable[..., Any]) -> Callable[..., Any]:
    """What a forward of a patched class of `original` runs in its place once `module` is no longer of that class.

    A wrapper, or whoever took the bound method, may hold such a forward beyond `revert`, and beyond another `apply`:
    that of the patched class which the module has now, else `own`, the original's.
    """
    cls = type(module)
    if getattr(cls, "_rmsnorm_patch_original", None) is original:
        own = getattr(cls, "_rmsnorm_patch_forward", own)
    return own


def unpatched_forward(function: Any) -> Any:
    """The class's own forward where `function` is a patched class's; else `function`."""
    original = _FORWARDS.get(function) if isinstance(function, FunctionType) else None
    return function if original is None else original.forward  # type: ignore[attr-defined]


def role_of(module: nn.Module) -> str | None:
    return vars(type(module)).get("_rmsnorm_patch_role")


def unpatched_class(cls: type) -> type:
    """`original_class`, also for a class that somebody derived from a patched one (FSDP2 and parametrisations do so,
    module by module): then the same class derived from the original."""
    if is_patched(cls) or not derives_from_patched(cls):
        return original_class(cls)
    own = CellType()
    namespace = {
        name: _for_class(value, cls, own)
        for name, value in vars(cls).items()
        if name not in ("__dict__", "__weakref__")
    }
    made = type(cls)(cls.__name__, tuple(unpatched_class(base) for base in cls.__bases__), namespace)
    own.cell_contents = made
    return made


def _for_class(value: Any, cls: type, own: CellType) -> Any:
    """A class attribute of `cls` for the class that `own` will hold: in a method, `super()` reads it from that cell."""
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_for_class(value.__func__, cls, own))
    if isinstance(value, property):
        get, put, drop = (_for_class(f, cls, own) for f in (value.fget, value.fset, value.fdel))
        return property(get, put, drop, value.__doc__)
    if not isinstance(value, FunctionType) or "__class__" not in value.__code__.co_freevars:
        return value
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    closure = tuple(own if name == "__class__" and cell.cell_contents is cls else cell for name, cell in cells)
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    made.__kwdefaults__ = value.__kwdefaults__
    functools.update_wrapper(made, value)
    del made.__wrapped__  # type: ignore[attr-defined]
    return made


def derives_from_patched(cls: type) -> bool:
    return any(is_patched(base) for base in cls.__mro__)


def _reduce_ex_of(patched: type) -> Callable[[Any, Any], Any]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(patched, self).__reduce_ex__(protocol)  # type: ignore[arg-type, misc]
        if type(self) is patched and isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            key = vars(patched)
            original, role = key["_rmsnorm_patch_original"], key["_rmsnorm_patch_role"]
            return (_rebuild, (original, role, key["_rmsnorm_patch_key"]), *reduced[2:])
        return reduced

    return __reduce_ex__


def _rebuild(original: type, role: str, key: Hashable) -> nn.Module:
    """Unpickling and deepcopy: an empty instance of the patched class."""
    from . import install_factories  # the fresh process may not have imported the rewriter yet

    install_factories()
    cls = patched_class(original, role, key)
    made: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    return made
