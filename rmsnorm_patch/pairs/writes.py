"""Whether code between an add and the norm that reads its sum may write to the sum with no version that shows it, or
begins an autocast that the norm then runs under.

`x.mul_(2)` raises a tensor's version, and what was handed over for it is not taken. A write through `.data`, a NumPy
array or a kernel that torch does not know raises none. So code in between is read, with what it calls by name. What
cannot be followed counts as code that may write so.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
from collections import ChainMap
from collections.abc import Container, Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn as nn

from ..patch_state import original_class
from .containers import LISTS
from .source import RENAMING, ForwardSource, NoSource, parse, read_forward

_UNCOUNTED = frozenset(
    (
        *("__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__", "from_dlpack", "to_dlpack"),
        *("data", "data_ptr", "numpy", "ops", "storage", "swap_tensors", "untyped_storage"),
    )
)
"""Names that lead to a tensor's memory past its version, and to other people's operations."""
_AUTOCAST = ("autocast", "custom_fwd")
_BY_NAME = (eval, exec, getattr, setattr)
_COMPUTING_NOTHING = frozenset(
    ("builtins", "collections", "itertools", "logging", "math", "torch", "typing", "warnings")
)
"""Packages whose own functions write to no tensor but through torch's operations."""
_VALUES = (torch.Tensor, list, tuple, dict, set, str)
_DEPTH = 6
_UNKNOWN = object()


class Between:
    """Reads code for such writes. known: ids of the modules whose sums are handed over; they are read elsewhere."""

    def __init__(self, known: Container[int]) -> None:
        self.known = known
        self._seen: dict[tuple[Any, int], str] = {}
        self._trees: dict[FunctionType, ast.FunctionDef | None] = {}
        self._sources: dict[type, ForwardSource | None] = {}

    def writer_in(
        self, nodes: Iterable[ast.AST], function: FunctionType, module: nn.Module, called: Container[str] = ()
    ) -> str:
        """What among `nodes`, which are of `function` as it runs on `module`, may write unseen; "" for nothing.
        called: how known modules are written there, where that is no attribute."""
        return self._in(nodes, _Names(function, module), called, 0)

    def writer_in_forward(self, module: nn.Module, decorated: bool = False) -> str:
        """The same for the forward of `module`; decorated: and for its decorators."""
        return self._in_forward_of(module, 0, decorated)

    def writer_around(self, wrappers: Iterable[FunctionType]) -> str:
        """The same for decorators."""
        others = [wrapper for wrapper in wrappers if _defined_in(wrapper) not in RENAMING]
        if any(_defined_in(wrapper) == "torch.amp.autocast_mode" for wrapper in others):
            return "a decorator's autocast"
        return next((writer for wrapper in others if (writer := self._in_function(wrapper, None, 0))), "")

    def _in_forward(self, module: nn.Module, depth: int) -> str:
        is_read = id(module) in self.known or type(module).__module__.startswith("torch.nn.")
        return "" if is_read else self._in_forward_of(module, depth, True)

    def _in_forward_of(self, module: nn.Module, depth: int, decorated: bool) -> str:
        cls = original_class(type(module))
        if cls not in self._sources:
            try:
                self._sources[cls] = read_forward(cls)
            except NoSource:
                self._sources[cls] = None
        source = self._sources[cls]
        if source is None:
            return f"{cls.__name__}.forward, whose code cannot be read"
        around = self.writer_around(source.wrappers) if decorated else ""
        return around or self._in_function(source.function, module, depth)

    def _in_function(self, function: FunctionType, owner: Any, depth: int) -> str:
        if _defined_in(function).partition(".")[0] in _COMPUTING_NOTHING:
            return ""
        key = function, id(owner)
        if key not in self._seen:
            self._seen[key] = ""  # it may call itself
            tree = self._tree_of(function) if depth < _DEPTH else None
            unread = f"{function.__qualname__}, whose code cannot be read"
            names = _Names(function, owner, [] if tree is None else tree.body)
            self._seen[key] = unread if tree is None else self._in(tree.body, names, (), depth)
        return self._seen[key]

    def _tree_of(self, function: FunctionType) -> ast.FunctionDef | None:
        if function not in self._trees:
            try:
                self._trees[function] = parse(function)
            except NoSource:
                self._trees[function] = None
        return self._trees[function]

    def _in(self, nodes: Iterable[ast.AST], names: _Names, called: Container[str], depth: int) -> str:
        for node in (below for each in nodes for below in ast.walk(each)):
            writer = ""
            if isinstance(node, ast.Attribute) and node.attr in _UNCOUNTED and not names.is_module(node):
                writer = f"`{ast.unparse(node)}`"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) not in called:
                writer = self._in_call(node, names, depth)
            if writer:
                return writer
        return ""

    def _in_call(self, call: ast.Call, names: _Names, depth: int) -> str:
        written = f"`{ast.unparse(call.func)}(...)`"
        if isinstance(call.func, (ast.Attribute, ast.Name)) and ast.unparse(call.func).rpartition(".")[2] in _AUTOCAST:
            return written
        found = names.value(call.func)
        if found is _UNKNOWN:
            is_method = isinstance(call.func, ast.Attribute) and any(hasattr(kind, call.func.attr) for kind in _VALUES)
            return "" if is_method else written
        if isinstance(found, nn.Module):
            return self._in_forward(found, depth + 1)
        if isinstance(found, _Children):
            modules = [child for child in found if isinstance(child, nn.Module)]
            others = "" if len(modules) == len(found) else written
            return others or next((writer for each in modules if (writer := self._in_forward(each, depth + 1))), "")
        if isinstance(found, MethodType) and isinstance(found.__func__, FunctionType):
            return self._in_function(found.__func__, found.__self__, depth + 1)
        if isinstance(found, FunctionType):
            return self._in_function(found, None, depth + 1)
        if any(found is function for function in _BY_NAME):
            named = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else "data"
            return written if named in _UNCOUNTED else ""
        return "" if isinstance(found, type) or _package_of(found) in _COMPUTING_NOTHING else written


class _Children(tuple[nn.Module, ...]):
    """Of a list of modules, one of which an expression stands for."""


class _Names:
    """What the expressions of a function stand for, as far as that does not change from call to call."""

    def __init__(self, function: FunctionType, owner: Any, body: Iterable[ast.stmt] = ()) -> None:
        """body: its statements, whose loops over modules give names to these."""
        code = function.__code__
        self.owned = code.co_varnames[0] if code.co_argcount and owner is not None else ""
        self.owner = owner
        self.local = {*code.co_varnames, *code.co_cellvars}
        self.fixed = ChainMap(_held_by(function), function.__globals__, vars(builtins))
        self.loops: dict[str, _Children] = {}
        for loop in (node for statement in body for node in ast.walk(statement) if isinstance(node, ast.For)):
            over = [_modules_in(self.value(part)) for part in ast.walk(loop.iter) if isinstance(part, ast.expr)]
            held = _Children(module for modules in over for module in modules)
            names = [node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)]
            self.loops.update(dict.fromkeys(names, held) if held else {})

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id == self.owned:
                return self.owner
            return self.loops.get(node.id, _UNKNOWN if node.id in self.local else self.fixed.get(node.id, _UNKNOWN))
        if isinstance(node, ast.Subscript):
            return _modules_in(self.value(node.value)) or _UNKNOWN
        return self._attribute(node) if isinstance(node, ast.Attribute) else _UNKNOWN

    def is_module(self, node: ast.Attribute) -> bool:
        """Whether it names one of Python's modules or a model's: `torch.utils.data`."""
        found = self._attribute(node)
        return isinstance(found, (ModuleType, nn.Module)) and found is not torch.ops

    def _attribute(self, node: ast.Attribute) -> Any:
        of = self.value(node.value)
        try:
            if isinstance(of, _Children):
                return _Children(getattr(each, node.attr) for each in of) or _UNKNOWN
            return _UNKNOWN if of is _UNKNOWN else getattr(of, node.attr)
        except Exception:  # the model's own properties: whatever they raise, the value is unknown
            return _UNKNOWN


def _held_by(function: FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions that it reads, those left out that have no value now."""
    held = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            held[name] = cell.cell_contents
    return held


def _modules_in(value: Any) -> _Children:
    """What a list of modules holds, or each of several lists; what is one of several modules stays so."""
    several = value if isinstance(value, _Children) else (value,) if isinstance(value, LISTS) else ()
    held = (tuple(each.children()) if isinstance(each, LISTS) else (each,) for each in several)
    return _Children(module for modules in held for module in modules)


def _defined_in(function: FunctionType) -> str:
    """The Python module whose code it is; a decorator takes the `__module__` of what it stands around."""
    return str(function.__globals__.get("__name__"))


def _package_of(found: Any) -> str:
    of = found if getattr(found, "__module__", None) else getattr(found, "__self__", None)
    name = of.__name__ if isinstance(of, ModuleType) else getattr(of, "__module__", None) or type(of).__module__
    return str(name).partition(".")[0]
