"""Residual-add and norm pairs of a model: within a layer, from a layer to the next, and to the final norm.

A pair is read from the source of the layer's forward (`dataflow`) and confirmed by a trace of it (`trace`); the order
of the layers is read from the forward that runs them (`loops`). What cannot be read is left alone with a reason.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch.nn as nn

from ..patch_state import foreign, original_class
from ..scan.plan import Action, NormSite, PairKind, PairSite
from .dataflow import Add, Flow, NormCall, analyse, possible_pairs, runs_first
from .loops import LayerLoop, layer_loops
from .recompile import HELPERS, LayerKey, rewrite
from .source import NoSource, Source, read_forward
from .trace import Calls, Pair, Trace, holds, trace_calls, trace_layer


def _uncalled(*operands: object) -> None:
    """Stands in a forward that is compiled only to see whether it can be."""


_UNCALLED = dict.fromkeys(HELPERS, _uncalled)


@dataclass
class Layer:
    """One module whose forward was read. `norms`: attribute -> site, of its own norm children. `below`: path -> site,
    of these and of the norms in its lists and dictionaries of modules, which only the trace knows."""

    path: str
    module: nn.Module
    cls: type
    source: Source
    flow: Flow
    norms: dict[str, NormSite]
    below: dict[str, NormSite]
    trace: Trace | None = None
    reason: str = ""

    @property
    def norm_attributes(self) -> frozenset[str]:
        return frozenset(self.norms)

    def norm_path(self, attribute: str) -> str:
        return self.norms[attribute].path

    def live_pairs(self) -> list[tuple[Add, NormCall]]:
        """The in-layer pairs that this instance runs (an `if` on its attributes may leave some out)."""
        return [] if self.reason else [pair for pair in self.flow.in_layer if self._ran(*pair)]

    def live_tail(self) -> Add | None:
        tail = self.flow.tail
        if tail is not None and tail.shared:
            return None
        ran = not self.reason and self.trace is not None and tail is not None and holds(tail.node, self.trace.tail)
        return tail if ran else None

    def live_entry(self) -> NormCall | None:
        if self.reason or self.trace is None:
            return None
        return next((call for call in self.flow.entries if call.attr == self.trace.entry), None)

    def confirm(self) -> None:
        """Ask the trace; where it and the source do not name the same pairs, `reason` says so."""
        obstacle = foreign(self.module)
        if obstacle is not None:
            self.reason = f"its forward is not its class's: {obstacle}"
            return
        try:
            self.trace = trace_layer(self.module, self.cls, self.source, frozenset(self.below))
        except NoSource as reason:
            self.reason = str(reason)
            return
        for add, norm in self.flow.in_layer:
            if add.unconditional and norm.unconditional and not self._ran(add, norm):
                self.reason = f"a trace of its forward did not confirm the pair of line {add.node.lineno}"

    def unshown(self) -> Iterator[tuple[Pair, str]]:
        """The pairs that the trace found and the source does not show, with why they are left alone."""
        known: list[tuple[ast.AST, str]] = [(add.node, norm.attr) for add, norm in self.flow.in_layer]
        known += [(node, attr) for node, attr, _ in self.flow.refused]
        for pair in sorted(() if self.trace is None else self.trace.pairs):
            if not any(pair.norm == attr and holds(node, pair.line) for node, attr in known):
                why = f"a trace of its forward found a pair at line {pair.line} that its source does not show"
                yield pair, f"{why}: {pair.how}" if pair.how else why

    def _ran(self, add: Add, norm: NormCall) -> bool:
        pairs = () if self.trace is None else self.trace.pairs
        return any(norm.attr == pair.norm and holds(add.node, pair.line) and not pair.how for pair in pairs)


@dataclass(frozen=True)
class PlannedStep:
    """A layer's last add and the norm that reads its sum; `receiver`: the layer that calls the norm, or None."""

    kind: PairKind
    parent: nn.Module
    layer: Layer
    site: NormSite
    norm: nn.Module
    receiver: Layer | None
    passive: bool

    @property
    def reason(self) -> str:
        """What happens, for the plan."""
        handed = "its sum is handed to the next norm"
        if self.passive:
            return handed
        return f"{handed}, except in inference mode: code runs in between, and no version would show that it wrote"

    def left(self, why: str) -> PairSite:
        """What the plan says where this is not done."""
        return PairSite(self.kind, self.layer.path, self.site.path, "leave", why)


@dataclass
class Layout:
    """What was read from a model. `unread`: (layer path, norm path, why) for forwards without readable source.
    `apart`: what a loop runs one after the other without a hand-over."""

    layers: dict[str, Layer] = field(default_factory=dict)
    steps: list[PlannedStep] = field(default_factory=list)
    unread: list[tuple[str, str, str]] = field(default_factory=list)
    apart: list[PairSite] = field(default_factory=list)

    def pairs(self) -> tuple[PairSite, ...]:
        """Every pair, in the order of the layers."""
        found = [PairSite("in_layer", path, norm, "leave", reason) for path, norm, reason in self.unread]
        for layer in self.layers.values():
            found.extend(_in_layer_sites(layer))
            for step in self.steps:
                if step.layer is layer:
                    action, reason = _decide(step.site, step.reason)
                    tail = layer.flow.tail
                    where = layer.source.where(tail.node) if tail is not None else ""
                    found.append(PairSite(step.kind, layer.path, step.site.path, action, reason, where))
            found.extend(site for site in dict.fromkeys(self.apart) if site.layer == layer.path)
        return tuple(found)


def _in_layer_sites(layer: Layer) -> Iterator[PairSite]:
    for add, norm in layer.flow.in_layer if layer.reason else layer.live_pairs():
        site = layer.norms[norm.attr]
        alone = " where nobody else holds the tensor that the add writes" if add.in_place else ""
        action, reason = _decide(site, f"add and norm in one call{alone}")
        if layer.reason:
            action, reason = "leave", layer.reason
        yield PairSite("in_layer", layer.path, site.path, action, reason, layer.source.where(add.node))
    for node, attr, why in layer.flow.refused:
        yield PairSite("in_layer", layer.path, layer.norm_path(attr), "leave", why, layer.source.where(node))
    if layer.trace is None:
        known = {norm.attr for _, norm in layer.flow.in_layer} | {attr for _, attr, _ in layer.flow.refused}
        for node, attr in possible_pairs(layer.source.tree, layer.norm_attributes - known):
            yield PairSite(
                "in_layer", layer.path, layer.norm_path(attr), "leave", layer.reason, layer.source.where(node)
            )
    for pair, why in layer.unshown():
        where = layer.source.at(pair.line)
        yield PairSite("in_layer", layer.path, layer.below[pair.norm].path, "leave", why, where)
    for attr, add in layer.flow.norm_add:
        reason = "the norm comes before the add; the norm alone is fused"
        yield PairSite("norm_add", layer.path, layer.norm_path(attr), "leave", reason, layer.source.where(add.node))


def _decide(site: NormSite, reason: str) -> tuple[Action, str]:
    if site.action != "fuse":
        return "leave", f"its norm is left alone: {site.reason}"
    return "fuse", reason


def layout(model: nn.Module, norm_sites: Iterable[NormSite]) -> Layout:
    """Read every layer and loop of `model`."""
    sites = {}
    for site in norm_sites:
        sites[id(model.get_submodule(site.path))] = site
    found = Layout()
    by_id: dict[int, Layer] = {}
    for path, module in model.named_modules():
        below = dict(_norms_below(module, sites))
        if below and type(module) not in _CONTAINERS:
            _read_layer(found, by_id, path, module, below)
    ends: dict[int, Ends] = {id(layer.module): Ends.of(layer) for layer in by_id.values()}
    for _, parent in reversed(list(model.named_modules())):  # what a module runs comes before it
        _read_order(found, by_id, sites, ends, parent)
    _settle(found)
    return found


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Ends(NamedTuple):
    """Where hidden states enter and leave a module. tail: the layer whose last add it returns. entry: the norm that
    reads its argument, or, where `copied`, a copy of it."""

    tail: Layer | None
    entry: NormSite | None
    copied: bool = False

    @classmethod
    def of(cls, layer: Layer) -> Ends:
        if layer.trace is None:
            return cls(None, None)
        entry = layer.below.get(layer.trace.entry) or layer.below.get(layer.trace.copied)
        copied = layer.trace.entry not in layer.below and entry is not None
        return cls(layer if layer.trace.tail else None, entry, copied)


def _norms_below(module: nn.Module, sites: dict[int, NormSite], path: str = "") -> Iterator[tuple[str, NormSite]]:
    """The norms among the children of `module` and in their lists and dictionaries."""
    for name, child in module._modules.items():
        if id(child) in sites:
            yield path + name, sites[id(child)]
        elif child is not None and type(child) in _CONTAINERS:
            yield from _norms_below(child, sites, f"{path}{name}.")


def _settle(found: Layout) -> None:
    """One hand-over for each layer: a layer whose sum different norms may read (two loops over it) has none."""
    by_layer: dict[str, list[PlannedStep]] = {}
    for step in found.steps:
        by_layer.setdefault(step.layer.path, []).append(step)
    found.steps = []
    for same in by_layer.values():
        if all(step.norm is same[0].norm and step.parent is same[0].parent for step in same):
            found.steps.append(replace(same[0], passive=all(step.passive for step in same)))
        else:
            several = "its sum may be read by different norms: more than one loop runs it"
            found.apart += [step.left(several) for step in same]


def _read_layer(
    found: Layout, by_id: dict[int, Layer], path: str, module: nn.Module, below: dict[str, NormSite]
) -> None:
    norms = {name: site for name, site in below.items() if "." not in name}
    cls = original_class(type(module))
    try:
        source, flow, obstacle = _read_class(cls, getattr(cls, "forward", None), frozenset(norms))
    except NoSource as reason:
        found.unread += [(path, site.path, str(reason)) for site in below.values()]
        return
    layer = Layer(path, module, cls, source, flow, norms, below, reason=obstacle)
    if not obstacle:
        layer.confirm()
    shown = flow.in_layer or flow.refused or flow.norm_add or flow.tail is not None or flow.entries
    guessed = layer.trace is None and possible_pairs(source.tree, frozenset(norms))
    if shown or guessed or (layer.trace is not None and layer.trace.pairs):
        by_id[id(module)] = found.layers[path] = layer


@functools.lru_cache(maxsize=1024)
def _read_class(cls: type, forward: object, norms: frozenset[str]) -> tuple[Source, Flow, str]:
    """Source and flow, and why the forward cannot be rewritten, or "". forward: the class's at this moment."""
    source = read_forward(cls)
    flow = analyse(source.tree, norms, source.sums)
    try:
        adds, entries = (add.index for add, _ in flow.in_layer), (call.attr for call in flow.entries)
        rewrite(source, LayerKey(tuple(norms), tuple(adds), True, tuple(entries), ""), cls, _UNCALLED)
    except (NoSource, SyntaxError) as error:
        return source, flow, f"its forward cannot be rewritten: {error}"
    return source, flow, ""


def _read_order(
    found: Layout, by_id: dict[int, Layer], sites: dict[int, NormSite], ends: dict[int, Ends], parent: nn.Module
) -> None:
    """The pairs from one module that `parent` runs to another, and the ends of `parent` itself."""
    loops = layer_loops(parent, original_class(type(parent)))
    if loops:
        _read_loops(found, by_id, sites, parent, loops)
        for loop in loops:
            readers = [*loop.modules[1:], *([loop.final] if loop.final is not None else [])]
            for module, reader in zip(loop.modules, readers, strict=False):
                _list_apart(found, sites, ends, module, reader, _THROUGH)
        return
    if type(parent) not in _CONTAINERS and any(id(module) in ends for module in _children(parent)):
        _read_calls(found, by_id, sites, ends, parent)


def _read_calls(
    found: Layout, by_id: dict[int, Layer], sites: dict[int, NormSite], ends: dict[int, Ends], parent: nn.Module
) -> None:
    """`_read_order` where no loop was read: by a trace, also of each `nn.Sequential` that is called as a module."""
    cls = original_class(type(parent))
    try:
        if foreign(parent) is not None:
            return
        calls = trace_calls(parent, cls, read_forward(cls))
    except NoSource:
        return
    for module in calls.first.union(*calls.passes, *calls.seldom):
        if type(module) is nn.Sequential and id(module) not in ends:
            _read_calls(found, by_id, sites, ends, module)
    _read_passes(found, by_id, sites, ends, parent, calls)
    if id(parent) not in by_id:
        nothing = Ends(None, None)
        tails = {id(end.tail): end.tail for module in calls.last if (end := ends.get(id(module), nothing)).tail}
        entries = {sites.get(id(module)) or ends.get(id(module), nothing).entry for module in calls.first} - {None}
        if tails or entries:
            ends[id(parent)] = Ends(next(iter(tails.values()), None), next(iter(entries), None))


_SEVERAL = "its sum may be read by different norms"
_INDIRECT = "the layer is called by another function than the forward that was read"
_THROUGH = "its sum passes through the forward of another module"
_COPIED = "the norm reads a copy of its sum"


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Its children, and those in its lists and dictionaries of modules."""
    for child in module.children():
        yield child
        if type(child) in _CONTAINERS:
            yield from _children(child)


def _read_passes(
    found: Layout,
    by_id: dict[int, Layer],
    sites: dict[int, NormSite],
    ends: dict[int, Ends],
    parent: nn.Module,
    calls: Calls,
) -> None:
    """Hand-overs between modules that `parent` calls one after the other, in code of any form."""
    readers: dict[nn.Module, set[nn.Module]] = {}
    for module, reader in calls.passes:
        if id(reader) in sites or id(reader) in ends:
            readers.setdefault(module, set()).add(reader)
    for module, several in readers.items():
        layer = by_id.get(id(module))
        (reader, *others) = several
        receiver = by_id.get(id(reader))
        entry = None if receiver is None else receiver.live_entry()
        direct = layer is not None and module not in calls.indirect
        if (
            layer is not None
            and direct
            and not others
            and (id(reader) in sites or (receiver is not None and entry is not None))
        ):
            if receiver is not None and entry is not None:
                norm, site = receiver.module._modules[entry.attr], receiver.norms[entry.attr]
                assert norm is not None
                step = PlannedStep("cross_layer", parent, layer, site, norm, receiver, passive=False)
            else:
                step = PlannedStep("final", parent, layer, sites[id(reader)], reader, None, passive=False)
            why = _no_tail(layer, ())
            if not why:
                found.steps.append(step)
            elif layer.trace is not None and layer.trace.tail:
                found.apart.append(step.left(why))
        for other in several:
            why = _SEVERAL if others else _INDIRECT if layer is not None and not direct else _THROUGH
            _list_apart(found, sites, ends, module, other, why)
    for module, reader in calls.seldom:
        _list_apart(found, sites, ends, module, reader, _SEVERAL)


def _list_apart(
    found: Layout, sites: dict[int, NormSite], ends: dict[int, Ends], module: nn.Module, reader: nn.Module, why: str
) -> None:
    """The line of a pair that no step and no other line has."""
    nothing = Ends(None, None)
    layer = ends.get(id(module), nothing).tail
    final, end = sites.get(id(reader)), ends.get(id(reader), nothing)
    site = final or end.entry
    if layer is None or site is None:
        return
    known = {(step.layer.path, step.site.path) for step in found.steps}
    known |= {(pair.layer, pair.norm) for pair in found.apart}
    if why == _THROUGH and end.copied and final is None:
        why = _COPIED
    if (layer.path, site.path) not in known:
        found.apart.append(PairSite("final" if final else "cross_layer", layer.path, site.path, "leave", why))


def _read_loops(
    found: Layout, by_id: dict[int, Layer], sites: dict[int, NormSite], parent: nn.Module, loops: list[LayerLoop]
) -> None:
    for loop in loops:
        modules = loop.modules
        for at, module in enumerate(modules):
            layer = by_id.get(id(module))
            if layer is None:
                continue
            passive = layer.flow.tail_passive and layer.source.passes_results
            receiver = by_id.get(id(modules[at + 1])) if at + 1 < len(modules) else None
            entry = None if receiver is None else receiver.live_entry()
            if receiver is not None and entry is not None:
                norm = receiver.module._modules[entry.attr]
                assert norm is not None
                quiet = passive and loop.passive and runs_first(receiver.source.tree, entry)
                quiet = quiet and receiver.source.passes_results
                site = receiver.norms[entry.attr]
                step = PlannedStep("cross_layer", parent, layer, site, norm, receiver, quiet)
            elif at + 1 == len(modules) and loop.final is not None and id(loop.final) in sites:
                quiet = passive and loop.final_passive
                step = PlannedStep("final", parent, layer, sites[id(loop.final)], loop.final, None, quiet)
            else:
                continue
            why = _no_tail(layer, modules)
            if why:
                found.apart.append(step.left(why))
            else:
                found.steps.append(step)


def _no_tail(layer: Layer, modules: tuple[nn.Module, ...]) -> str:
    """Why a layer that these modules run in turn hands nothing over, or ""."""
    if layer.reason:
        return layer.reason
    if modules.count(layer.module) > 1:
        return "the loop runs it more than once"
    if layer.flow.tail is not None and layer.flow.tail.shared:
        return layer.flow.tail.shared
    return "" if layer.live_tail() is not None else "what it returns is not the sum of its last add alone"
