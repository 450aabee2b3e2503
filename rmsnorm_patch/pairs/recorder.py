"""What stands in place of tensors and child modules while a forward is traced (`trace`): proxies that record nodes, and
the line of the forward that each comes from."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Container, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch.fx.proxy import GraphAppendingTracer, Proxy

from .containers import is_sequence

EVERYWHERE = "everywhere"
"""Stands for the index of `x[:] = ...`, which writes the whole tensor."""


class Recorder(GraphAppendingTracer):
    """Records nodes and the line of the forward that each comes from. norms: id of a module -> its path. watched: ids
    of the norms whose forward may be called as a function. weights_read: path of a norm whose tensors the forward
    itself reads -> the line."""

    def __init__(self, code: CodeType, norms: dict[int, str], watched: Container[int] = ()) -> None:
        super().__init__(torch.fx.Graph())
        self.code = code
        self.norms = norms
        self.watched = watched or norms
        self.weights_read: dict[str, int] = {}

    def proxy(self, node: torch.fx.Node) -> Proxy:
        return _Value(node, self)

    def create_node(self, *arguments: Any, **named: Any) -> torch.fx.Node:
        node = super().create_node(*arguments, **named)
        node.meta["line"], inside = self._place()
        if inside is not None:
            node.meta["inside"] = inside
        return node

    def reads(self, module: nn.Module) -> None:
        """Somebody reads a tensor of `module`."""
        line, inside = self._place()
        if inside is not module and id(module) in self.norms:
            self.weights_read.setdefault(self.norms[id(module)], line)

    def _place(self) -> tuple[int, nn.Module | None]:
        """The line of the forward that runs now, and the norm whose own code it has called as a function."""
        frame: FrameType | None = sys._getframe(2)
        inside = None
        while frame is not None and frame.f_code is not self.code:
            inside = self._norm_running_in(frame) or inside
            frame = frame.f_back
        return (0 if frame is None else frame.f_lineno), inside

    def _norm_running_in(self, frame: FrameType) -> nn.Module | None:
        """The norm whose own method `frame` is: `LlamaRMSNorm.forward(self.norm, x)` is no call of the module."""
        first = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
        module = first.__dict__["_module"] if type(first) is Leaf else first
        is_norm = isinstance(module, nn.Module) and id(module) in self.watched
        return module if is_norm and frame.f_globals is not globals() else None

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


class _Value(Proxy):
    """Tells `x += y` from `x = x + y`, which a plain proxy does not, and answers the question for its dtype: many a
    forward clamps in fp16 alone."""

    dtype = torch.float32

    def __iadd__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        everywhere = index is ... or (isinstance(index, slice) and index == slice(None))
        written = (self, EVERYWHERE if everywhere else index, value)
        self.tracer.create_proxy("call_function", operator.setitem, written, {})


class ShapeRecorder(Recorder):
    """Unpacks a shape's leading sizes, as an attention does to view its rows as heads."""

    def proxy(self, node: torch.fx.Node) -> Proxy:
        return _Shape(node, self)

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([self.create_proxy("call_function", operator.getitem, (obj, at), {}) for at in range(2)])


class _Shape(_Value):
    """`(*shape, -1)` asks for a length, and goes on where there is none (TypeError)."""

    def __len__(self) -> int:
        raise TypeError("a proxy has no length")


class Leaf:
    """Stands for a child module: a call is recorded, everything else is asked of the child itself. A method of it runs
    on proxies; where it cannot, it is recorded as one call, as the child's own forward is."""

    def __init__(self, recorder: Recorder, path: str, module: nn.Module) -> None:
        self.__dict__.update(_recorder=recorder, _path=path, _module=module)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._module)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._may_add(arguments):
            return self._run(self._module.forward, *arguments, **named)
        if is_sequence(self._module) and self._has_norms() and len(arguments) == 1 and not named:
            return functools.reduce(lambda state, child: child(state), self, arguments[0])
        return self._called(sys._getframe(1).f_code, arguments, named)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As `self.norm.forward(x)`, or `type(self.norm).forward(self.norm, x)`."""
        return self._called(sys._getframe(1).f_code, arguments, named)

    def _has_norms(self) -> bool:
        """Whether it runs norms of the traced layer: then what they read is wanted, and not what it reads itself."""
        return any(id(child) in self._recorder.norms for child in self._module.children())

    def _may_add(self, arguments: tuple[Any, ...]) -> bool:
        """Whether the module may add two hidden states for its caller: it has no weights and no children."""
        holds = self._module._parameters or self._module._modules or id(self._module) in self._recorder.norms
        states = sum(isinstance(argument, Proxy) for argument in arguments)
        return type(self._recorder) is Recorder and states == 2 and not holds

    def _called(self, caller: CodeType, arguments: tuple[Any, ...], named: dict[str, Any]) -> Proxy:
        path = self._recorder.norms.get(id(self._module), self._path)
        called = self._recorder.create_proxy("call_module", path, arguments, named)
        called.node.meta.update(module=self._module, direct=caller is self._recorder.code)
        return called

    def __len__(self) -> int:
        return len(self._module)

    def __contains__(self, name: object) -> bool:
        return name in self._module

    def __bool__(self) -> bool:
        return bool(self._module)

    def __getattr__(self, name: str) -> Any:
        if name in ("values", "children", "items", "named_children"):
            named = [(key, self._wrapped(key, child)) for key, child in self._module._modules.items()]
            return lambda: iter([child for _, child in named] if name in ("values", "children") else named)
        value = getattr(self._module, name)
        if isinstance(value, torch.Tensor):
            self._recorder.reads(self._module)
        if inspect.ismethod(value) and value.__self__ is self._module:
            return functools.partial(self._run, value)
        return self._wrapped(name, value)

    def _run(self, method: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except Exception:  # the model's own code on proxies: anything can happen
            if not any(isinstance(value, Proxy) for value in (*arguments, *named.values())):
                raise
            if method == self._module.forward:
                return self._called(self._recorder.code, arguments, named)
            return self._recorder.create_proxy("call_function", method, arguments, named)

    def __getitem__(self, index: Any) -> Any:
        return self._wrapped(str(index), self._module[index])

    def __iter__(self) -> Iterator[Any]:
        return (self._wrapped(str(at), child) for at, child in enumerate(self._module))

    def _wrapped(self, name: str, value: Any) -> Any:
        return Leaf(self._recorder, f"{self._path}.{name}", value) if isinstance(value, nn.Module) else value
