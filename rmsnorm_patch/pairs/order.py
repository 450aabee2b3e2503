"""Which layer's last add a norm of another module reads: from the loop of the module that runs them (`loops`), else
from a trace of it (`trace`), and through the modules that only pass a sum on (a T5 block around its sub-layers)."""

from __future__ import annotations

import ast
from collections import ChainMap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.nn as nn

from ..patch_state import foreign, original_class
from ..scan.plan import NormSite, PairKind, PairSite
from .containers import is_container, is_sequence
from .dataflow import runs_first
from .layer import Layer
from .loops import LayerLoop, layer_loops
from .source import NoSource, read_forward
from .trace import COPIED, SECOND, CallOrder, trace_calls
from .writes import Between

_SEVERAL = "its sum may be read by different norms"
_INDIRECT = "the layer is called by another function than the forward that was read"
_UNREAD = "the loop that runs the layer was not read for this norm"
_ELSEWHERE = "the norm is called by another module than the one that adds"
_THROUGH = "its sum passes through the forward of another module"
_OUT_OF_LOOP = "its sum leaves the module whose loop runs the layer, and that loop was not read for a norm outside"
_INTO_LOOP = "the norm is called inside the loop of another module, which was not read for a sum from outside"


@dataclass(frozen=True)
class PlannedStep:
    """A layer's last add and the norm that reads its sum; `receiver`: the layer that calls the norm, or None.

    leaves, enters: the modules between these and `parent`, which runs them, that pass the sum out and in; the outermost
    last and first.
    """

    kind: PairKind
    parent: nn.Module
    layer: Layer
    site: NormSite
    norm: nn.Module
    receiver: Layer | None
    passive: bool
    leaves: tuple[nn.Module, ...] = ()
    enters: tuple[nn.Module, ...] = ()

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


class Ends(NamedTuple):
    """Where hidden states enter and leave a module.

    tail: the layer whose last add it returns. adds: the path of the module that adds last, where that has no norm of
    its own. leaves: the modules that pass this sum on, the module itself last; why:
    what keeps that sum from being handed over outside, or "". entry: the norm that reads the module's argument, or,
    where `copied`, a copy of it. receiver: the layer that calls this norm. enters: as `leaves`, the module itself
    first. closed: what keeps a sum of outside from being handed to that norm, or "".
    """

    tail: Layer | None = None
    entry: NormSite | None = None
    copied: bool = False
    receiver: Layer | None = None
    leaves: tuple[nn.Module, ...] = ()
    enters: tuple[nn.Module, ...] = ()
    why: str = ""
    closed: str = ""
    adds: str = ""

    @classmethod
    def of(cls, layer: Layer) -> Ends:
        """What the layer's trace says of both ends."""
        if layer.trace is None:
            site = next(iter(layer.possible_entries()), None)
            tail = layer if layer.may_return_a_sum() else None
            return cls(tail, site, receiver=layer, why=layer.reason, closed=layer.reason)
        entry = layer.below.get(layer.trace.entry) or layer.below.get(layer.trace.copied)
        copied = layer.trace.entry not in layer.below and entry is not None
        return cls(layer if layer.trace.tail else None, entry, copied, layer)


_NOTHING = Ends()


class Order:
    """The hand-overs below the modules that were read so far (`read`, from the inside out)."""

    def __init__(self, layers: Iterable[Layer], sites: dict[int, NormSite], paths: dict[int, str]) -> None:
        """sites: id of each norm -> its site. paths: id of each module -> its path."""
        self.paths = paths
        self.layers = {id(layer.module): layer for layer in layers}
        self.sites = sites
        self.at = {site.path: site for site in sites.values()}
        self.second = dict(_seconds(layer) for layer in self.layers.values())
        self.ends = {key: Ends.of(layer) for key, layer in self.layers.items()}
        self.between = Between(ChainMap[int, object](self.ends, self.sites))  # type: ignore[arg-type]
        self.steps: list[PlannedStep] = []
        self.apart: list[PairSite] = []

    def read(self, parent: nn.Module) -> None:
        """The pairs from one module that `parent` runs to another, and the ends of `parent` itself."""
        loops = layer_loops(parent, original_class(type(parent)))
        if loops:
            for loop in loops:
                self._read_loop(parent, loop)
            for loop in loops:
                for module, reader in _passes(loop):
                    self._list_apart(module, reader, _THROUGH)
            self._close(parent)
        elif not is_container(parent) and self._runs_some(parent):
            self._read_calls(parent)

    def read_root(self, model: nn.Module) -> None:
        """A model that is an `nn.Sequential` is called as a module."""
        if is_sequence(model):
            self._read_calls(model)

    def _runs_some(self, parent: nn.Module) -> bool:
        """Whether hidden states of a layer or a norm pass through a child of `parent`."""
        if any(id(module) in self.ends for module in _children(parent)):
            return True
        held = [module for child in _children(parent) if is_sequence(child) for module in child.children()]
        return any(id(module) in self.sites for module in held)

    def settled(self) -> tuple[list[PlannedStep], list[PairSite]]:
        """One hand-over for each layer: a layer whose sum different norms may read (two loops over it) has none.
        Then what is left apart."""
        by_layer: dict[str, list[PlannedStep]] = {}
        for step in self.steps:
            by_layer.setdefault(step.layer.path, []).append(step)
        steps, apart = [], list(self.apart)
        for same in by_layer.values():
            if all(step.norm is same[0].norm and step.parent is same[0].parent for step in same):
                steps.append(replace(same[0], passive=all(step.passive for step in same)))
            else:
                several = "its sum may be read by different norms: more than one loop runs it"
                apart += [step.left(several) for step in same]
        handed = [(step.kind, step.layer.path, step.site) for step in steps]
        handed += [(pair.kind, pair.layer, self.at[pair.norm]) for pair in apart]
        for kind, layer, site in handed:
            others = self.second.get(site.path, ()) if kind == "cross_layer" else ()
            apart += [PairSite(kind, layer, other.path, "leave", SECOND) for other in others]
        return steps, apart

    def _read_loop(self, parent: nn.Module, loop: LayerLoop) -> None:
        for module in loop.modules:
            if is_sequence(module) and id(module) not in self.ends:
                self._read_calls(module)
        for module, reader in _passes(loop):
            step = self._step(parent, module, reader) if reader is loop.final or id(reader) not in self.sites else None
            if step is None:
                continue
            step = replace(step, passive=_is_passive(step, loop))
            why = self._no_tail(step, module, reader, loop.modules) or self._writer_between(step, loop)
            if why:
                self.apart.append(step.left(why))
            else:
                self.steps.append(step)

    def _close(self, parent: nn.Module) -> None:
        """The ends of a module that runs layers in a loop, so that pairs with norms and sums outside have a line. None
        of them is handed over: the link of a layer in the loop asks for the loop's frame alone."""
        cls = original_class(type(parent))
        try:
            calls = trace_calls(parent, cls, read_forward(cls), self.sites)
        except NoSource:
            return
        for module, reader in (*calls.passes, *calls.seldom):
            self._list_apart(module, reader, _UNREAD)
        self._list_others(parent, calls)
        self._set_ends(parent, calls)
        ends = self.ends.get(id(parent))
        if ends is not None:
            self.ends[id(parent)] = ends._replace(why=_OUT_OF_LOOP, closed=_INTO_LOOP)

    def _read_calls(self, parent: nn.Module) -> None:
        """Where no loop was read: by a trace, also of each `nn.Sequential` that is called as a module."""
        cls = original_class(type(parent))
        try:
            if foreign(parent) is not None:
                return
            calls = trace_calls(parent, cls, read_forward(cls), self.sites)
        except NoSource:
            return
        for module in calls.first.union(*calls.passes, *calls.seldom, {module for _, module in calls.sums}):
            if is_sequence(module) and id(module) not in self.ends:
                self._read_calls(module)
        self._read_passes(parent, calls)
        self._list_others(parent, calls)
        if id(parent) not in self.layers:
            self._set_ends(parent, calls)

    def _set_ends(self, parent: nn.Module, calls: CallOrder) -> None:
        lasts = {module: self._ends_of(module) for module in calls.last}
        out = {module: ends for module, ends in lasts.items() if ends.tail is not None or ends.adds}
        into = [ends for module in calls.first if (ends := self._ends_of(module)).entry is not None]
        if not out and not into and not calls.tail:
            return
        found = Ends(adds=self.paths[id(parent)] if calls.tail else "")
        for module, ends in list(out.items())[:1]:
            why = _THROUGH if len(lasts) > 1 else _INDIRECT if module in calls.indirect else ends.why
            found = found._replace(tail=ends.tail, leaves=(*ends.leaves, parent), why=why, adds=ends.adds or found.adds)
        for ends in into[:1]:
            receiver = ends.receiver if len(into) == 1 else None
            enters = (parent, *ends.enters)
            found = found._replace(entry=ends.entry, copied=ends.copied, receiver=receiver, enters=enters)
            found = found._replace(closed=ends.closed)
        self.ends[id(parent)] = found

    def _ends_of(self, module: nn.Module) -> Ends:
        site = self.sites.get(id(module))
        return self.ends.get(id(module), _NOTHING) if site is None else Ends(entry=site)

    def _read_passes(self, parent: nn.Module, calls: CallOrder) -> None:
        """Hand-overs between modules that `parent` calls one after the other, in code of any form."""
        readers: dict[nn.Module, set[nn.Module]] = {}
        for module, reader in calls.passes:
            if id(reader) in self.sites or id(reader) in self.ends:
                readers.setdefault(module, set()).add(reader)
        for module, several in readers.items():
            (reader, *others) = several
            direct = module not in calls.indirect
            step = self._step(parent, module, reader) if direct and not others else None
            if step is not None:
                why = self._no_tail(step, module, reader, ()) or self._writer_between(step, None)
                if not why:
                    self.steps.append(step)
                elif step.layer.trace is not None and step.layer.trace.tail:
                    self.apart.append(step.left(why))
            for other in several:
                self._list_apart(module, other, _SEVERAL if others else _THROUGH if direct else _INDIRECT)
        for module, reader in calls.seldom:
            self._list_apart(module, reader, _SEVERAL)

    def _step(self, parent: nn.Module, module: nn.Module, reader: nn.Module) -> PlannedStep | None:
        """The hand-over from `module` to `reader`, which `parent` runs after it, not passive; None where there is
        none: the layer that adds, or the one that calls the norm, is not known."""
        out, into = self.ends.get(id(module), _NOTHING), self.ends.get(id(reader), _NOTHING)
        layer = self.layers.get(id(module), out.tail)
        if layer is None:
            return None
        if id(reader) in self.sites:
            site = self.sites[id(reader)]
            return PlannedStep("final", parent, layer, site, reader, None, False, out.leaves)
        receiver = self.layers.get(id(reader), into.receiver)
        entry = None if receiver is None else receiver.live_entry()
        if receiver is None or entry is None:
            return None
        norm = receiver.module._modules[entry.attr]
        assert norm is not None
        site = receiver.norms[entry.attr]
        return PlannedStep("cross_layer", parent, layer, site, norm, receiver, False, out.leaves, into.enters)

    def _no_tail(self, step: PlannedStep, module: nn.Module, reader: nn.Module, modules: tuple[nn.Module, ...]) -> str:
        """Why `step`, from `module` to `reader`, is not done, or "". modules: what the same loop runs."""
        layer = step.layer
        if layer.reason:
            return layer.reason
        if sum(module is each for each in modules) > 1:
            return "the loop runs it more than once"
        if layer.flow.tail is not None and layer.flow.tail.shared:
            return layer.flow.tail.shared
        if not layer.source.passes_results:
            return "a decorator around its forward may see and change what it returns"
        if layer.live_tail() is None:
            return "what it returns is not the sum of its last add alone"
        return self.ends.get(id(module), _NOTHING).why or self.ends.get(id(reader), _NOTHING).closed

    def _writer_between(self, step: PlannedStep, loop: LayerLoop | None) -> str:
        """What between the add and the norm of `step` keeps the one from computing what the other would, in words, or
        ""."""
        if step.passive:
            return ""
        layer, entry = step.layer, None if step.receiver is None else step.receiver.live_entry()
        read = self.between
        found = ""
        if not layer.flow.tail_passive and (tail := layer.live_tail()) is not None:
            found = read.writer_in(_behind(layer.source.tree, tail.node), layer.source.function, layer.module)
        for module in (*step.leaves, *step.enters):
            found = found or read.writer_in_forward(module, decorated=True)
        found = found or (read.writer_in_forward(step.parent) if loop is None else "")
        if loop is not None:
            nodes = (*loop.code.body, *(loop.code.after if step.receiver is None else ()))
            found = found or read.writer_in(nodes, loop.source.function, step.parent, loop.code.called)
        if step.receiver is not None and entry is not None:
            source = step.receiver.source
            found = found or read.writer_around(source.wrappers)
            early = _in_front(source.tree, entry.node)
            found = found or read.writer_in(early, source.function, step.receiver.module)
        what = "may write to the sum, and no version would show it, or change how the norm computes"
        return found and f"between the layer and the norm, {found} {what}"

    def _list_apart(self, module: nn.Module, reader: nn.Module, why: str) -> None:
        """The line of a pair that no step and no other line has."""
        out = self.ends.get(id(module), _NOTHING)
        path = out.adds or ("" if out.tail is None else out.tail.path)
        final, end = self.sites.get(id(reader)), self.ends.get(id(reader), _NOTHING)
        site = final or end.entry
        if not path or site is None:
            return
        known = {(step.layer.path, step.site.path) for step in self.steps}
        known |= {(pair.layer, pair.norm) for pair in self.apart}
        if end.copied and final is None:
            why = COPIED
        elif out.adds:
            why = _ELSEWHERE
        elif why in (_THROUGH, _UNREAD):
            why = out.why or ("" if final else end.closed) or why
        if (path, site.path) not in known:
            self.apart.append(PairSite("final" if final else "cross_layer", path, site.path, "leave", why))

    def _list_others(self, parent: nn.Module, calls: CallOrder) -> None:
        """The lines of pairs that are no hand-over from a layer: of sums that `parent` adds itself, and of what stands
        under a name in a layer's result."""
        for module, reader, why in sorted(calls.apart, key=lambda found: found[2]):
            self._list_apart(module, reader, why)
        code, layer = read_forward(original_class(type(parent))), self.layers.get(id(parent))
        below = () if layer is None else layer.below.values()
        for line, module in sorted(calls.sums, key=lambda found: found[0]):
            site = None if id(module) in self.sites else self.ends.get(id(module), _NOTHING).entry
            if site is not None and site not in below:
                path = self.paths[id(parent)]
                self.apart.append(PairSite("in_layer", path, site.path, "leave", _ELSEWHERE, code.at(line)))


def _seconds(layer: Layer) -> tuple[str, list[NormSite]]:
    """The path of the norm that reads the layer's argument, and the norms that read it after that one."""
    if layer.trace is None:
        entries = layer.possible_entries()
    else:
        paths = (layer.trace.entry or layer.trace.copied, *layer.trace.others)
        entries = [layer.below[path] for path in paths if path]
    return (entries[0].path if entries else ""), entries[1:]


def _passes(loop: LayerLoop) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(a module that the loop runs, the one that reads its result)."""
    after = [*loop.modules[1:], *([] if loop.final is None else [loop.final])]
    return zip(loop.modules, after, strict=False)


def _is_passive(step: PlannedStep, loop: LayerLoop) -> bool:
    """Whether nothing but what passes the sum on runs between the add and the norm. What a module in between runs was
    traced, not read."""
    if step.leaves or step.enters or not (step.layer.flow.tail_passive and step.layer.source.passes_results):
        return False
    if step.receiver is None:
        return loop.code.final_passive
    source, entry = step.receiver.source, step.receiver.live_entry()
    return loop.code.passive and entry is not None and runs_first(source.tree, entry) and source.passes_results


def _behind(tree: ast.FunctionDef, last: ast.AST) -> Iterator[ast.expr]:
    """The expressions that are written behind `last`."""
    end = last.end_lineno, last.end_col_offset  # type: ignore[attr-defined]
    return (n for n in ast.walk(tree) if isinstance(n, ast.expr) and (n.lineno, n.col_offset) >= end)


def _in_front(tree: ast.FunctionDef, first: ast.AST) -> Iterator[ast.expr]:
    """The expressions of the body that end in front of `first`."""
    start = first.lineno, first.col_offset  # type: ignore[attr-defined]
    expressions = (node for statement in tree.body for node in ast.walk(statement) if isinstance(node, ast.expr))
    return (n for n in expressions if (n.end_lineno or 0, n.end_col_offset or 0) <= start)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Its children, and those in its lists and dictionaries of modules."""
    for child in module.children():
        yield child
        if is_container(child):
            yield from _children(child)
