"""The independent witness: a layer's own forward, run on torch.fx proxies, says which add feeds which norm.

The layer's children are leaves, so nothing is computed and no weight is touched. `torch.fx.Tracer.trace` is not used:
it replaces `nn.Module.__call__` for the whole process, and a model may be serving in another thread.
A stand-in instance with recording children needs no such patch. It takes the branches that the instance's attributes
choose; a branch on a tensor's value ends the trace.
"""

from __future__ import annotations

import ast
import copy
import inspect
import operator
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn as nn
from torch.fx.proxy import Proxy

from .recorder import EVERYWHERE, Leaf, Recorder, ShapeRecorder
from .source import ForwardSource, NoSource
from .sums import added, copied_from, how_added, how_copied, is_add, is_copy, written_by

_CONTAINERS = (dict, list, set)
COPIED = "the norm reads a copy of its sum"
NAMED = "the norm reads it under a name in what the layer returns"
SELDOM = "it runs only where an optional argument is given"
SECOND = "another norm reads the same sum first"
UNUSED = "its forward reads the norm's weight, and does not call the norm"
ALONE = (SELDOM, SECOND, UNUSED)
"""What says by itself why a pair is left."""
INSIDE = "the norm's forward is called as a function"
_MASKS = "transformers.masking_utils"
"""Its functions make attention masks. They branch on values, and no hidden state comes out of them."""


class Pair(NamedTuple):
    """An add whose sum a norm reads (the first such norm). line: of the add. norm: path below the traced module.
    how: what makes it more than `a + b`, or ""."""

    line: int
    norm: str
    how: str = ""


@dataclass(frozen=True)
class Trace:
    """What one run of the forward did.

    tail: line of the add whose sum was returned as the hidden state; 0 where it was none.
    entry: path of the norm that reads the layer's argument; "" where none does. copied: the same for a copy of it.
    others: the norms that read the argument, or a copy of it, after that.
    norm_adds: adds of what a norm computed, and that norm.
    """

    pairs: frozenset[Pair]
    tail: int
    entry: str
    copied: str = ""
    norm_adds: frozenset[Pair] = frozenset()
    others: tuple[str, ...] = ()


class CallOrder(NamedTuple):
    """Which of its modules one forward hands a hidden state. first: those that read its argument. last: those whose
    result it returns. passes: (a module, the one that reads its result), with the optional arguments given where that
    can be run; seldom: those that are only seen without. indirect: modules that a function below the forward calls.
    apart: passes of a copy, or of what stands under a name in a module's result, and which of these. sums: (line of an
    add, the module that reads its sum). tail: the line of the add whose sum it returns, or 0."""

    first: frozenset[nn.Module]
    last: frozenset[nn.Module]
    passes: frozenset[tuple[nn.Module, nn.Module]]
    seldom: frozenset[tuple[nn.Module, nn.Module]]
    indirect: frozenset[nn.Module]
    apart: frozenset[tuple[nn.Module, nn.Module, str]]
    sums: frozenset[tuple[int, nn.Module]]
    tail: int


def trace_layer(module: nn.Module, cls: type, source: ForwardSource, norms: frozenset[str]) -> Trace:
    """Run the forward of `module`, whose unpatched class is `cls`, on proxies: without its optional arguments, or with
    them where it needs them. norms: paths below it. Raises NoSource where it cannot be run in either way."""
    paths = {id(module.get_submodule(path)): path for path in norms}
    found: list[Trace] = []
    failed: list[NoSource] = []
    for optional in (False, True):
        try:
            found.append(_read(*_run(module, cls, source, paths, optional), norms))
        except NoSource as reason:
            failed.append(reason)
    if not found:
        raise failed[0]
    usual = found[0]
    known = {(pair.line, pair.norm) for pair in usual.pairs}
    seldom = [pair for pair in found[-1].pairs if (pair.line, pair.norm) not in known]
    return replace(usual, pairs=usual.pairs | {pair._replace(how=pair.how or SELDOM) for pair in seldom})


def trace_calls(module: nn.Module, cls: type, source: ForwardSource, norms: Container[int]) -> CallOrder:
    """Run the forward of `module` on proxies, without its optional arguments and with them. norms: ids of the model's.
    Raises NoSource where it can be run in neither way."""
    first, last, indirect, apart, sums = set(), set(), set(), set(), set()
    tail = 0
    runs: list[set[tuple[nn.Module, nn.Module]]] = []
    failed: list[NoSource] = []
    for optional in (False, True):
        try:
            recorder, argument, returned = _run(module, cls, source, {}, optional, norms)
        except NoSource as reason:
            failed.append(reason)
            continue
        passes: set[tuple[nn.Module, nn.Module]] = set()
        runs.append(passes)
        if isinstance(returned, Proxy):
            if (producer := _producer(returned.node)) is not None:
                last.add(producer)
            tail = tail or (returned.node.meta["line"] if is_add(returned.node) else 0)
        for node in recorder.graph.nodes:
            if node.op == "call_module":
                if not node.meta["direct"]:
                    indirect.add(node.meta["module"])
                given = next(iter((*node.args, *node.kwargs.values())), None)
                is_copied = isinstance(given, torch.fx.Node) and is_copy(given)
                producer = None if is_copied else _producer(given)
                if producer is not None:
                    passes.add((producer, node.meta["module"]))
                elif given is argument.node:
                    first.add(node.meta["module"])
                elif isinstance(given, torch.fx.Node):
                    value = copied_from(given)
                    if (producer := _producer(value, by_name=True)) is not None:
                        apart.add((producer, node.meta["module"], NAMED if value is given else COPIED))
                    elif is_add(value):
                        sums.add((value.meta["line"], node.meta["module"]))
            elif (inside := node.meta.get("inside")) is not None:
                outside = _from_outside(node, inside)
                producers = (_producer(copied_from(given), by_name=True) for given in outside)
                apart.update((producer, inside, INSIDE) for producer in producers if producer is not None)
    if not runs:
        raise failed[0]
    usual, seldom = frozenset(runs[-1]), frozenset(runs[0] - runs[-1])
    sets = frozenset(first), frozenset(last), usual, seldom, frozenset(indirect), frozenset(apart), frozenset(sums)
    return CallOrder(*sets, tail)


def trace_reached(
    module: nn.Module, cls: type, source: ForwardSource, norms: frozenset[str], optional: bool, whole: frozenset[str]
) -> tuple[list[torch.fx.Node], str]:
    """The nodes of a forward as far as it runs on proxies, in their order, and why it ended there, or "".

    whole: global functions whose calls are a node each, with two results; its target is the function's name.

    Of an attention nothing is wanted beyond its norms, and much of what follows them cannot run on proxies. A shape
    that is unpacked has two sizes: of the batch and of the sequence. norms: paths below `module`. optional: give
    arguments that are None else. Raises NoSource where it cannot be begun."""
    recorder = ShapeRecorder(source.function.__code__, {id(module.get_submodule(path)): path for path in norms})
    arguments, named = _arguments(recorder, source, optional)
    ended = ""
    try:
        _with_leaves(source.function, recorder, whole)(_stand_in(recorder, module, cls), *arguments, **named)
    except Exception as error:  # the model's own code on proxies: anything can happen
        ended = _untraceable(error)
    return list(recorder.graph.nodes), ended


def _producer(node: Any, by_name: bool = False) -> nn.Module | None:
    """The module whose hidden state `node` is: its result, or the first of its results. by_name: or one that stands
    under a name in what it returned."""
    while isinstance(node, torch.fx.Node) and node.target in (operator.getitem, getattr):
        key = node.args[1]
        in_record = isinstance(key, str) and (node.target is operator.getitem or not hasattr(torch.Tensor, key))
        if not (node.target is operator.getitem and key == 0) and not (by_name and in_record):
            break
        node = node.args[0]
    found: nn.Module | None = node.meta.get("module") if isinstance(node, torch.fx.Node) else None
    return found


def _run(
    module: nn.Module,
    cls: type,
    source: ForwardSource,
    norms: dict[int, str],
    optional: bool,
    watched: Container[int] = (),
) -> tuple[Recorder, Proxy, Any]:
    """What was recorded, the hidden states given and those returned. optional: give arguments that are None else."""
    recorder = Recorder(source.function.__code__, norms, watched)
    arguments, named = _arguments(recorder, source, optional)
    try:
        returned = _without_masks(source.function, recorder)(_stand_in(recorder, module, cls), *arguments, **named)
    except Exception as error:  # the model's own code on proxies: anything can happen
        raise NoSource(_untraceable(error)) from error
    return recorder, arguments[0], _first_of(returned)


def _stand_in(recorder: Recorder, module: nn.Module, cls: type) -> Any:
    """An instance of `cls` with what `module` has, whose children record their calls."""
    made: Any = object.__new__(cls)
    for name, value in module.__dict__.items():  # what the forward stores in them must not reach the module
        made.__dict__[name] = copy.copy(value) if type(value) in _CONTAINERS else value
    made.__dict__["_modules"] = {
        name: None if child is None else Leaf(recorder, name, child) for name, child in module._modules.items()
    }
    return made


def _untraceable(error: Exception) -> str:
    return f"its forward could not be traced ({type(error).__name__}: {str(error)[:120]})"


def _without_masks(function: FunctionType, recorder: Recorder) -> FunctionType:
    """`function`, whose masks come out of one recorded call each."""
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    makers = {name: function.__globals__[name] for name in names}
    makers = {name: maker for name, maker in makers.items() if getattr(maker, "__module__", "") == _MASKS}
    if not makers:
        return function

    def leaf(maker: Any) -> Any:
        return lambda *given, **named: recorder.create_proxy("call_function", maker, (), {})

    return _with_globals(function, {name: leaf(maker) for name, maker in makers.items()})


def _with_leaves(function: FunctionType, recorder: Recorder, names: frozenset[str]) -> FunctionType:
    """`function`, whose calls of these global names are recorded as they stand."""

    def leaf(name: str) -> Any:
        return lambda *given, **named: recorder.create_proxy("call_method", name, given, named)

    return _with_globals(function, {name: leaf(name) for name in names}) if names else function


def _with_globals(function: FunctionType, others: dict[str, Any]) -> FunctionType:
    names = {**function.__globals__, **others}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _first_of(returned: Any) -> Any:
    """The hidden states of what was returned: itself, or the first of a tuple or of transformers' named outputs. The
    tuple may have been put in front of another module's results: `(hidden_states,) + attention[1:]`."""
    while isinstance(returned, Proxy) and returned.node.target is operator.add:
        first = returned.node.args[0]
        if not isinstance(first, tuple) or not first or not isinstance(first[0], torch.fx.Node):
            break
        returned = returned.tracer.proxy(first[0])
    if isinstance(returned, dict) and returned:
        return next(iter(returned.values()))
    return returned[0] if isinstance(returned, (tuple, list)) and returned else returned


def _arguments(recorder: Recorder, source: ForwardSource, optional: bool) -> tuple[list[Proxy], dict[str, Proxy]]:
    parameters = list(inspect.signature(source.function).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p for i, p in enumerate(parameters) if p.kind in positional and (i == 0 or p.default is p.empty)]
    if not wanted or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise NoSource("its forward takes no positional hidden states")
    given = [recorder.create_proxy("placeholder", p.name, (), {}) for p in wanted]
    left_out = [p for p in parameters if optional and p not in wanted and p.default is None]
    return given, {p.name: recorder.create_proxy("placeholder", p.name, (), {}) for p in left_out}


def _read(recorder: Recorder, argument: Proxy, returned: Any, norms: frozenset[str]) -> Trace:
    """Follows tensors, not nodes: what an in-place add writes is the tensor that it was given."""
    tensors: dict[torch.fx.Node, torch.fx.Node] = {}
    written: dict[torch.fx.Node, torch.fx.Node] = {}

    def value(node: Any) -> Any:
        """The node that computed what `node`'s tensor holds now."""
        tensor = tensors.get(node, node)
        return written.get(tensor, tensor)

    def source_of(node: Any) -> tuple[Any, str]:
        """The value that `node`'s tensor has the numbers of, and how they came there, or ""."""
        found, how = value(node), ""
        while isinstance(found, torch.fx.Node):
            if is_copy(found):
                found, how = value(found.args[0]), how_copied(found)
            elif found.target is operator.setitem and found.args[1] == EVERYWHERE:
                found, how = value(found.args[2]), "it is written into another tensor"
            else:
                break
        return found, how

    readers: dict[Any, dict[str, Pair]] = {}
    norm_adds: set[Pair] = set()
    for node in recorder.graph.nodes:
        if is_add(node):
            for norm in map(value, added(node)):
                if norm.op == "call_module" and norm.target in norms:
                    shared = "something else reads the norm's result" if len(norm.users) > 1 else ""
                    norm_adds.add(Pair(node.meta["line"], norm.target, shared or how_added(node)))
        for path, given in _given_to_norms(recorder, node):
            read, how = source_of(given)
            line = read.meta["line"] if isinstance(read, torch.fx.Node) else 0
            pair = Pair(line, path, how or (INSIDE if node.op != "call_module" else ""))
            readers.setdefault(read, {}).setdefault(path, pair)
        target = written_by(node)
        if target is not None:
            tensors[node] = tensors.get(target, target)
            written[tensors[node]] = node
    pairs: set[Pair] = set()
    for node, found in readers.items():
        if is_add(node):
            first, *more = found.values()
            pairs.add(first._replace(how=first.how or how_added(node)))
            pairs.update(pair._replace(how=SECOND) for pair in more)
    called = {path for found in readers.values() for path in found}
    unused = recorder.weights_read.keys() - called
    pairs.update(Pair(recorder.weights_read[path], path, UNUSED) for path in unused)
    last = source_of(returned.node)[0] if isinstance(returned, Proxy) else None
    tail = last.meta["line"] if last is not None and is_add(last) else 0
    of_argument = [*readers.get(argument.node, {}).values()]
    entry = next((pair.norm for pair in of_argument[:1] if pair.how in ("", INSIDE)), "")
    copied = "" if entry else next((pair.norm for pair in of_argument if pair.how not in ("", INSIDE)), "")
    others = tuple(pair.norm for pair in of_argument if pair.norm not in (entry, copied))
    return Trace(frozenset(pairs), tail, entry, copied, frozenset(norm_adds), others)


def _given_to_norms(recorder: Recorder, node: torch.fx.Node) -> Iterator[tuple[str, torch.fx.Node]]:
    """(a norm's path, what it is given), where `node` is a call of it, or the first step of its forward that reads
    something from outside."""
    if node.op == "call_module":
        arguments = [*node.args, *node.kwargs.values()]
        norm = recorder.norms.get(id(node.meta["module"]))
        if norm is not None and len(arguments) == 1:
            yield norm, arguments[0]  # type: ignore[misc]
    elif (inside := node.meta.get("inside")) is not None:
        yield from ((recorder.norms[id(inside)], given) for given in _from_outside(node, inside))


def _from_outside(node: torch.fx.Node, inside: nn.Module) -> list[torch.fx.Node]:
    """What `node`, a step of the forward of `inside`, reads that this forward has not made."""
    return [given for given in node.all_input_nodes if given.meta.get("inside") is not inside]


def holds(node: ast.AST, line: int) -> bool:
    """Whether `line` is one of the lines of `node`."""
    first = getattr(node, "lineno", 0)
    return first <= line <= (getattr(node, "end_lineno", first) or first)
