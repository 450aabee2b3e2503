"""Patched classes: a subclass in the guise of the original, swapped in through `module.__class__`.

Measured against the alternatives: an instance-level `MethodType` loses the kernel on pickling and to `kernelize()`;
replacing the module loses forward hooks; a wrapper changes state_dict keys; a closure makes a deepcopy use the
original's weights. The class swap keeps all of these.

A class is built by a factory from (original class, key). The key is plain data, so that a pickle holds
(original, role, key) by reference and a fresh process builds the same class again.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch.nn as nn

Factory = Callable[[type, Any], "Mapping[str, Any]"]

_FACTORIES: dict[str, tuple[Factory, Callable[[type], None] | None]] = {}
_CLASSES: dict[tuple[type, str, Hashable], type] = {}
_LOCK = threading.Lock()

STATE = "_rmsnorm_patch"
"""The one `__dict__` entry that a patched module may carry (links to other modules, what was displaced); `revert`
removes it."""


def register_factory(role: str, factory: Factory, made: Callable[[type], None] | None = None) -> None:
    """`factory(original, key)` returns the namespace (methods, class attributes) of the patched subclass; `made` is
    called with the subclass before anything uses it."""
    _FACTORIES[role] = factory, made


def patched_class(original: type, role: str, key: Hashable) -> type:
    """The one subclass of `original` for (role, key); made on first use, the same object ever after."""
    if is_patched(original):
        raise TypeError(f"{original.__qualname__} is already a patched class")
    with _LOCK:
        known = _CLASSES.get((original, role, key))
        if known is not None:
            return known
        factory, register = _FACTORIES[role]
        namespace = dict(factory(original, key))
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
        if register is not None:
            register(made)
        _CLASSES[(original, role, key)] = made
        return made


def is_patched(cls: type) -> bool:
    return "_rmsnorm_patch_original" in vars(cls)


def original_class(cls: type) -> type:
    """The class under the patch; `cls` itself where it is not patched."""
    return vars(cls).get("_rmsnorm_patch_original", cls)


def role_of(module: nn.Module) -> str | None:
    return vars(type(module)).get("_rmsnorm_patch_role")


def unpatched_class(cls: type) -> type:
    """`original_class`, also for a class that somebody derived from a patched one (FSDP2 and parametrisations do so,
    module by module): then the same class derived from the original."""
    if is_patched(cls) or not derives_from_patched(cls):
        return original_class(cls)
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(unpatched_class(base) for base in cls.__bases__), namespace)


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
