"""Residual-add and norm pairs of a model: within a layer, from a layer to the next, and to the final norm.

A pair is read from the source of the layer's forward (`dataflow`) and confirmed by a trace of it (`trace`); the order
of the layers is read from the forward that runs them (`order`). What cannot be read is left alone with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch.nn as nn

from ..backends.names import Backend
from ..scan.plan import NormSite, PairSite, QueryKeySite
from .containers import is_container
from .layer import Layer, decide, in_layer_sites, read_layer
from .order import Order, PlannedStep
from .query_key import Attention, read_attention
from .source import NoSource


@dataclass
class ModelLayout:
    """What was read from a model. `unread`: (layer path, norm path, why) for forwards without readable source.
    `apart`: what runs one after the other without a hand-over. `attentions`: those that norm a query and a key."""

    layers: dict[str, Layer] = field(default_factory=dict)
    steps: list[PlannedStep] = field(default_factory=list)
    unread: list[tuple[str, str, str]] = field(default_factory=list)
    apart: list[PairSite] = field(default_factory=list)
    attentions: dict[str, Attention] = field(default_factory=dict)

    def pairs(self) -> tuple[PairSite, ...]:
        """Every pair, in the order of the layers."""
        found = [PairSite("in_layer", path, norm, "leave", reason) for path, norm, reason in self.unread]
        for layer in self.layers.values():
            found.extend(in_layer_sites(layer))
            for step in self.steps:
                if step.layer is layer:
                    action, reason = decide(step.site, step.reason)
                    tail = layer.flow.tail
                    where = layer.source.where(tail.node) if tail is not None else ""
                    found.append(PairSite(step.kind, layer.path, step.site.path, action, reason, where))
            found.extend(site for site in dict.fromkeys(self.apart) if site.layer == layer.path)
        found.extend(site for site in dict.fromkeys(self.apart) if site.layer not in self.layers)
        return tuple(found)

    def query_key(self, pairs: Iterable[PairSite], backend: Backend) -> tuple[QueryKeySite, ...]:
        """Every attention's query and key norms. pairs, backend: those of the plan."""
        rewritten = frozenset(pair.layer for pair in pairs if pair.action == "fuse")
        attentions = self.attentions.values()
        return tuple(site for attention in attentions for site in attention.sites(rewritten, backend))


def layout(model: nn.Module, norm_sites: Iterable[NormSite]) -> ModelLayout:
    """Read every layer and loop of `model`."""
    sites = {}
    for site in norm_sites:
        if site.gating is not None:
            continue  # a gated norm reads a mixer's output and no sum
        sites[id(model.get_submodule(site.path))] = site
    found = ModelLayout()
    for path, module in model.named_modules():
        below = dict(_norms_below(module, sites))
        if below and not is_container(module):
            attention = read_attention(path, module, below)
            if attention is not None:
                found.attentions[path] = attention
            try:
                layer = read_layer(path, module, below)
            except NoSource as reason:
                found.unread += [(path, site.path, str(reason)) for site in below.values()]
                continue
            if layer is not None:
                found.layers[path] = layer
    order = Order(found.layers.values(), sites, {id(module): path for path, module in model.named_modules()})
    for _, parent in reversed(list(model.named_modules())):  # what a module runs comes before it
        order.read(parent)
    order.read_root(model)
    found.steps, found.apart = order.settled()
    return found


def _norms_below(module: nn.Module, sites: dict[int, NormSite], path: str = "") -> Iterator[tuple[str, NormSite]]:
    """The norms among the children of `module` and in their lists and dictionaries."""
    for name, child in module._modules.items():
        if id(child) in sites:
            yield path + name, sites[id(child)]
        elif child is not None and is_container(child):
            yield from _norms_below(child, sites, f"{path}{name}.")
