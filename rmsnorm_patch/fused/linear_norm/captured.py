"""The norms of a patched model in a graph of Inductor's: joined with the product in front, or arithmetic again.

    joinable_rms_norm(x, weight?, eps, ...) -> normed

A patched model that asks for it (`compiled="joined"`) has this op where a norm stands. `settle` leaves none of them.
Where the graph will be captured, x = product + residual, and nothing else wants the product, the three become
`linear_fused_add_rms_norm_` (`op.py`). Every other norm becomes the model's arithmetic, at a point of the compilation
where Inductor has done nothing yet: it then makes of the graph what it makes of the unpatched model's.

What no pass has seen still runs: the op is `rms_norm`, whose result has the strides that the arithmetic would give it.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from ...numerics import reference
from ...numerics.contract import IMPLIED_EPS, RMS_NORM
from ...numerics.operands import check_rms_norm
from ...ops.library import bound_for, positional, register, spec_of
from . import kernel, splits
from .graph import arguments_by_name, joined_op, transposes, tunes_products

aten = torch.ops.aten
NAME = "joinable_rms_norm"
SCHEMA = RMS_NORM.schema
_VIEWS = frozenset((aten.view.default, aten._unsafe_view.default, aten.reshape.default))
_HALVES = frozenset((torch.bfloat16, torch.float16))
_SPEC = ("round_before_weight", "weight_offset", "output", "sum", "width", "group")
logger = logging.getLogger("rmsnorm_patch")


def _joinable(x, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    normed = bound_for(RMS_NORM.name, weight, spec, named)(x, weight, eps)
    laid_out = torch.empty_like(x, dtype=normed.dtype)
    return normed if laid_out.stride() == normed.stride() else laid_out.copy_(normed)


def _fake(x, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    *numerics, _, _ = positional(spec, named)
    variant = spec_of(weight is not None, *numerics)
    check_rms_norm(x, weight, variant, NAME)
    return torch.empty_like(x, dtype=variant.output_dtype(x.dtype, None if weight is None else weight.dtype))


_LIBRARY = register("FRAGMENT", {NAME: (SCHEMA, _joinable, _fake)})
"""Kept for the life of the process."""


@dataclass(frozen=True)
class Outcome:
    """What became of the joinable norms of one graph. left: why norms are arithmetic again -> how many."""

    joined: int
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = "".join(f"; {count} not: {why}" for why, count in sorted(self.left.items()))
        return f"{self.joined} norms take over the product in front{reasons}"


on_settled: list[Callable[[Outcome], None]] = []
"""Who is told of each graph that had joinable norms."""


def settle(graph: fx.Graph, captured: bool) -> Outcome:
    """Replace every joinable norm of a functional graph of aten ops, whose nodes have fake values in `meta["val"]`.

    captured: whether the graph will be run as a captured one. Else every call is a launch from Python, for which the
    joined op costs more than it saves.
    """
    joined, left = 0, Counter[str]()
    for norm in [node for node in graph.nodes if node.target is _op()]:
        found = "the graph is not captured" if not captured else _product_behind(graph, norm)
        if isinstance(found, str):
            left[found] += 1
            _write_out(graph, norm)
        else:
            joined += 1
            _join(graph, norm, found)
    outcome = Outcome(joined, left)
    if joined or left:
        logger.info("rmsnorm_patch: in a graph of torch.compile %s", outcome)
        for tell in tuple(on_settled):  # one of them may leave, or bring another
            tell(outcome)
    return outcome


def _op() -> Any:
    return getattr(torch.ops.rmsnorm_patch, NAME).default


@dataclass(frozen=True)
class _Behind:
    """total = x + residual; x: the product, or the last of the views of it."""

    total: Any
    x: Any
    residual: Any
    product: Any


def _product_behind(graph: fx.Graph, norm: fx.Node) -> _Behind | str:
    """The product whose sum with a residual this norm reads, or why there is none that it can take over."""
    given = arguments_by_name(norm)
    total = given["x"]
    if total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return "no add stands in front"
    if tunes_products():
        return "Inductor chooses kernels for products itself (max_autotune)"
    found: _Behind | str = "no operand of the add is a product that nothing else reads"
    for x, residual in (total.args, total.args[::-1]):
        product = _under_views(x)
        if product is not None and isinstance(residual, fx.Node) and residual is not x:
            behind = _Behind(total, x, residual, product)
            found = _why_not(graph, norm, given["weight"], behind) or behind
            if not isinstance(found, str):
                break
    return found


def _under_views(x: Any) -> fx.Node | None:
    """The product of which x is a view, row for row; None where something else reads one of them."""
    node = x
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is aten.mm.default:
            return node if node.meta["val"].shape[-1] == x.meta["val"].shape[-1] else None
        if node.target not in _VIEWS:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return None


def _why_not(graph: fx.Graph, norm: fx.Node, weight: Any, behind: _Behind) -> str:
    rows, transposed = behind.product.args
    if not transposes(transposed) or transposed.args[0].op != "placeholder":
        return "the product's matrix is no weight of the model's as it is stored"
    values = [node.meta["val"] for node in (rows, transposed.args[0], behind.residual)]
    dtype = values[0].dtype
    alike = all(value.dtype == dtype and value.is_contiguous() for value in (*values, norm.meta["val"]))
    shape = behind.total.meta["val"].shape
    alike = alike and all(each.meta["val"].shape == shape for each in (behind.x, behind.residual))  # none is expanded
    if not alike or dtype not in _HALVES:
        return "product, residual and norm are not contiguous rows of one 16-bit dtype"
    if not all(isinstance(size, int) for size in values[1].shape):
        return "the sizes of the product's matrix are left open"
    if not _few(values[0].shape[0]):
        return f"more than {kernel.MOST_ROWS} rows"
    if values[0].device.type == "cuda" and not splits.measured(values[0].device):
        return "on this GPU taking over split products was not measured to pay"
    places = {node: place for place, node in enumerate(graph.nodes)}
    at = places[behind.total]
    if isinstance(weight, fx.Node) and places[weight] > at:
        return "the norm's weight is computed behind the add"
    return "" if _given_up(behind.residual, places, at) else "the residual is read later, or is the graph's own input"


def _few(m: Any) -> bool:
    """Whether so many rows are left to the norm. Of a size that is left open, the one that the graph was traced with
    decides."""
    count = m if isinstance(m, int) else getattr(m.node, "hint", None)
    return count is None or count <= kernel.MOST_ROWS


def _given_up(residual: fx.Node, places: dict[fx.Node, int], at: int) -> bool:
    """Whether nobody reads this tensor, or a view of it, behind the place `at`: the joined op writes the sum there."""
    base = residual
    while base.target in _VIEWS:
        base = base.args[0]  # type: ignore[assignment]
    if base.op != "call_function":
        return False
    waiting = [base]
    while waiting:
        for user in waiting.pop().users:
            if user.target in _VIEWS:
                waiting.append(user)
            elif places[user] > at:
                return False
    return True


def _join(graph: fx.Graph, norm: fx.Node, behind: _Behind) -> None:
    given = arguments_by_name(norm)
    total, x, residual, product = behind.total, behind.x, behind.residual, behind.product
    rows, transposed = product.args
    flat = product.meta["val"]
    with graph.inserting_before(total):
        if x is not product:
            residual = graph.call_function(aten.view.default, (residual, [-1, flat.shape[1]]))
            residual.meta["val"] = behind.residual.meta["val"].view(flat.shape)
        operands = {"rows": rows, "matrix": transposed.args[0], "residual": residual}
        named = {name: value for name, value in given.items() if name != "x"}
        joined = graph.call_function(auto_functionalized, (joined_op(),), {**operands, **named, "splits": ""})
        joined.meta["val"] = torch.empty_like(flat), torch.empty_like(flat)
        results = []
        for place, value in enumerate(joined.meta["val"]):
            result = graph.call_function(operator.getitem, (joined, place))
            result.meta["val"] = value
            if x is not product:
                shape = total.meta["val"].shape
                result = graph.call_function(aten.view.default, (result, x.args[1]))
                result.meta["val"] = value.view(shape)
            results.append(result)
    normed, summed = results
    norm.replace_all_uses_with(normed)
    graph.erase_node(norm)
    total.replace_all_uses_with(summed)
    graph.erase_node(total)
    while x is not product:
        x, view = x.args[0], x
        graph.erase_node(view)
    graph.erase_node(product)
    if not transposed.users:
        graph.erase_node(transposed)


def _write_out(graph: fx.Graph, norm: fx.Node) -> None:
    """Put the arithmetic of a norm in its place, decomposed as Inductor decomposes a model's."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    given = arguments_by_name(norm)
    weight, eps = given["weight"], given["eps"]
    spec = spec_of(weight is not None, *(given[name] for name in _SPEC))
    tensors = [node for node in (given["x"], weight) if node is not None]

    def arithmetic(*given: torch.Tensor) -> torch.Tensor:
        x, *weights = given
        return reference.rms_norm(x, weights[0] if weights else None, spec, IMPLIED_EPS if eps is None else eps)

    with torch.no_grad():
        traced = make_fx(arithmetic, select_decomp_table())(*(node.meta["val"] for node in tensors))
    traced.graph.eliminate_dead_code()
    copies: dict[fx.Node, Any] = {}
    inputs = iter(tensors)
    with graph.inserting_before(norm):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                norm.replace_all_uses_with(fx.map_arg(node.args[0], copies.__getitem__))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.erase_node(norm)
