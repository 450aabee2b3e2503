"""What a recorded node does with hidden states: adds two of them, only passes one on, or writes to it.

Kinds of adds that no rewriting knows are told by name: the plan says why their norm stays apart.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch.nn.modules.dropout import _DropoutNd

_ADDS = (operator.add, operator.iadd, torch.add)
_ATEN_ADDS = (torch.ops.aten.add, torch.ops.aten.add_)
_ADD_METHODS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_FROM_THE_RIGHT = "rsub"
_DIFFERENCES = frozenset(("sub", "isub", "subtract", _FROM_THE_RIGHT))
ADD_MORE = frozenset("addbmm addcdiv addcmul addmm addmv addr baddbmm lerp".split())  # noqa: SIM905
"""Names of operations that add what they compute to an operand."""
_OVER_A_STACK = frozenset(("mean", "sum"))
_STACKED = frozenset(("stack", "cat"))
_NEGATIONS = frozenset(("neg", "negative"))
_PRODUCTS = frozenset(("mul", "multiply"))

COPIES = frozenset(
    "bfloat16 clone contiguous detach double float half reshape to type type_as view view_as".split()  # noqa: SIM905
)
"""Methods whose result holds what the tensor held, in other memory, dtype or shape, or is the tensor itself."""
_DROPOUTS = frozenset("alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout".split())  # noqa: SIM905
_PASSING = (nn.Identity, _DropoutNd)
"""Modules that give back what they get, in evaluation."""


def is_add(node: Any) -> bool:
    """Whether `node` adds two values that were computed, in any way that is known here."""
    if not isinstance(node, torch.fx.Node):
        return False
    name = _name(node)
    if _is_written_as_add(node):
        return _adds_nodes(_operands(node))
    if name in _DIFFERENCES:
        left, right = [*_operands(node), None, None][:2]
        taken = left if name == _FROM_THE_RIGHT else right
        return _adds_nodes([left, right]) and (_is_negative(node.kwargs.get("alpha", 1)) or _is_negated(taken))
    if name in ADD_MORE:
        return len(node.all_input_nodes) > 1
    stacked = node.args[0] if name in _OVER_A_STACK and node.args else None
    return isinstance(stacked, torch.fx.Node) and _name(stacked) in _STACKED and len(stacked.all_input_nodes) > 1


def how_added(node: torch.fx.Node) -> str:
    """What makes an add more than `a + b`, or ""."""
    if not _is_written_as_add(node):
        name = _name(node)
        return "it is written as a difference" if name in _DIFFERENCES else f"it is part of another operation ({name})"
    if "alpha" in node.kwargs or len(node.args) > 2:
        return "it scales what it adds (alpha)"
    if "out" in node.kwargs:
        return "it writes to a given tensor (out)"
    return f"it is written as a method call (.{node.target})" if node.op == "call_method" else ""


def added(node: torch.fx.Node) -> list[torch.fx.Node]:
    """What an add takes that was computed."""
    return [side for side in _operands(node) if isinstance(side, torch.fx.Node)]


def _operands(node: torch.fx.Node) -> list[Any]:
    named = [node.kwargs[name] for name in ("self", "input", "other") if name in node.kwargs]
    return [*node.args[:2], *named][:2]


def is_copy(node: torch.fx.Node) -> bool:
    """Whether `node` holds what its first argument held."""
    if not node.args or not isinstance(node.args[0], torch.fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(node.meta.get("module"), _PASSING)
    return (node.op == "call_method" and node.target in COPIES) or (
        node.op == "call_function" and _name(node) in _DROPOUTS
    )


def copied_from(node: torch.fx.Node) -> torch.fx.Node:
    while is_copy(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def how_copied(node: torch.fx.Node) -> str:
    kind = type(node.meta["module"]).__name__ if node.op == "call_module" else f".{_name(node)}"
    return f"the norm reads it through {kind}"


def written_by(node: torch.fx.Node) -> torch.fx.Node | None:
    """What an operation in place writes to."""
    if isinstance(out := node.kwargs.get("out"), torch.fx.Node):
        return out
    method = node.op == "call_method" and isinstance(node.target, str) and node.target.endswith("_")
    method = method and (node.target in ("__iadd__", "__isub__") or not str(node.target).startswith("__"))
    first = node.args[0] if node.args else None
    operation = getattr(node.target, "overloadpacket", node.target) is torch.ops.aten.add_
    writes = method or operation or node.target in (operator.iadd, operator.isub, operator.setitem)
    return first if writes and isinstance(first, torch.fx.Node) else None


def _is_written_as_add(node: torch.fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _ADDS or getattr(node.target, "overloadpacket", node.target) in _ATEN_ADDS
    return node.op == "call_method" and node.target in _ADD_METHODS


def _adds_nodes(sides: list[Any]) -> bool:
    return len(sides) == 2 and all(isinstance(side, torch.fx.Node) for side in sides)


def _name(node: torch.fx.Node) -> str:
    """`sub` of `x - y`, `x.sub_(y)`, `torch.sub(x, y)` and the operation of that name."""
    if node.op not in ("call_function", "call_method"):
        return ""
    target = getattr(node.target, "overloadpacket", node.target)
    return (target if isinstance(target, str) else getattr(target, "__name__", "")).strip("_")


def _is_negated(value: Any) -> bool:
    """Whether `value` is `-x`, or `x` times a negative number."""
    if not isinstance(value, torch.fx.Node):
        return False
    return _name(value) in _NEGATIONS or (_name(value) in _PRODUCTS and any(map(_is_negative, value.args)))


def _is_negative(value: Any) -> bool:
    return isinstance(value, (int, float)) and value < 0
