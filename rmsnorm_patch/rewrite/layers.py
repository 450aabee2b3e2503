"""Layers of a model that hold fused pairs: each gets a class whose forward is rewritten, and is linked to the norm that
reads its sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn as nn

from ..pairs.layout import ModelLayout, PlannedStep
from ..pairs.recompile import LayerKey, layer_key, rewrite
from ..pairs.source import read_again
from ..patch_state import original_class
from ..scan.plan import Plan
from . import handover, instance_forward, layer_calls, norm_adds
from .classes import Body, patched_class, register_factory
from .handover import HandOver
from .journal import Journal
from .places import Index, Passage, between, index_of

ROLE = "layer"
_HELPERS: dict[str, Callable[..., Any]] = {
    "watch": layer_calls.watch,
    "in_layer": layer_calls.in_layer,
    "tail": layer_calls.tail,
    "entry": layer_calls.entry,
    "norm_add": norm_adds.norm_add,
    "norm_add_norm": norm_adds.norm_add_norm,
    "norm_add_tail": norm_adds.norm_add_tail,
}


def layer_factory(original: type, key: LayerKey) -> Body:
    """The patched class has a `forward` of its own, unless the source is not the one that the key was made for."""
    key = LayerKey(*key)
    source = read_again(original, key.digest)
    if source is None:
        return Body({}, lambda cls: None)
    return Body(*rewrite(source, key, original, _HELPERS))


register_factory(ROLE, layer_factory)


def install(plan: Plan, layout_read: ModelLayout, journal: Journal) -> None:
    """Swap the classes of the layers that hold the plan's fused pairs, and link each to the norm that reads its sum.

    layout_read: of the model when `plan` was made.
    """
    fused: set[tuple[str, str, str]] = {(p.kind, p.layer, p.norm) for p in plan.pairs if p.action == "fuse"}
    handing_over = any(p.kind == "cross_layer" and p.action == "fuse" for p in plan.pairs)
    for layer in layout_read.layers.values():
        in_layer = frozenset(
            add.index
            for add, norm in layer.live_pairs()
            if ("in_layer", layer.path, layer.norm_path(norm.attr)) in fused
        )
        tail = any(s.layer is layer and (s.kind, layer.path, s.site.path) in fused for s in layout_read.steps)
        added = frozenset(
            each.add.index
            for each in layer.live_norm_adds()
            if ("norm_add", layer.path, layer.norm_path(each.attr)) in fused
        )
        if in_layer or tail or added:
            original = type(layer.module)
            entry = layer.live_entry() if handing_over else None
            entries = frozenset() if entry is None or layer.norms[entry.attr].action != "fuse" else {entry.attr}
            key = layer_key(original, layer.norm_attributes, in_layer, tail, frozenset(entries), added)
            journal.swap_class(layer.module, patched_class(original, ROLE, key))
            instance_forward.adopt(layer.module, original, journal)
    for parent, steps in _chains(layout_read, fused):
        chain = handover.HandOvers(steps, original_class(type(parent)))
        journal.set_state(parent, handover.CHAIN, chain)
        for step in chain.steps:
            journal.set_state(step.layer, handover.LINK, chain.link(step))


def _chains(layout_read: ModelLayout, fused: set[tuple[str, str, str]]) -> Iterator[tuple[nn.Module, list[HandOver]]]:
    """For each module that runs layers: its hand-overs among `fused` (kind, layer path, norm path)."""
    parents = {id(step.parent): step.parent for step in layout_read.steps}
    for parent in parents.values():
        index = index_of(parent)
        steps = [
            _step(s, index)
            for s in layout_read.steps
            if s.parent is parent and (s.kind, s.layer.path, s.site.path) in fused
        ]
        if steps:
            yield parent, steps


def _step(planned: PlannedStep, index: Index) -> HandOver:
    """index: of the parent."""
    layer, receiver = planned.layer.module, None if planned.receiver is None else planned.receiver.module
    places = between(planned.parent, index, layer, planned.norm, receiver, planned.leaves)
    passages = [Passage.through(module, out=True) for module in planned.leaves]
    passages += [Passage.through(module, out=False) for module in planned.enters]
    return HandOver(layer, planned.norm, receiver, planned.passive, places, tuple(passages))
