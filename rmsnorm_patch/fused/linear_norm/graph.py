"""A product and the fused norm that reads it become one op (`linear_norm`), in a graph of somebody else's.

Only a graph shows which product a norm reads. In a layer these are the output projection of attention and the down
projection, as long as nothing lies between: with tensor parallel an all-reduce does, and the graph stays as it is.

It starts from our own ops. They come in three forms: written in place, the same as a functional call (what torch makes
of an op that writes), and the op that writes nothing. Of the last two the joined op is a functional call too, and
Inductor decides where it writes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from ...numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE
from . import op as linear_norm_op

aten = torch.ops.aten


def transposes(node: Any) -> bool:
    """Whether a node exchanges the two dimensions of a matrix."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[union-attr, operator, misc]
    if node.target is aten.transpose.int:
        return {d % 2 for d in node.args[1:3]} == {0, 1}  # type: ignore[operator]
    return node.target is aten.t.default


def join(graph: fx.Graph, splits: str = "") -> int:
    """Join every fused norm of a graph with its product; returns how many were. splits: as `splits_of` gives it for
    the engine."""
    return _join_in_place(graph, splits) + _join_functional(graph, splits)


def joined_op() -> Any:
    return getattr(torch.ops.rmsnorm_patch, linear_norm_op.NAME).default


def _join_in_place(graph: fx.Graph, splits: str) -> int:
    norm_op = torch.ops.rmsnorm_patch.fused_add_rms_norm_.default
    count = 0
    norm: Any  # of a node's arguments mypy knows nothing
    for norm in [node for node in graph.nodes if node.target is norm_op and not node.kwargs]:
        x, residual, weight, *rest = norm.args
        product = _product_of(x, residual, norm)
        if product is None:
            continue
        rows, transposed = product.args
        if splits:
            rest += [*linear_norm_op.DEFAULTS[len(rest) - 1 : -1], splits]
        with graph.inserting_before(norm):
            joined = graph.call_function(joined_op(), (rows, transposed.args[0], residual, weight, *rest))
        joined.meta.update(x.meta)
        x.replace_all_uses_with(joined, delete_user_cb=lambda user, norm=norm: user is not norm)
        _erase(graph, norm, x, product, transposed)
        count += 1
    return count


def _join_functional(graph: fx.Graph, splits: str) -> int:
    count = 0
    for norm, given, results in list(_functional_norms(graph)):
        x, residual = given.pop("x"), given.pop("residual")
        product = _product_of(x, residual, norm)
        if product is None or len(x.users) > 1 or len(product.users) > 1:
            continue
        rows, transposed = product.args
        operands = {"rows": rows, "matrix": transposed.args[0], "residual": residual}
        with graph.inserting_before(norm):
            joined = graph.call_function(auto_functionalized, (joined_op(),), {**operands, **given, "splits": splits})
        joined.meta["val"] = x.meta["val"], residual.meta["val"]
        for user in list(norm.users):
            user.args = (joined, results.index(user.args[1]))
        _erase(graph, norm, x, product, transposed)
        count += 1
    return count


def _functional_norms(graph: fx.Graph) -> Iterator[tuple[Any, dict[str, Any], tuple[int, int]]]:
    """Each fused norm that is a functional call, its arguments by name, and which of its results are the normed rows
    and the sum."""
    plain, written = (
        getattr(torch.ops.rmsnorm_patch, name).default for name in (FUSED_ADD.name, FUSED_ADD_IN_PLACE.name)
    )
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target is auto_functionalized and node.args == (written,):
            given, results = dict(node.kwargs), (1, 2)  # before what an op wrote is what it returned, here nothing
        elif node.target is plain:
            given, results = arguments_by_name(node), (0, 1)
            # Nobody gave this residual up. Where it is read later, or is not the graph's own, writing it costs a copy.
            residual = given["residual"]
            if residual.op == "placeholder" or max(places[user] for user in residual.users) > places[node]:
                continue
        else:
            continue
        if all(user.target is operator.getitem and user.args[1] in results for user in node.users):
            yield node, given, results


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op's call, those that it left out included."""
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((parameter.name for parameter in parameters), node.args, strict=False))
    return {**{parameter.name: parameter.default_value for parameter in parameters}, **given, **node.kwargs}


def _erase(graph: fx.Graph, norm: fx.Node, x: fx.Node, product: fx.Node, transposed: fx.Node) -> None:
    for node in dict.fromkeys((norm, x, product)):
        graph.erase_node(node)
    if not transposed.users:
        graph.erase_node(transposed)


def _product_of(x: Any, residual: Any, norm: fx.Node) -> Any:
    """The product that x, which the norm reads and may overwrite, holds, if it can be computed where the norm stands.

    x may be a clone of it, for nobody else's sake. Whatever lies between must not read x or write to anything.
    """
    product = x
    if isinstance(x, fx.Node) and x.target is aten.clone.default and len(x.all_input_nodes[0].users) == 1:
        product = x.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.mm.default:
        return None
    transposed: Any = product.args[1]
    if not transposes(transposed):
        return None
    rows, matrix = product.args[0], transposed.args[0]
    if not isinstance(matrix, fx.Node) or matrix.op != "placeholder":
        return None
    if not isinstance(rows, fx.Node) or not isinstance(residual, fx.Node):
        return None
    node = product.next
    while node is not norm:
        if node.op == "call_function" and (writes(node.target) or (node is not x and x in node.all_input_nodes)):
            return None
        node = node.next
    values = [node.meta["val"] for node in (rows, matrix, residual)]
    alike = all(value.dim() == 2 and value.dtype == values[0].dtype and value.is_contiguous() for value in values)
    return product if alike else None


def writes(target: Any) -> bool:
    """Whether an op may change a tensor that it is given; what is no op with a schema counts as one that may."""
    if target is auto_functionalized:
        return False
    schema = getattr(target, "_schema", None)
    return getattr(target, "__name__", "") != "getitem" and (schema is None or schema.is_mutable)


def tunes_products() -> bool:
    """Whether the compiler chooses kernels for this graph's products itself, which an op would take from it."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)
