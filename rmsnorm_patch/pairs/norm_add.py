"""Adds of a norm's result, `x = residual + self.norm(y)` (sandwich layouts): which of them can be one call with that
norm, read from the syntax tree.

In a rewritten forward the add's call is given `y`, and the norm runs inside it. So the norm runs later than it is
written: nothing but rebinding of names may stand in between, and nobody else may read its result.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from .dataflow import Add, Flow, NormCall, Value, is_passive

_SCOPES = (ast.Lambda, ast.FunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(eq=False)
class NormAdd:
    """An add and the norm whose result it takes. side: which operand this is, 0 for the left one. norm: its call, None
    where that is in no statement of its own kind. reason: why the two stay apart, or ""."""

    add: Add
    attr: str
    side: int
    norm: NormCall | None
    reason: str = ""


def norm_adds(tree: ast.FunctionDef, flow: Flow) -> list[NormAdd]:
    """Every add of `flow` that takes a norm's result, in the order of the adds. tree: of the whole forward."""
    found = []
    for add in flow.adds:
        sides = [side for side, operand in enumerate(add.value.operands or ()) if operand.kind == "norm"]
        calls = {side: _call_of(flow, add.value.operands[side]) for side in sides}  # type: ignore[index]
        for side in sides:
            other = calls.get(1 - side)
            made = NormAdd(add, add.value.operands[side].attr, side, calls[side])  # type: ignore[index]
            made.reason = _why_not(tree, flow, made)
            if not made.reason and other is not None and (_place(other) > _place(made.norm) or made.norm is other):
                made.reason = "the add takes the results of two norms, and the other one runs later"
            found.append(made)
    return found


def _call_of(flow: Flow, value: Value) -> NormCall | None:
    return next((call for call in flow.norms if call.node is value.node), None)


def _place(call: NormCall | None) -> tuple[int, int]:
    """Where a call ends, which is the order in which calls of one block run."""
    return (0, 0) if call is None else (call.node.end_lineno or 0, call.node.end_col_offset or 0)


def _why_not(tree: ast.FunctionDef, flow: Flow, made: NormAdd) -> str:
    add, call = made.add, made.norm
    if call is None:
        return "the norm is called in the head of an `if` or `with`"
    if add.in_place:
        return "the add writes in place"
    if call.node.keywords:
        return "the norm is called by keyword"
    if call.source.kind in ("param", "add") or any(norm is call for _, norm in flow.in_layer):
        return "the norm also reads a sum, or what the layer before may hand over"
    if any(of is add and norm.node.keywords for of, norm in flow.in_layer):
        return "the norm that reads the sum is called by keyword"
    operands = (add.left, add.right)
    operand, other = operands[made.side], operands[1 - made.side]
    if operand is call.node:
        runs_between = made.side == 0 and not isinstance(other, (ast.Name, ast.Constant))
        return "code runs between the norm and the add" if runs_between else ""
    if not isinstance(operand, ast.Name) or not isinstance(other, (ast.Name, ast.Constant)):
        return "code runs between the norm and the add"
    return _why_not_named(tree, add, call, operand)


def _why_not_named(tree: ast.FunctionDef, add: Add, call: NormCall, operand: ast.Name) -> str:
    """Where the norm's result goes to the add through the variable `operand`."""
    statement = call.statement
    if not (isinstance(statement, ast.Assign) and statement.value is call.node):
        return "the norm's statement does more than to name its result"
    if call.block is not add.block or statement not in add.block:
        return "the norm and the add stand in different branches"
    if [target.id for target in statement.targets if isinstance(target, ast.Name)] != [operand.id]:
        return "the norm's result has several names"
    begin, end = add.block.index(statement), add.block.index(add.statement)
    between = add.block[begin + 1 : end]
    if not all(is_passive(each) for each in between):
        return "code runs between the norm and the add"
    if any(_loads(each, operand.id) for each in between) or _is_read_later(tree, add, operand):
        return "something else reads the norm's result"
    return ""


def _loads(node: ast.AST, name: str) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]


def _is_read_later(tree: ast.FunctionDef, add: Add, operand: ast.Name) -> bool:
    """Whether anything but the add may read the variable that holds the norm's result. The add stands in no loop: what
    is written above it runs before it."""
    if any(_loads(scope, operand.id) for scope in _scopes_below(tree)):
        return True
    if len(_loads(add.statement, operand.id)) > 1:
        return True
    targets = add.statement.targets if isinstance(add.statement, ast.Assign) else []
    if any(isinstance(target, ast.Name) and target.id == operand.id for target in targets):
        return False
    end = (add.statement.end_lineno or 0, add.statement.end_col_offset or 0)
    return any((load.lineno, load.col_offset) >= end for load in _loads(tree, operand.id))


def _scopes_below(tree: ast.FunctionDef) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, _SCOPES) and node is not tree)
