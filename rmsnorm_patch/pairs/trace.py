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
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch.fx.proxy import GraphAppendingTracer, Proxy

from .source import NoSource, Source

_CONTAINERS = (dict, list, set)
_ADDS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Trace:
    """What one run of the forward did.

    pairs: (line of the add, norm attribute), one for each add whose sum a norm reads (the first such norm).
    tail: line of the add whose sum was returned as the hidden state; 0 where it was none.
    entry: attribute of the norm that reads the layer's argument; "" where none does.
    """

    pairs: frozenset[tuple[int, str]]
    tail: int
    entry: str


def trace_layer(module: nn.Module, cls: type, source: Source, norms: frozenset[str]) -> Trace:
    """Run the forward of `module`, whose unpatched class is `cls`, on proxies. Raises NoSource where it cannot be."""
    recorder = _Recorder(source.function.__code__)
    stand_in: Any = object.__new__(cls)
    for name, value in module.__dict__.items():  # what the forward stores in them must not reach the module
        stand_in.__dict__[name] = copy.copy(value) if type(value) in _CONTAINERS else value
    stand_in.__dict__["_modules"] = {
        name: None if child is None else _Leaf(recorder, name, child) for name, child in module._modules.items()
    }
    arguments = _arguments(recorder, source)
    try:
        returned = source.function(stand_in, *arguments)
    except Exception as error:  # the model's own code on proxies: anything can happen
        raise NoSource(f"its forward could not be traced ({type(error).__name__}: {str(error)[:120]})") from error
    if isinstance(returned, (tuple, list)) and returned:
        returned = returned[0]
    return _read(recorder, arguments[0], returned, norms)


def _arguments(recorder: _Recorder, source: Source) -> list[Proxy]:
    parameters = list(inspect.signature(source.function).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p for i, p in enumerate(parameters) if p.kind in positional and (i == 0 or p.default is p.empty)]
    if not wanted or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise NoSource("its forward takes no positional hidden states")
    return [recorder.create_proxy("placeholder", p.name, (), {}) for p in wanted]


def _read(recorder: _Recorder, argument: Proxy, returned: Any, norms: frozenset[str]) -> Trace:
    pairs: set[tuple[int, str]] = set()
    readers: dict[Any, str] = {}
    for node in recorder.graph.nodes:
        if node.op == "call_module" and node.target in norms and len(node.args) == 1:
            readers.setdefault(node.args[0], node.target)
    for node in recorder.graph.nodes:
        if _is_add(node) and node in readers:
            pairs.add((node.meta["line"], readers[node]))
    last = returned.node if isinstance(returned, Proxy) else None
    tail = last.meta["line"] if last is not None and _is_add(last) else 0
    return Trace(frozenset(pairs), tail, readers.get(argument.node, ""))


def _is_add(node: torch.fx.Node) -> bool:
    tensors = len(node.args) == 2 and all(isinstance(argument, torch.fx.Node) for argument in node.args)
    return node.op == "call_function" and node.target in _ADDS and tensors


class _Recorder(GraphAppendingTracer):
    """Records nodes and the line of the forward that each comes from."""

    def __init__(self, code: CodeType) -> None:
        super().__init__(torch.fx.Graph())
        self.code = code

    def create_node(self, *arguments: Any, **named: Any) -> torch.fx.Node:
        node = super().create_node(*arguments, **named)
        frame = sys._getframe()
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back  # type: ignore[assignment]
        node.meta["line"] = 0 if frame is None else frame.f_lineno
        return node

    def create_arg(self, value: Any) -> Any:
        if isinstance(value, Proxy):
            return value.node
        if isinstance(value, (tuple, list)):
            return tuple(self.create_arg(element) for element in value)
        if isinstance(value, dict):
            return {str(name): self.create_arg(element) for name, element in value.items()}
        if isinstance(value, (int, float, bool, str, torch.dtype, torch.device)) or value is None:
            return value
        return repr(type(value))  # a weight, a cache, a config: of no interest here

    def keys(self, obj: Proxy) -> Any:
        return iter(())


class _Leaf:
    """Stands for a child module: a call is recorded, everything else is asked of the child itself."""

    def __init__(self, recorder: _Recorder, path: str, module: nn.Module) -> None:
        self.__dict__.update(_recorder=recorder, _path=path, _module=module)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._module)

    def __call__(self, *arguments: Any, **named: Any) -> Proxy:
        return self._recorder.create_proxy("call_module", self._path, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(name, getattr(self._module, name))

    def __getitem__(self, index: Any) -> Any:
        return self._wrapped(str(index), self._module[index])

    def __iter__(self) -> Iterator[Any]:
        return (self._wrapped(str(at), child) for at, child in enumerate(self._module))

    def _wrapped(self, name: str, value: Any) -> Any:
        return _Leaf(self._recorder, f"{self._path}.{name}", value) if isinstance(value, nn.Module) else value


def holds(node: ast.AST, line: int) -> bool:
    """Whether `line` is one of the lines of `node`."""
    first = getattr(node, "lineno", 0)
    return first <= line <= (getattr(node, "end_lineno", first) or first)
