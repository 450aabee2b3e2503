"""Registries that libraries keep by class: `REGISTRY[type(module)]`, `type(module) in SUPPORTED`.

A patched module has another class, so that it would not be found. Beside each entry of a class that is patched, its
patched class gets the same one. An entry stays as long as its class, beyond `revert`: no unpatched module looks it up.

Registries are dicts and sets that a module holds: global, in an attribute of a class or an object there, or inside
such a dict. A tuple or list of classes cannot be told from one that `isinstance` is asked with, which finds patched
modules; the plan names it. So it does with what cannot be written.
"""

from __future__ import annotations

import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from ..locks import Lock
from ..patch_state import is_patched, original_class

_FILLED_AT_FIRST_USE = (("diffusers", "diffusers.hooks._helpers", "TransformerBlockRegistry", "_register"),)
"""Top package, module, class and method of registries that hold nothing before a lookup; the method fills them."""

_KEYED = (dict, set, WeakKeyDictionary, WeakSet)
_LISTS = (tuple, list, frozenset, MappingProxyType)
_KINDS = (*_KEYED, *_LISTS)
_PLAIN = (dict, set, tuple, list, frozenset)
_READ_THROUGH = (*_LISTS, dict)
DEFINED_IN_PYTHON = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: the class was made by a class statement."""


class Named(NamedTuple):
    """A container of classes, and where it stands: "package.module.NAME"."""

    name: str
    container: Any


class _Walked(NamedTuple):
    """What a module held when it had this many globals. others: its dicts and sets without a class, by name, and how
    long they were."""

    module: ModuleType
    globals: int
    containers: tuple[Named, ...]
    others: tuple[tuple[str, int], ...]

    def is_current(self, module: ModuleType) -> bool:
        if self.module is not module or self.globals != len(space := vars(module)):
            return False
        for name, length in self.others:  # some thousand in all modules, at each plan
            value = space.get(name)
            if (len(value) if type(value) is dict else _length(value)) != length:
                return False
        return True


_walked: dict[str, _Walked] = {}
_LOCK = Lock()


def enter(classes: Iterable[type]) -> None:
    """Enter every patched class among `classes` wherever its original is registered now."""
    patched = {cls: original_class(cls) for cls in classes if is_patched(cls)}
    if not patched:
        return
    with _LOCK:
        _fill(patched.values())
        registered = _registering(dict.fromkeys(patched.values()), _containers())
        for cls, original in patched.items():
            for _, container in registered[original]:
                _enter(container, cls, original)


def _enter(container: Any, cls: type, original: type) -> None:
    """A library's own subclass of dict or set may refuse what it is given twice, so that its methods are not asked."""
    kind = type(container)
    if issubclass(kind, set):
        set.add(container, cls)
    elif issubclass(kind, WeakSet):
        container.add(cls)
    elif issubclass(kind, WeakKeyDictionary):
        container.setdefault(cls, container[original])
    elif not dict.__contains__(container, cls):
        put = OrderedDict.__setitem__ if issubclass(kind, OrderedDict) else dict.__setitem__
        put(container, cls, dict.__getitem__(container, original))


def notes(classes: Iterable[type]) -> tuple[str, ...]:
    """For a plan that patches modules of these classes: where they are looked up by class, and what becomes of it."""
    wanted = {cls: None for cls in classes if not is_patched(cls)}
    with _LOCK:
        _fill(wanted)
        known = _containers()
        registered, listed = _registering(wanted, known), _listing(wanted, known)
        return tuple(dict.fromkeys(note for cls in wanted for note in _notes_of(cls, registered[cls], listed[cls])))


def _notes_of(cls: type, registered: Iterable[Named], listed: Iterable[Named]) -> Iterator[str]:
    for name in _names(registered):
        yield f"{name} has an entry for {cls.__name__}; apply enters the patched class beside it"
    for name in _names(listed):
        yield (
            f"{name} lists {cls.__name__}; isinstance finds patched modules in it, code that compares type(module) or "
            "looks it up does not: leave them out with exclude= where it does so"
        )


def _names(found: Iterable[Named]) -> Iterable[str]:
    """Each container's first name."""
    names: dict[int, str] = {}
    for name, container in found:
        names.setdefault(id(container), name)
    return names.values()


def _registering(classes: Collection[type], known: Iterable[Named]) -> dict[type, list[Named]]:
    """The registries that have each of `classes` as a key or element."""
    found: dict[type, list[Named]] = {cls: [] for cls in classes}
    for named in known:
        contains = _contains(type(named.container))
        if contains is None:
            continue
        for cls in classes:
            if contains(named.container, cls) and not _is_memory(named.container, cls):
                found[cls].append(named)
    return found


def _listing(classes: Collection[type], known: Iterable[Named]) -> dict[type, list[Named]]:
    """Where each of `classes` stands in a list, in what cannot be written, or in a tuple that is an element or a key.
    Each container is looked through once: there are thousands, and a plan asks for all."""
    found: dict[type, list[Named]] = {cls: [] for cls in classes}
    wanted = {id(cls): cls for cls in classes}
    for named in known:
        kind = type(named.container)
        if kind is not dict and not issubclass(kind, _READ_THROUGH):
            continue
        items = _items(named.container)
        seen = set(map(id, items)) if kind is not dict and issubclass(kind, _LISTS) else set[int]()
        if tuple in map(type, items):
            seen.update(id(part) for item in items if type(item) is tuple for part in item)
        for key in wanted.keys() & seen if seen else ():
            found[wanted[key]].append(named)
    return found


def _contains(kind: type) -> Callable[[Any, type], bool] | None:
    """How a registry of this kind is asked for a class; None for what is none. A library's own subclass of dict or set
    may import what it looks up, so that its methods are not asked."""
    if kind is dict or issubclass(kind, dict):
        return dict.__contains__
    if issubclass(kind, set):
        return set.__contains__
    return operator.contains if issubclass(kind, (WeakKeyDictionary, WeakSet)) else None


def _is_memory(registry: Any, cls: type) -> bool:
    """Whether it has a class for `cls` that a program derived from it, as FSDP2 does: then the dict is its memory of
    what it made, and a patched class must get one of its own. A class that can be imported was written."""
    kind = type(registry)
    if issubclass(kind, dict):
        value = dict.__getitem__(registry, cls)
    elif issubclass(kind, WeakKeyDictionary):
        value = registry[cls]
    else:
        return False
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
    """Every container of classes in the loaded modules. Modules are read once, and again when their globals, or a table
    among these, are more or fewer than they were: reading all takes far longer than a plan."""
    for name in _walked.keys() - sys.modules.keys():
        del _walked[name]
    for name, module in list(sys.modules.items()):
        before = _walked.get(name)
        if before is not None and before.is_current(module):
            continue
        space = getattr(module, "__dict__", None)
        if type(space) is dict and not _is_ours(name):
            found = tuple(_containers_of(name, space))
            known = {id(named.container) for named in found}
            lengths = ((key, _length(value)) for key, value in list(space.items()) if id(value) not in known)
            _walked[name] = _Walked(module, len(space), found, tuple(each for each in lengths if each[1] >= 0))
    return [named for walked in _walked.values() for named in walked.containers]


def _is_ours(module: str) -> bool:
    """Of this package, or of a copy that the `kernels` library loaded: "_rmsnorm_patch_<what it was built for>"."""
    own, top = (name.partition(".")[0] for name in (__name__, module))
    return top == own or top.startswith(f"_{own}_")


def _containers_of(name: str, space: dict[str, Any]) -> Iterator[Named]:
    for attribute, value in list(space.items()):
        if attribute.startswith("__"):
            continue
        yield from _inside(f"{name}.{attribute}", value)
        if _is_class(value):
            if value.__module__ == name:
                for inner, held in list(vars(value).items()):
                    if not inner.startswith("__"):
                        yield from _inside(f"{name}.{attribute}.{inner}", held)
                        yield from _attributes(f"{name}.{attribute}.{inner}", held)
        else:
            yield from _attributes(f"{name}.{attribute}", value)


def _attributes(name: str, value: Any) -> Iterator[Named]:
    """The containers that an object holds: a registry is often one. Nothing of its own runs."""
    kind = type(value)
    if not kind.__flags__ & DEFINED_IN_PYTHON or issubclass(kind, (ModuleType, type)):
        return
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return
    for attribute, inner in list(held.items()) if type(held) is dict else ():
        yield from _inside(f"{name}.{attribute}", inner)


def _inside(name: str, value: Any, depth: int = 0) -> Iterator[Named]:
    """`value`, if it is a container that may hold classes, else those that it holds."""
    kind = type(value)
    if not issubclass(kind, _KINDS):
        return
    if _may_hold_classes(value):
        yield Named(name, value)
    elif depth < 2 and issubclass(kind, (dict, list, tuple)):
        held = dict.items(value) if issubclass(kind, dict) else enumerate(_own_iterator(value))
        for key, inner in list(held):
            if issubclass(type(inner), _KINDS):
                shown = repr(key) if type(key) in (str, int) else "..."
                yield from _inside(f"{name}[{shown}]", inner, depth + 1)


def _may_hold_classes(value: Any) -> bool:
    """An empty dict or set may be filled later."""
    items = _items(value)
    if not items:
        return issubclass(type(value), _KEYED)
    kinds = set(map(type, items))
    if any(issubclass(kind, type) for kind in kinds):
        return True
    return tuple in kinds and any(type(item) is tuple and any(map(_is_class, item)) for item in items)


def _items(value: Any) -> list[Any]:
    return list(value if type(value) in _PLAIN else _own_iterator(value))


def _own_iterator(value: Any) -> Iterator[Any]:
    """Over what a container holds, past the methods of a library's own subclass: some import what they look up."""
    kind = type(value)
    own = next((base for base in (dict, set, list, tuple, frozenset) if issubclass(kind, base)), kind)
    return own.__iter__(value)  # type: ignore[no-any-return]


def _length(value: Any) -> int:
    """How many a dict or set holds; -1 for anything else."""
    kind = type(value)
    return dict.__len__(value) if issubclass(kind, dict) else set.__len__(value) if issubclass(kind, set) else -1


def _is_class(value: Any) -> bool:
    """`isinstance(value, type)` would ask the value for its `__class__`, which runs code of proxies."""
    return issubclass(type(value), type)
