"""In which order a module runs its layers, and which norm reads the last one's result: from the module's own forward.

The loop `for layer in self.layers[...]: x = layer(x, ...)`, or `for i in range(...): x = self.layers[i](x, ...)`, is
read from the source; what it runs over is evaluated on the live module, so that slices and reversals are the real ones.
A loop of another form yields nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from .containers import may_be_looped_over
from .dataflow import assigned_names, is_passive, own_name, self_attribute
from .source import ForwardSource, NoSource, read_forward

_SEQUENCE = (
    ast.Expression, ast.Attribute, ast.Name, ast.Load, ast.Subscript, ast.Slice, ast.Constant, ast.UnaryOp, ast.USub,
    ast.BinOp, ast.Add, ast.Sub, ast.Call,
)  # fmt: skip
_FUNCTIONS = {"reversed": reversed, "len": len, "list": list, "tuple": tuple, "range": range}


@dataclass(frozen=True)
class LoopCode:
    """One loop over layers in a forward.

    layers: the expression that it runs over. index: (a variable, what it counts) where `layers` is one layer's
    expression, by that variable; else None. state: the name that carries the hidden states. passive: nothing in the
    body but the call can touch them. final: the attribute of the norm that reads them after the loop, or "".
    final_passive: nothing runs between the last call and it. called: how the layer is written. body, after: the
    statements of the loop, and those behind it up to the norm's.
    """

    layers: ast.expr
    index: tuple[str, ast.expr] | None
    state: str
    passive: bool
    final: str
    final_passive: bool
    called: frozenset[str]
    body: tuple[ast.stmt, ...]
    after: tuple[ast.stmt, ...]


@dataclass(frozen=True)
class LayerLoop:
    """`modules` in the order in which they run, and the norm behind them; the rest is in `code`, of `source`."""

    modules: tuple[nn.Module, ...]
    final: nn.Module | None
    code: LoopCode
    source: ForwardSource


def layer_loops(parent: nn.Module, cls: type) -> list[LayerLoop]:
    """The loops in the forward of `parent`, whose unpatched class is `cls`."""
    if not any(map(may_be_looped_over, parent.children())):
        return []
    try:
        source = read_forward(cls)
    except NoSource:
        return []
    found = []
    for code in loops_of(source):
        modules = _modules(code, parent, source)
        if modules:
            final = parent._modules.get(code.final) if code.final else None
            found.append(LayerLoop(modules, final, code, source))
    return found


def loops_of(source: ForwardSource) -> list[LoopCode]:
    """Each `for` of a forward that runs layers one after another over one state."""
    self_name = own_name(source.tree)
    found = []
    for block in _blocks(source.tree):
        for at, statement in enumerate(block):
            if isinstance(statement, ast.For):
                for layer, expression, index in _candidates(statement):
                    body = _read_body(statement, layer)
                    if body is not None:
                        behind = tuple(block[at + 1 :])
                        final, quiet, last = _final_norm(behind, body.state, self_name)
                        called, after = frozenset((layer, *body.names)), behind[: last + 1]
                        state, passive = body.state, body.passive
                        ends = final, quiet and passive, called, tuple(statement.body), after
                        found.append(LoopCode(expression, index, state, passive, *ends))
    return found


def _candidates(loop: ast.For) -> Iterator[tuple[str, ast.expr, tuple[str, ast.expr] | None]]:
    """How a layer may be written in the body, and what `LoopCode.layers` and `index` are then."""
    for name, expression in _elements(loop.target, loop.iter):
        yield name, expression, None
        written: dict[str, ast.expr] = {}
        for node in ast.walk(ast.Module(loop.body, [])):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                names = {below.id for below in ast.walk(node.slice) if isinstance(below, ast.Name)}
                if names == {name} and name not in assigned_names(loop.body):
                    written.setdefault(ast.unparse(node), node)
        for layer, element in written.items():
            yield layer, element, (name, expression)


def _blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    blocks = []
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                blocks.append(block)
    return blocks


def _elements(target: ast.expr, iterable: ast.expr) -> list[tuple[str, ast.expr]]:
    """(loop variable, what it runs over), through `enumerate` and `zip`."""
    if isinstance(target, ast.Name):
        return [(target.id, iterable)]
    if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and isinstance(target, ast.Tuple):
        if iterable.func.id == "enumerate" and len(target.elts) == 2 and iterable.args:
            return _elements(target.elts[1], iterable.args[0])
        if iterable.func.id == "zip" and len(target.elts) == len(iterable.args):
            pairs = zip(target.elts, iterable.args, strict=True)
            return [found for element, argument in pairs for found in _elements(element, argument)]
    if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Attribute) and isinstance(target, ast.Tuple):
        name = {"items": "values", "named_children": "children"}.get(iterable.func.attr)
        if name and len(target.elts) == 2 and not iterable.args:
            values = ast.copy_location(ast.Attribute(iterable.func.value, name, ast.Load()), iterable)
            return _elements(target.elts[1], ast.copy_location(ast.Call(values, [], []), iterable))
    return []


def _modules(code: LoopCode, parent: nn.Module, source: ForwardSource) -> tuple[nn.Module, ...]:
    """The modules that the loop runs over; () where its expressions are more than attributes, slices and calls of
    _FUNCTIONS."""
    own = {own_name(source.tree): parent}
    try:
        if code.index is None:
            modules = tuple(_evaluate(code.layers, source, own))
        else:
            variable, counted = code.index
            modules = tuple(
                _evaluate(code.layers, source, {**own, variable: at}) for at in _evaluate(counted, source, own)
            )
    except Exception:  # the model's own attributes: whatever they raise, the order is unknown
        return ()
    return modules if all(isinstance(module, nn.Module) for module in modules) else ()


def _evaluate(expression: ast.expr, source: ForwardSource, names: dict[str, Any]) -> Any:
    for node in ast.walk(expression):
        if not isinstance(node, _SEQUENCE) or (isinstance(node, ast.Name) and node.id not in (*names, *_FUNCTIONS)):
            return ()
    code = compile(ast.Expression(expression), source.function.__code__.co_filename, "eval")
    return eval(code, {"__builtins__": {}, **_FUNCTIONS}, names)


def _read_body(loop: ast.For, layer: str) -> _Body | None:
    """What was read where each turn hands the layer's result to the next one."""
    reader = _Body(layer)
    reader.block(loop.body)
    return reader if reader.state and reader.results.get(reader.state) in ("first", "output") else None


class _Body:
    """Follows `x = layer(x, ...)`, `x, ... = layer(x)`, `out = layer(x); x = out[0]` through one turn of the loop.
    layer: how it is written, a name or `self.layers[i]`; a name that it is assigned to (`names`) stands for it too.
    state: the name of the hidden states."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.names: set[str] = set()
        self.state = ""
        self.results: dict[str, str] = {}
        self.passive = True

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                self._if(statement)
            elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self._assign(statement.targets[0], statement.value)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._assign(statement.target, statement.value)
            elif isinstance(statement, ast.AugAssign):
                self.passive &= isinstance(statement.value, ast.Tuple) and _harmless(statement.value)
                self._forget([statement])
            elif not (is_passive(statement) or isinstance(statement, (ast.Continue, ast.Break))):
                self.passive = False
                self._forget([statement])

    def _if(self, statement: ast.If) -> None:
        self.passive &= _harmless(statement.test)
        before = dict(self.results)
        ends = []
        for branch in (statement.body, statement.orelse):
            self.results = dict(before)
            self.block(branch)
            if not (branch and isinstance(branch[-1], (ast.Continue, ast.Break, ast.Raise, ast.Return))):
                ends.append(self.results)
        self.results = {}
        for name in set().union(*ends):
            kinds = {end.get(name, "") for end in ends}
            if len(kinds) > 1:
                self.passive = False
            self.results[name] = next(iter(sorted(kinds, reverse=True)))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        kind = self._kind(value)
        if isinstance(target, ast.Name):
            self.results[target.id] = kind
            self.names.update([target.id] if kind == "layer" else [])
        elif isinstance(target, ast.Tuple) and target.elts and isinstance(target.elts[0], ast.Name):
            self._forget([ast.Expr(target)])
            self.results[target.elts[0].id] = "first" if kind == "output" else ""
        else:
            self.passive = False

    def _kind(self, value: ast.expr) -> str:
        if self._is_layer(value):
            return "layer"
        if isinstance(value, ast.Name):
            return self.results.get(value.id, "")
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant) and value.slice.value == 0:
            return "first" if self._kind(value.value) == "output" else ""
        if isinstance(value, ast.Call) and self._is_layer(value.func):
            self.state = self._argument(value)
            arguments = [*value.args, *(keyword.value for keyword in value.keywords)]
            self.passive &= all(_harmless(argument) for argument in arguments)
            return "output"
        self.passive &= _harmless(value)
        return ""

    def _is_layer(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name) and node.id in self.results:
            return self.results[node.id] == "layer"
        return isinstance(node, (ast.Name, ast.Subscript)) and ast.unparse(node) == self.layer

    @staticmethod
    def _argument(call: ast.Call) -> str:
        given = call.args[0] if call.args else None
        for keyword in call.keywords:
            if given is None and keyword.arg in ("hidden_states", "x", "hidden_state"):
                given = keyword.value
        return given.id if isinstance(given, ast.Name) else ""

    def _forget(self, statements: list[Any]) -> None:
        for name in assigned_names(statements):
            self.results[name] = ""


_CODE = (
    ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp,
)  # fmt: skip


def _harmless(expression: ast.expr) -> bool:
    """True where evaluating it cannot write to a tensor: it calls nothing."""
    return not any(isinstance(node, _CODE) for node in ast.walk(expression))


def _final_norm(statements: tuple[ast.stmt, ...], state: str, self_name: str) -> tuple[str, bool, int]:
    """(attribute of the first module called on `state` alone, nothing ran before it, which statement calls it)."""
    passive = True
    for at, statement in enumerate(statements):
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
                attribute = self_attribute(node.func, self_name)
                given = node.args[0]
                if attribute and isinstance(given, ast.Name) and given.id == state:
                    direct = isinstance(statement, (ast.Assign, ast.Return)) and statement.value is node
                    return attribute, passive and direct, at
        if state in assigned_names([statement]):
            break
        passive = passive and is_passive(statement)
    return "", False, -1
