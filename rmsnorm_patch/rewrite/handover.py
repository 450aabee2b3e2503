"""Hand-over of a normed tensor from the last add of one layer to the norm that reads its sum.

The layer's contract does not change: it returns the sum. The normed tensor rides on that very tensor object, and the
next norm takes it only where it is certain to be what it would compute itself: the same tensor object, not written to
since (version counter), computed for this norm object as it is patched now, with the weight (object and version) and
eps that it has now.
Anything else, a layer dropped, reordered, shared or left early, a hook that edits, a copy of the tensor, finds no
match and computes.

`put` and `take` are the two ends; where launcher.c is in use, launcher_hand_over.h does both without Python code.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..patch_state import STATE
from . import observe
from .counts import calls_of
from .places import Passage, Passages, Place, Places, forward_of

CARRIED = "_rmsnorm_patch_normed"
"""Attribute of a sum tensor that holds its Carry."""
LINK = "next"
"""Key in a layer's state that holds its Link."""
CHAIN = "chain"
"""Key in the state of the module that runs the layers; holds its HandOvers."""
MAX_UNTAKEN = 64
"""After so many hand-overs in a row that no norm took (its layer was removed, say), a link rests (`Link.rests`)."""


class Carry(NamedTuple):
    """What rides on a sum tensor; launcher_hand_over.h makes it too. Copies and pickles of the tensor carry nothing.

    total: id of the sum (a reference would be a cycle, and keep every layer's sum until the next collection).
    version, written: of the sum and of the weight, None where none is counted. weight, eps: those that `normed` was
    computed with. backend: who computed it (as `observe.Event` says it); "" where nobody observed that.
    """

    normed: torch.Tensor
    total: int
    version: int | None
    norm: nn.Module
    weight: torch.Tensor | None
    written: int | None
    eps: float
    kernel: Any
    link: Any
    backend: str

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def put(
    normed: torch.Tensor,
    total: torch.Tensor,
    norm: nn.Module,
    weight: torch.Tensor | None,
    eps: float,
    kernel: Any,
    link: Link,
    backend: str = "",
) -> None:
    """Let `normed`, which `backend` made, ride on `total`, of which it is the norm."""
    version = None if total.is_inference() else total._version
    written = None if weight is None or weight.is_inference() else weight._version
    link.untaken += 1
    link.given += 1
    total.__dict__[CARRIED] = Carry(normed, id(total), version, norm, weight, written, eps, kernel, link, backend)


def _nothing() -> None:
    """What a pickled Carry or a copied one comes back as."""


def take(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """The tensor that `norm` would compute from `hidden_states`, where the layer before left it there; else None.

    Drops it from `hidden_states` in any case, and reports "taken" to an observer. Never call it with grad enabled or
    inside a compiled region: nothing is left there, and the look-up is not traceable.
    """
    carried = hidden_states.__dict__.pop(CARRIED, None)
    if carried is None:
        return None
    if (
        carried.norm is not norm
        or carried.kernel.cls is not norm.__class__  # patched anew in between
        or carried.total != id(hidden_states)
        or (carried.version is not None and carried.version != hidden_states._version)
        or carried.weight is not carried.kernel.weight_of(norm)
        or (carried.written is not None and carried.written != carried.weight._version)
        or carried.eps != carried.kernel.eps_of(norm)
    ):
        return None
    carried.link.untaken = 0
    calls_of(norm).handed_over += 1
    if observe.active:
        backend = carried.backend or carried.kernel.backend(hidden_states, carried.weight, hidden_states)
        observe.report(observe.Event("taken", norm, (hidden_states,), carried.normed, None, backend))
    return carried.normed


class Link:
    """From a layer to the norm that reads its sum. Weak references: a model must die with its last user.

    loop: the forward that runs the layers. Only while this very code is the layer's caller is anything handed over:
        what a user's own loop does with the sum was not read, and an edit through `.data`, another library's kernel
        or in inference mode counts no version.
    places: where the modules that this code runs stood; nothing is handed over once one of them was moved or wrapped.
    passive: that code and the layers' do nothing between the add and the norm but pass the tensor on. Without it, an
        inference tensor, which has no version counter, is never handed over.
    depth, caller: how many frames up from `layer_calls.tail` that code and torch's module call ran last time.
    given: hand-overs so far. untaken: those in a row that no norm took. skipped, shape: while it rests, how many calls
        it has left out, and the shape of the sum that was not taken.
    """

    __slots__ = (
        "caller",
        "depth",
        "given",
        "loop",
        "norm",
        "passive",
        "places",
        "receiver",
        "shape",
        "skipped",
        "untaken",
    )

    def __init__(
        self,
        norm: nn.Module | None = None,
        receiver: nn.Module | None = None,
        loop: CodeType | None = None,
        passive: bool = False,
        places: tuple[Place, ...] = (),
    ) -> None:
        self.norm = _gone if norm is None else weakref.ref(norm)
        self.receiver = None if receiver is None else weakref.ref(receiver)
        self.loop = loop
        self.passive = passive
        self.places = Places(places)
        self.given = 0
        self.untaken = 0
        self.skipped = 0
        self.shape: torch.Size | None = None
        self.depth = 0
        self.caller = 0

    def rests(self, total: torch.Size | None) -> bool:
        """Whether nothing is handed over now, for a sum of shape `total`: after MAX_UNTAKEN in vain, except for every
        MAX_UNTAKEN-th call, and at once for another shape, since a prompt with images may be edited where a step of
        decoding is not. One that is taken ends the rest; as many trials in vain end the second exception."""
        in_vain = self.untaken - MAX_UNTAKEN
        if in_vain < 0:
            return False
        if in_vain == 0 and self.skipped == 0:
            self.shape = total
        if self.skipped + 1 < MAX_UNTAKEN and (self.shape == total or in_vain >= MAX_UNTAKEN):
            self.skipped += 1
            return True
        self.skipped, self.shape = 0, total
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link()  # a layer copied alone has no next one; with its model, the copied HandOvers links it again

    def __reduce__(self) -> tuple[Any, ...]:
        return Link, ()


class LinkThrough(Link):
    """A link whose sum passes through the forward of other modules, `passages`, on its way.

    loop: None while one of them has another forward or a hook that may edit. launcher_hand_over.h asks for it too.
    """

    __slots__ = ("_code", "passages")

    def __init__(
        self,
        norm: nn.Module,
        receiver: nn.Module | None,
        loop: CodeType | None,
        passive: bool,
        places: tuple[Place, ...],
        passages: tuple[Passage, ...],
    ) -> None:
        self.passages = Passages(passages)
        super().__init__(norm, receiver, loop, passive, places)

    @property
    def loop(self) -> CodeType | None:  # type: ignore[override]
        return self._code if self.passages.unchanged() else None

    @loop.setter
    def loop(self, code: CodeType | None) -> None:
        self._code = code


def _gone() -> None:
    return None


class HandOver(NamedTuple):
    """One hand-over: the layer whose last add it is, the norm, the layer that calls the norm (None: the model), and
    where they stand; passages: the modules in between that only pass the sum on."""

    layer: nn.Module
    norm: nn.Module
    receiver: nn.Module | None
    passive: bool
    places: tuple[Place, ...] = ()
    passages: tuple[Passage, ...] = ()


class HandOvers:
    """All hand-overs below one module, kept in its state so that a copy or a pickle of it links its own layers.

    Weak references here too: a layer that was removed from the model must not stay in memory.
    """

    def __init__(self, steps: Iterable[HandOver] = (), runner: type | None = None, digest: str = "") -> None:
        """runner: the unpatched class of the module that runs the layers. digest: of its forward's source where it was
        read; "" reads it now. With another source (a pickle, another version of the model's code) nothing is handed
        over: what that code does with a sum was not read."""
        self.runner = runner
        self._loop, self.digest = (None, digest) if runner is None else forward_of(runner, digest)
        self._links = tuple((weakref.ref(step.layer), self.link(step)) for step in steps)

    @property
    def steps(self) -> tuple[HandOver, ...]:
        """Those whose modules are still there."""
        alive = []
        for layer_of, link in self._links:
            layer, norm = layer_of(), link.norm()
            receiver = None if link.receiver is None else link.receiver()
            places = link.places.alive()
            passages = link.passages.alive() if isinstance(link, LinkThrough) else ()
            if layer is not None and norm is not None and places and (receiver is not None or link.receiver is None):
                alive.append(HandOver(layer, norm, receiver, link.passive, places, passages))
        return tuple(alive)

    def link(self, step: HandOver) -> Link:
        arguments = step.norm, step.receiver, self._loop, step.passive, step.places
        return LinkThrough(*arguments, step.passages) if step.passages else Link(*arguments)

    def connect(self) -> None:
        for step in self.steps:
            step.layer.__dict__.setdefault(STATE, {})[LINK] = self.link(step)

    def __deepcopy__(self, memo: dict[int, Any]) -> HandOvers:
        copied = [
            step for step in self.steps if all(id(p.holder) in memo and id(p.module) in memo for p in step.places)
        ]
        handed = HandOvers([copy.deepcopy(step, memo) for step in copied], self.runner, self.digest)
        handed.connect()
        return handed

    def __reduce__(self) -> tuple[Any, ...]:
        return HandOvers, (), {"steps": self.steps, "runner": self.runner, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["steps"], state["runner"], state["digest"])  # type: ignore[misc]
        self.connect()
