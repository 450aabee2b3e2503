"""Registries that libraries keep by class: `REGISTRY[type(module)]`, `type(module) in SUPPORTED`.

A patched module has another class, so that it would not be found. Beside each entry of a class that is patched, its
patched class gets the same one. An entry stays as long as its class, beyond `revert`: no unpatched module looks it up.

Registries are the dicts and sets that are global in a module or an attribute of a class there. A tuple or list of
classes cannot be told from one that `isinstance` is asked with, which finds patched modules; the plan names it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

from ..locks import Lock
from ..patch_state import is_patched, original_class

_FILLED_AT_FIRST_USE = (("diffusers", "diffusers.hooks._helpers", "TransformerBlockRegistry", "_register"),)
"""Top package, module, class and method of registries that hold nothing before a lookup; the method fills them."""

_KEYED = (dict, OrderedDict, defaultdict, set)
_LISTS = (tuple, list, frozenset)
_KINDS = frozenset((*_KEYED, *_LISTS))
_READ_OF_EACH = 8


class Named(NamedTuple):
    """A container of classes, and where it stands: "package.module.NAME"."""

    name: str
    container: Any


class _Walked(NamedTuple):
    """What a module held when it had this many globals."""

    module: ModuleType
    globals: int
    containers: tuple[Named, ...]


_walked: dict[str, _Walked] = {}
_LOCK = Lock()


def enter(classes: Iterable[type]) -> None:
    """Enter every patched class among `classes` wherever its original is registered now."""
    patched = {cls: original_class(cls) for cls in classes if is_patched(cls)}
    if not patched:
        return
    with _LOCK:
        _fill(patched.values())
        known = _containers()
        for cls, original in patched.items():
            for _, container in _registering(original, known):
                if isinstance(container, set):
                    container.add(cls)
                else:
                    container.setdefault(cls, container[original])


def notes(classes: Iterable[type]) -> tuple[str, ...]:
    """For a plan that patches modules of these classes: where they are looked up by class, and what becomes of it."""
    wanted = {cls: None for cls in classes if not is_patched(cls)}
    with _LOCK:
        _fill(wanted)
        known = _containers()
        return tuple(dict.fromkeys(note for cls in wanted for note in _notes_of(cls, known)))


def _notes_of(cls: type, known: Collection[Named]) -> Iterator[str]:
    told: dict[int, str] = {}
    for name, container in _registering(cls, known):
        told.setdefault(id(container), name)
    for name in told.values():
        yield f"{name} has an entry for {cls.__name__}; apply enters the patched class beside it"
    listed: dict[int, str] = {}
    for name, container in known:
        if type(container) in _LISTS and any(item is cls for item in container):
            listed.setdefault(id(container), name)
    for name in listed.values():
        yield (
            f"{name} lists {cls.__name__}; isinstance finds patched modules in it, a comparison with type(module) "
            "does not: leave them out with exclude= if it is compared"
        )


def _registering(cls: type, known: Iterable[Named]) -> Iterator[Named]:
    """The registries that have `cls` as a key or element."""
    for named in known:
        container = named.container
        if type(container) not in _KEYED or cls not in container:
            continue
        if isinstance(container, set) or not _was_made_of(cls, container[cls]):
            yield named


def _was_made_of(cls: type, value: Any) -> bool:
    """Whether `value` is a class that a program derived from `cls`, as FSDP2 does: then the dict is its memory of what
    it made, and a patched class must get one of its own. A class that can be imported was written."""
    if not (_is_class(value) and issubclass(value, cls)):
        return False
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is not value


def _fill(classes: Iterable[type]) -> None:
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    for package, module, name, fill in _FILLED_AT_FIRST_USE:
        if package in packages:
            try:
                found = import_module(module)
            except ImportError:  # a release from before that registry
                continue
        elif module in sys.modules:  # a class of somebody else may be registered there
            found = sys.modules[module]
        else:
            continue
        getattr(getattr(found, name, None), fill, lambda: None)()


def _containers() -> list[Named]:
    """Every container of classes in the loaded modules. Modules are read once, and again when their globals are more
    or fewer than they were: reading all takes far longer than a plan."""
    for name in _walked.keys() - sys.modules.keys():
        del _walked[name]
    for name, module in list(sys.modules.items()):
        space = getattr(module, "__dict__", None)
        if type(space) is not dict:
            continue
        before = _walked.get(name)
        if before is None or before.module is not module or before.globals != len(space):
            _walked[name] = _Walked(module, len(space), tuple(_containers_of(name, space)))
    return [named for walked in _walked.values() for named in walked.containers]


def _containers_of(name: str, space: dict[str, Any]) -> Iterator[Named]:
    for attribute, value in list(space.items()):
        kind = type(value)
        if kind in _KINDS:
            if _may_hold_classes(value):
                yield Named(f"{name}.{attribute}", value)
        elif issubclass(kind, type) and value.__module__ == name:
            for inner, held in list(vars(value).items()):
                if type(held) in _KINDS and not inner.startswith("__") and _may_hold_classes(held):
                    yield Named(f"{name}.{attribute}.{inner}", held)


def _may_hold_classes(value: Any) -> bool:
    """An empty dict or set may be filled later. What begins with other things, a table of strings, is not read on."""
    first = list(islice(value, _READ_OF_EACH))
    return any(map(_is_class, first)) or (not first and type(value) in _KEYED)


def _is_class(value: Any) -> bool:
    """`isinstance(value, type)` would ask the value for its `__class__`, which runs code of proxies."""
    return issubclass(type(value), type)
