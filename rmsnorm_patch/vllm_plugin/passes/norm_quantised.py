"""A change of vLLM's graph after all of its passes: a norm and the quantisation that reads it become one op
(`fused.norm_quantised`).

What reads a norm decides, not the name of the model's quantisation. A reader that quantises for itself, or does not,
reads plain rows, and the norm stays as it is. Readers of both kinds get two outputs. Each norm in front of a
quantisation that none of our kernels has is named in the log.

The pass starts from our own ops, in the forms that `linear_norm` knows, and runs in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from ...fused.norm_quantised import kernel as norm_quantised_kernel
from ...fused.norm_quantised import op as norm_quantised_op
from ...numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE
from ...numerics.quantisation import QuantSpec, Value
from ...numerics.spec import NormSpec
from .. import trial
from . import block_rows, quantisations, quantised_arithmetic
from .managed import ManagedPass
from .norms_in_graphs import (
    Norm,
    Positions,
    erase_unread,
    is_the_only_name,
    keep_place,
    norm_of,
    tell_once,
    unpacked,
)
from .quantisations import Quantisation

aten = torch.ops.aten


def fuse(graph: fx.Graph) -> int:
    """Let each norm of a graph write quantised rows whose readers want them; returns how many do."""
    count = 0
    for node in list(graph.nodes):
        norm = norm_of(node)
        if norm is not None:
            count += _fuse(graph, norm, {node: place for place, node in enumerate(graph.nodes)})
    return count


def _fuse(graph: fx.Graph, norm: Norm, places: Positions) -> bool:
    """Whether the norm writes quantised rows now."""
    quantisers, left = quantisations_of(
        norm.rows, lambda node: places[node] > places[norm.node], places, _value(norm.spec)
    )
    first = None
    for one in quantisers:
        why = _declined(norm, one, places)
        if first is None and not why:
            first = one
        elif first is None or one.key != first.key:
            left.append(f"{one.name}: {why or 'another quantisation reads the same rows'}")
    for why in left:
        tell_once(_TOLD, norm, f"keeps plain rows for {why}")
    if first is None:
        if not left:
            _tell_plain(norm, places)
        return False
    both = _replace(graph, norm, [one for one in quantisers if one.key == first.key], places)
    _tell_served(norm, first, both)
    return True


def quantisations_of(
    rows: fx.Node, come_after: Callable[[fx.Node], bool], places: Positions, value: Value
) -> tuple[list[Quantisation], list[str]]:
    """What quantises rows, the first in the graph first; and what else does, with the reason why that is left alone.
    value: what arithmetic reads, once it is no longer the compiler's."""
    quantisers, left = list[Quantisation](), list[str]()
    readers = quantisations.readers(rows, come_after, quantised_arithmetic.ARITHMETIC.__contains__)
    for reader in sorted(readers, key=places.__getitem__):
        one: Quantisation | str
        if call := quantisations.call_of(reader):
            one, name = quantisations.of_op(call, rows), f"{quantisations.NAMESPACE}.{call.name}"
        elif block_rows.is_inserted(reader):
            one, name = block_rows.of_node(reader, rows), f"vllm.{block_rows.NAME}"
        elif quantisations.is_quantised(reader):
            one, name = quantised_arithmetic.of_arithmetic(reader, rows, come_after), "a quantisation in arithmetic"
        else:
            continue
        if isinstance(one, str):
            left.append(f"{name}: {one}")
        else:
            spec = one.spec if one.is_op else replace(one.spec, value=value)
            quantisers.append(replace(one, spec=spec, name=name))
    return quantisers, left


def _value(spec: NormSpec) -> Value:
    """What arithmetic reads that the compiler would have fused with the norm: its fp32 value, where the norm has the
    numerics of such a fusion. Any other norm stands for an op, whose result is stored first."""
    return "fp32" if (spec.sum, spec.round_before_weight) == ("fp32", "none") else "rounded"


def _declined(norm: Norm, quantiser: Quantisation, places: Positions) -> str:
    """Why the kernel does not write these rows for this norm, or ""."""
    if quantiser.given is not None and places[quantiser.given] > places[norm.node]:
        return "its scale is computed behind the norm"
    x, weight = norm.arguments["x"].meta["val"], norm.arguments["weight"]
    if x.dim() != 2:
        return f"the rows have {x.dim()} dimensions"
    if not isinstance(x.shape[-1], int):
        return "the graph is one for rows of any length"
    if norm.op == FUSED_ADD.name and not _is_given_up(norm.arguments["residual"], norm.node):
        return "nobody gave up the residual, which would be copied first"
    # The op's rows are contiguous, and its sum lies where the residual did: as those of this norm only if this is.
    place = {FUSED_ADD_IN_PLACE.name: "x", FUSED_ADD.name: "residual"}.get(norm.op)
    if place is not None and not norm.arguments[place].meta["val"].is_contiguous():
        return "the rows are not contiguous"
    if not norm.functional and not is_the_only_name(norm.rows, norm.node, places):
        return "a view of the rows was taken before the norm wrote them"
    value = None if weight is None else weight.meta["val"]
    return trial.declined_quantised(x, value, norm.spec, quantiser.spec, norm.adds, quantiser.given is not None)


def _is_given_up(residual: fx.Node, norm: fx.Node) -> bool:
    return residual.op != "placeholder" and all(user is norm for user in residual.users)


def _replace(graph: fx.Graph, norm: Norm, same: list[Quantisation], places: Positions) -> bool:
    """Put the op that writes quantised rows in place of the norm, and its results in place of what quantised them.
    Returns whether somebody reads the plain rows too."""

    with graph.inserting_before(norm.node):
        node, results = _insert(graph, norm, same[0])
        rows, scales, normed, *totals = results
        read_instead(graph, same, rows, scales, places)
    _replace_behind(norm.rows, normed, norm.node, places)
    if norm.total is not None:
        norm.total.replace_all_uses_with(totals[0])
    for one in same:
        erase_unread(graph, one.nodes)
    both = bool(normed.users)
    if not both:
        _write_rows_once(node, norm, same[0].spec)
    erase_unread(graph, results)
    if norm.functional and norm.rows is not norm.node:
        erase_unread(graph, [norm.rows] if norm.total is None else [norm.rows, norm.total])
    graph.erase_node(norm.node)
    return both


def read_instead(graph: fx.Graph, same: list[Quantisation], rows: fx.Node, scales: fx.Node, places: Positions) -> None:
    """Whoever reads what these quantisations give reads `rows` and `scales`. Views are put where the graph inserts."""
    for one in same:
        for held, result in (*((old, rows) for old in one.rows), *((old, scales) for old in one.scales)):
            _replace_behind(held, _as_shaped(graph, result, held), one.node, places)


def _replace_behind(old: fx.Node, new: fx.Node, node: fx.Node, places: Positions) -> None:
    old.replace_all_uses_with(new, delete_user_cb=lambda user: places.get(user, -1) > places[node])


def _insert(graph: fx.Graph, norm: Norm, quantiser: Quantisation) -> tuple[fx.Node, list[fx.Node]]:
    """The op, with both outputs, and each of its results; in front of the norm."""
    name = norm_quantised_op.FUSED if norm.adds else norm_quantised_op.PLAIN
    op = getattr(torch.ops.rmsnorm_patch, name).default
    quant = quantiser.spec
    names = ("value", "arithmetic", "layout", "power_of_two", "both")
    more = dict(zip(names, norm_quantised_op.quant_args(quant, both=True), strict=True))
    arguments = {**norm.arguments, "given": quantiser.given, "scheme": quant.scheme, **more}
    values = _values(norm, quant, both=True)
    if norm.adds and norm.functional:
        node = graph.call_function(auto_functionalized, (op,), arguments)
        values = *values, norm.arguments["residual"].meta["val"]
    else:
        node = graph.call_function(op, tuple(arguments[argument.name] for argument in op._schema.arguments))
    keep_place(node, norm.node)
    return node, unpacked(graph, node, values)


def _values(norm: Norm, quant: QuantSpec, both: bool) -> tuple[torch.Tensor, ...]:
    weight = norm.arguments["weight"]
    value = None if weight is None else weight.meta["val"]
    return norm_quantised_kernel.new_results(norm.arguments["x"].meta["val"], value, norm.spec, quant, both)


def _write_rows_once(node: fx.Node, norm: Norm, quant: QuantSpec) -> None:
    if node.target is auto_functionalized:
        node.kwargs = {**node.kwargs, "both": False}
    else:
        node.args = (*node.args[:-1], False)
    node.meta["val"] = *_values(norm, quant, both=False), *node.meta["val"][3:]


def _as_shaped(graph: fx.Graph, result: fx.Node, held: fx.Node) -> fx.Node:
    """A result [M, ...] in the shape that its readers know: arithmetic has groups in a dimension of their own."""
    value = held.meta["val"]
    if value.dim() == 2:
        return result
    shaped = graph.call_function(aten.reshape.default, (result, [-1, *value.shape[1:]]))
    shaped.meta["val"] = value
    return shaped


_TOLD: set[tuple[Any, ...]] = set()


def _tell_served(norm: Norm, quantiser: Quantisation, both: bool) -> None:
    spec = quantiser.spec
    value = "its fp32 value" if spec.value == "fp32" else "its rounded value"
    second = ", and plain rows beside them" if both else ""
    text = f"writes {spec.scheme} rows of {value}, in place of {quantiser.name}{second}; so do others like it"
    tell_once(_TOLD, norm, text, spec, quantiser.name, both)


def _tell_plain(norm: Norm, places: Positions) -> None:
    """Which plain rows are read by whom."""
    behind = (user for user in norm.rows.users if places[user] > places[norm.node])
    names = sorted({str(user.args[0] if user.target is auto_functionalized else user.target) for user in behind})
    if norm.rows.meta["val"].dim() == 2:
        tell_once(
            _TOLD, norm, f"writes plain rows, as {', '.join(names)} reads them; so do others like it", "plain", *names
        )


PASS = ManagedPass("quantised", fuse, "not every norm writes quantised rows")
