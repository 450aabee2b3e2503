"""One layer of a model: its forward read from source (`dataflow`) and confirmed by a trace of it (`trace`)."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn as nn

from ..patch_state import foreign, original_class
from ..scan.plan import Action, NormSite, PairSite
from .dataflow import Add, Flow, NormCall, analyse
from .guesses import may_return_a_sum, possible_entries, possible_pairs
from .norm_add import NormAdd, norm_adds
from .recompile import HELPERS, LayerKey, rewrite, uncalled
from .source import ForwardSource, NoSource, read_forward
from .trace import ALONE, Pair, Trace, holds, trace_layer

_UNCALLED = dict.fromkeys(HELPERS, uncalled)


@dataclass
class Layer:
    """One module whose forward was read. `norms`: attribute -> site, of its own norm children. `below`: path -> site,
    of these and of the norms in its lists and dictionaries of modules, which only the trace knows."""

    path: str
    module: nn.Module
    cls: type
    source: ForwardSource
    flow: Flow
    norm_adds: tuple[NormAdd, ...]
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

    def live_norm_adds(self) -> list[NormAdd]:
        """The adds that can be one call with the norm whose result they take, of those that this instance runs."""
        return [] if self.reason else [each for each in self.norm_adds if not each.reason and self._added(each)]

    def live_tail(self) -> Add | None:
        """The last add, where the trace shows that the source's is the one that ran."""
        tail = self.flow.tail
        if tail is not None and tail.shared:
            return None
        ran = not self.reason and self.trace is not None and tail is not None and holds(tail.node, self.trace.tail)
        return tail if ran else None

    def live_entry(self) -> NormCall | None:
        if self.reason or self.trace is None:
            return None
        return next((call for call in self.flow.entries if call.attr == self.trace.entry), None)

    def possible_entries(self) -> list[NormSite]:
        """The norms that may read its argument, where no trace tells."""
        norms = [call.attr for call in self.flow.entries] or possible_entries(self.source.tree, frozenset(self.below))
        return [self.below[path] for path in norms]

    def may_return_a_sum(self) -> bool:
        """The same for its last add."""
        return self.flow.tail is not None or may_return_a_sum(self.source.tree)

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
        known: list[tuple[ast.AST, str]] = [(add.node, norm.attr) for add, norm in self.live_pairs()]
        if self.reason:
            known += [(add.node, norm.attr) for add, norm in self.flow.in_layer]
        known += [(node, attr) for node, attr, _ in self.flow.refused]
        for pair in sorted(() if self.trace is None else self.trace.pairs):
            if not any(pair.norm == attr and holds(node, pair.line) for node, attr in known):
                why = f"a trace of its forward found a pair at line {pair.line} that its source does not show"
                yield pair, pair.how if pair.how in ALONE else f"{why}: {pair.how}" if pair.how else why

    def _added(self, made: NormAdd) -> bool:
        pairs = () if self.trace is None else self.trace.norm_adds
        return any(made.attr == pair.norm and holds(made.add.node, pair.line) and not pair.how for pair in pairs)

    def _ran(self, add: Add, norm: NormCall) -> bool:
        pairs = () if self.trace is None else self.trace.pairs
        return any(norm.attr == pair.norm and holds(add.node, pair.line) and not pair.how for pair in pairs)


def read_layer(path: str, module: nn.Module, below: dict[str, NormSite]) -> Layer | None:
    """The layer at `path`, which has the norms `below`; None where it has no pair, nor an end of one. Raises
    NoSource."""
    norms = {name: site for name, site in below.items() if "." not in name}
    cls = original_class(type(module))
    source, flow, added, obstacle = _read_class(cls, getattr(cls, "forward", None), frozenset(norms))
    layer = Layer(path, module, cls, source, flow, added, norms, below, reason=obstacle)
    if not obstacle:
        layer.confirm()
    shown = flow.in_layer or flow.refused or added or flow.tail is not None or flow.entries
    guessed = layer.trace is None and (
        possible_pairs(source.tree, frozenset(below)) or layer.possible_entries() or layer.may_return_a_sum()
    )
    traced = layer.trace is not None and (layer.trace.pairs or layer.trace.norm_adds)
    return layer if shown or guessed or traced else None


def in_layer_sites(layer: Layer) -> Iterator[PairSite]:
    """The lines of its own pairs."""
    for add, norm in layer.flow.in_layer if layer.reason else layer.live_pairs():
        site = layer.norms[norm.attr]
        alone = " where nobody else holds the tensor that the add writes" if add.in_place else ""
        action, reason = decide(site, f"add and norm in one call{alone}")
        if layer.reason:
            action, reason = "leave", layer.reason
        yield PairSite("in_layer", layer.path, site.path, action, reason, layer.source.where(add.node))
    for node, attr, why in layer.flow.refused:
        yield PairSite("in_layer", layer.path, layer.norm_path(attr), "leave", why, layer.source.where(node))
    if layer.trace is None:
        known = {norm.attr for _, norm in layer.flow.in_layer} | {attr for _, attr, _ in layer.flow.refused}
        for node, path in possible_pairs(layer.source.tree, frozenset(layer.below) - known):
            site = layer.below[path]
            yield PairSite("in_layer", layer.path, site.path, "leave", layer.reason, layer.source.where(node))
    for pair, why in layer.unshown():
        where = layer.source.at(pair.line)
        yield PairSite("in_layer", layer.path, layer.below[pair.norm].path, "leave", why, where)
    yield from _norm_add_sites(layer)


def _norm_add_sites(layer: Layer) -> Iterator[PairSite]:
    """The lines of its adds of a norm's result."""
    live, pairs = layer.live_norm_adds(), {id(add): norm.attr for add, norm in layer.live_pairs()}
    for made in layer.norm_adds:
        site = layer.norms[made.attr]
        reader = layer.norms.get(pairs.get(id(made.add), ""))
        with_next = reader is not None and reader.action == "fuse" and _alike(reader, site)
        action, reason = decide(site, "norm, add and the next norm in one call" if with_next else _ADDED)
        if made not in live:
            action, reason = "leave", layer.reason or made.reason or _NOT_ADDED
        yield PairSite("norm_add", layer.path, site.path, action, reason, layer.source.where(made.add.node))
    for pair in sorted(() if layer.trace is None else layer.trace.norm_adds):
        if not any(made.attr == pair.norm and holds(made.add.node, pair.line) for made in layer.norm_adds):
            why = f"a trace of its forward found an add at line {pair.line} that its source does not show"
            yield PairSite(
                "norm_add", layer.path, layer.below[pair.norm].path, "leave", why, layer.source.at(pair.line)
            )


def _alike(one: NormSite, other: NormSite) -> bool:
    """Whether both norms compute the same, but for the value of eps."""
    return one.spec is not None and other.spec is not None and one.spec.variant == other.spec.variant


_ADDED = "norm and add in one call"
_NOT_ADDED = "a trace of its forward did not confirm that the add takes this norm's result, and alone does"


def decide(site: NormSite, reason: str) -> tuple[Action, str]:
    """What the plan says of a pair whose norm is `site`: `reason`, unless the norm is left alone."""
    if site.action != "fuse":
        return "leave", f"its norm is left alone: {site.reason}"
    return "fuse", reason


@functools.lru_cache(maxsize=1024)
def _read_class(
    cls: type, forward: object, norms: frozenset[str]
) -> tuple[ForwardSource, Flow, tuple[NormAdd, ...], str]:
    """Source, flow and adds of norms, and why the forward cannot be rewritten, or "". forward: the class's at this
    moment."""
    source = read_forward(cls)
    flow = analyse(source.tree, norms, source.sums)
    added = tuple(norm_adds(source.tree, flow))
    try:
        adds, entries = (add.index for add, _ in flow.in_layer), (call.attr for call in flow.entries)
        behind = (made.add.index for made in added if not made.reason)
        rewrite(source, LayerKey(tuple(norms), tuple(adds), True, tuple(entries), "", tuple(behind)), cls, _UNCALLED)
    except (NoSource, SyntaxError) as error:
        return source, flow, added, f"its forward cannot be rewritten: {error}"
    return source, flow, added, ""
