"""Where the modules of a hand-over stand in their model.

Between a layer's add and the norm that reads its sum runs only what was read, as long as these places hold what they
held. A wrapper put there, or a module between two layers, may edit the sum; in inference mode, or through `.data`,
such an edit counts no version.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import NamedTuple

import torch.nn as nn

from ..pairs.source import NoSource, read_forward
from ..patch_state import original_class, replaced

_OUTPUT_RECORDER = "transformers.utils.output_capturing"
"""Its forward hooks (`output_hidden_states=True`) stay on every layer once used; they keep outputs and edit nothing."""


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
        places = []
        for holder_of, name, module_of, _, among in self._places:
            holder, module = holder_of(), module_of()
            if holder is None or module is None:
                return ()
            places.append(Place(holder, name, module, among))
        return tuple(places)


class Passage(NamedTuple):
    """A module whose forward only passes the sum on, `out` or in. digest: of that forward's source."""

    module: nn.Module
    out: bool
    digest: str

    @classmethod
    def through(cls, module: nn.Module, out: bool) -> Passage:
        return cls(module, out, forward_of(original_class(type(module)))[1])


class Passages:
    """Some passages, their modules held weakly, with the code that was read.

    codes: of those that a sum leaves through, the innermost first; None where a module has another source now.
    """

    __slots__ = ("_passages", "codes")

    def __init__(self, passages: Sequence[Passage] = ()) -> None:
        codes = [forward_of(original_class(type(p.module)), p.digest)[0] for p in passages]
        known = None not in codes
        self._passages = tuple((weakref.ref(p.module), p.out, p.digest, type(p.module).forward) for p in passages)
        self.codes = tuple(code for code, p in zip(codes, passages, strict=True) if p.out) if known else None

    def unchanged(self) -> bool:
        """Whether each runs the code that was read, and no hook can touch what it passes on."""
        for module_of, out, _, forward in self._passages:
            module = module_of()
            if module is None or type(module).forward is not forward or replaced(module):
                return False
            if edits_result(module) if out else module._forward_pre_hooks:
                return False
        return self.codes is not None

    def alive(self) -> tuple[Passage, ...]:
        """Those whose modules are still there."""
        held = ((module_of(), out, digest) for module_of, out, digest, _ in self._passages)
        return tuple(Passage(module, out, digest) for module, out, digest in held if module is not None)


def edits_result(module: nn.Module) -> bool:
    """Whether a hook may edit what `module` returns."""
    return any(getattr(hook, "__module__", "") != _OUTPUT_RECORDER for hook in module._forward_hooks.values())


def forward_of(cls: type, digest: str = "") -> tuple[CodeType | None, str]:
    """The code of the forward of `cls` and its digest. The code is None where the source cannot be read or is not that
    of `digest`; "" takes any."""
    return _forward_of(cls, getattr(cls, "forward", None), digest)


@functools.lru_cache(maxsize=256)
def _forward_of(cls: type, forward: object, digest: str) -> tuple[CodeType | None, str]:
    """forward: the class's at this moment."""
    try:
        source = read_forward(cls)
    except NoSource:
        return None, digest
    if digest and source.digest != digest:
        return None, digest
    return source.function.__code__, source.digest


Index = dict[int, list[Place]]
"""id of a module -> every place that it has below some parent."""


def index_of(parent: nn.Module) -> Index:
    """Where each module below `parent` stands, `parent` left out."""
    index: Index = {}
    for holder in parent.modules():
        for name, child in holder._modules.items():
            if child is not None:
                index.setdefault(id(child), []).append(Place(holder, name, child))
    return index


def between(
    parent: nn.Module,
    index: Index,
    layer: nn.Module,
    norm: nn.Module,
    receiver: nn.Module | None,
    leaves: tuple[nn.Module, ...] = (),
) -> tuple[Place, ...]:
    """The places of `layer` and `receiver` below `parent`, which runs them, and of `norm` in the one that calls it.

    leaves: the modules that pass the sum out of `layer`, the outermost last. A module appended behind one that is the
    last of its holder would run between: each but the outermost is, and where `receiver` is None the outermost too.
    """
    caller = parent if receiver is None else receiver
    ends = {id(module) for module in (layer, *leaves)[: None if receiver is None else -1]}
    places: dict[tuple[int, str], Place] = {}
    for module in (layer, receiver):
        if module is not None:
            for place in _above(parent, index, module, set()):
                among = len(place.holder._modules) if id(place.module) in ends else None
                places[id(place.holder), place.name] = place._replace(among=among)
    norms = [place for place in index.get(id(norm), ()) if place.holder is caller]
    return (*places.values(), *norms)


def _above(parent: nn.Module, index: Index, module: nn.Module, seen: set[int]) -> Iterator[Place]:
    """Every place of `module` below `parent`, and those of its holders."""
    seen.add(id(module))
    for place in index.get(id(module), ()):
        yield place
        if place.holder is not parent and id(place.holder) not in seen:
            yield from _above(parent, index, place.holder, seen)
