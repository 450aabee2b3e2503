"""Where the modules of a hand-over stand in their model.

Between a layer's add and the norm that reads its sum runs only what was read, as long as these places hold what they
held. A wrapper put there, or a module between two layers, may edit the sum; in inference mode, or through `.data`,
such an edit counts no version.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch.nn as nn


class Place(NamedTuple):
    """`module` is the child `name` of `holder`. among: how many children `holder` has, where one more would matter."""

    holder: nn.Module
    name: str
    module: nn.Module
    among: int | None = None


class Places:
    """Some places, held weakly."""

    __slots__ = ("_places",)

    def __init__(self, places: Sequence[Place] = ()) -> None:
        self._places = tuple(
            (weakref.ref(p.holder), p.name, weakref.ref(p.module), type(p.module), p.among) for p in places
        )

    def unchanged(self) -> bool:
        """Whether each is as it was, its module of the same class; False for no places at all."""
        for holder_of, name, module_of, kind, among in self._places:
            holder, module = holder_of(), module_of()
            if holder is None or module is None or module.__class__ is not kind:
                return False
            modules = holder._modules
            if modules.get(name) is not module or (among is not None and len(modules) != among):
                return False
        return bool(self._places)

    def alive(self) -> tuple[Place, ...]:
        """Those whose modules are still there; () where one is gone."""
        found = []
        for holder_of, name, module_of, _, among in self._places:
            holder, module = holder_of(), module_of()
            if holder is None or module is None:
                return ()
            found.append(Place(holder, name, module, among))
        return tuple(found)


Index = dict[int, list[Place]]
"""id of a module -> every place that it has below some parent."""


def index_of(parent: nn.Module) -> Index:
    found: Index = {}
    for holder in parent.modules():
        for name, child in holder._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append(Place(holder, name, child))
    return found


def between(
    parent: nn.Module, index: Index, layer: nn.Module, norm: nn.Module, receiver: nn.Module | None
) -> tuple[Place, ...]:
    """The places of `layer` and `receiver` below `parent`, which runs them, and of `norm` in the one that calls it.

    receiver None: `parent` calls the norm after its last layer, and a module appended to the layers would run between.
    """
    caller = parent if receiver is None else receiver
    found: dict[tuple[int, str], Place] = {}
    for module in (layer, receiver):
        if module is not None:
            for place in _above(parent, index, module, set()):
                among = len(place.holder._modules) if receiver is None and place.module is layer else None
                found[id(place.holder), place.name] = place._replace(among=among)
    norms = [place for place in index.get(id(norm), ()) if place.holder is caller]
    return (*found.values(), *norms)


def _above(parent: nn.Module, index: Index, module: nn.Module, seen: set[int]) -> Iterator[Place]:
    """Every place of `module` below `parent`, and those of its holders."""
    seen.add(id(module))
    for place in index.get(id(module), ()):
        yield place
        if place.holder is not parent and id(place.holder) not in seen:
            yield from _above(parent, index, place.holder, seen)
