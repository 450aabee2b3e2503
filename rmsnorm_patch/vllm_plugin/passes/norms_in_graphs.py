"""Norms of ours in vLLM's graphs, in each form that a route writes, and what the passes ask about their neighbours."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from ...fused.linear_norm.graph import arguments_by_name
from ...numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE, RMS_NORM
from ...numerics.spec import NormSpec
from ..log import logger

_SPEC = ("round_before_weight", "weight_offset", "output", "sum", "width", "group")


@dataclass(frozen=True)
class Norm:
    """A norm of ours in a graph. op: which; arguments: by name. rows: what holds its result, from behind `node` on;
    total: what holds the sum, where that is a result of the node. functional: the node writes nothing."""

    node: fx.Node
    op: str
    arguments: dict[str, Any]
    rows: fx.Node
    total: fx.Node | None
    functional: bool

    @property
    def adds(self) -> bool:
        return self.op != RMS_NORM.name

    @property
    def spec(self) -> NormSpec:
        return NormSpec(
            0.0, has_weight=self.arguments["weight"] is not None, **{name: self.arguments[name] for name in _SPEC}
        )


def norm_of(node: fx.Node) -> Norm | None:
    """The norm of ours that a node is; None for any other, and for one whose results go on as a pair."""
    ops = torch.ops.rmsnorm_patch
    if node.target is ops.rms_norm.default:
        return Norm(node, RMS_NORM.name, arguments_by_name(node), node, None, functional=True)
    if node.target is ops.fused_add_rms_norm.default:
        return _of_results(node, FUSED_ADD.name, arguments_by_name(node), first=0)
    if node.target is ops.fused_add_rms_norm_.default:
        arguments = arguments_by_name(node)
        return Norm(node, FUSED_ADD_IN_PLACE.name, arguments, arguments["x"], None, functional=False)
    if node.target is auto_functionalized and node.args == (ops.fused_add_rms_norm_.default,):
        # The first place is for what an op returns, here nothing; behind it is what it wrote.
        return _of_results(node, FUSED_ADD_IN_PLACE.name, dict(node.kwargs), first=1)
    return None


def _of_results(node: fx.Node, op: str, arguments: dict[str, Any], first: int) -> Norm | None:
    results: dict[Any, list[fx.Node]] = {first: [], first + 1: []}
    for user in node.users:
        if user.target is not operator.getitem or user.args[1] not in results:
            return None
        results[user.args[1]].append(user)
    rows, totals = results.values()
    if len(rows) != 1 or len(totals) > 1:
        return None
    return Norm(node, op, arguments, rows[0], totals[0] if totals else None, functional=True)


def unpacked(graph: fx.Graph, node: fx.Node, values: tuple[torch.Tensor, ...]) -> list[fx.Node]:
    """The results of a new node of several, one node each. values: what they are like."""
    node.meta["val"] = values
    results = []
    for place, value in enumerate(values):
        results.append(graph.call_function(operator.getitem, (node, place)))
        results[-1].meta["val"] = value
    return results


Positions = dict[fx.Node, int]
"""Where each node stood when its norm was looked at; nodes that were put in since have no place."""


def is_the_only_name(rows: fx.Node, norm: fx.Node, places: Positions) -> bool:
    """Whether what a norm writes in place is read behind it through `rows` alone: by no view that was taken before, and
    by nothing that `rows` is itself a view of."""

    def is_done(node: fx.Node) -> bool:
        """Whether a node, and what may be a view of it, is read before the norm alone."""
        return places[node] < places[norm] and (not may_be_a_view(node) or all(map(is_done, node.users)))

    if not all(places[user] >= places[norm] or is_done(user) for user in rows.users):
        return False
    while may_be_a_view(rows) and rows.all_input_nodes:
        viewed, rows = rows, rows.all_input_nodes[0]
        if not all(user is viewed or is_done(user) for user in rows.users):
            return False
    return True


def may_be_a_view(node: fx.Node) -> bool:
    """Whether a node's value may be memory of another one; what is no op with a schema counts as one that is."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or node.target is auto_functionalized:
        return False
    return schema is None or any(argument.alias_info is not None for argument in schema.arguments)


def erase_unread(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those that nobody reads; each stands before what it reads."""
    for node in dict.fromkeys(nodes):
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)


def path_of(norm: Norm) -> str:
    """Where a norm stands in the model, as far as its graph says."""
    return place_in_model(norm.node, norm.rows, *norm.rows.users) or "a norm"


def place_in_model(*nodes: fx.Node) -> str:
    """The module that the first of them which says so belongs to, or ""."""
    for node in nodes:
        if stack := node.meta.get("nn_module_stack"):
            path = str(list(stack.values())[-1][0])
            return path.replace("L['self'].", "").replace("L['s'].", "")
    return ""


def keep_place(node: fx.Node, replaced: fx.Node) -> None:
    """Let `node` stand in the module of the one that it replaces. No more of what is known of that one is taken over:
    some of it belongs to its own arguments."""
    if stack := replaced.meta.get("nn_module_stack"):
        node.meta["nn_module_stack"] = stack


def tell_once(told: set[tuple[Any, ...]], norm: Norm, what: str, *once: Any) -> None:
    """One line in the log, unless it is among the `told`; where something is to be told `once`, only for the first norm
    of these columns that has it."""
    path, columns = path_of(norm), str(norm.arguments["x"].meta["val"].shape[-1])
    key = (columns, *once) if once else (path, columns, what)
    if key not in told:
        told.add(key)
        logger.info("rmsnorm_patch: %s (%s columns) %s", path, columns, what)
