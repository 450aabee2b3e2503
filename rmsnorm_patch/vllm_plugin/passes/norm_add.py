"""A change of vLLM's graph after all of its passes: a norm, the residual-add behind it and the norm that reads the sum
become one op (`fused.norm_add`).

Sandwich layouts have a norm behind a sub-layer whose result is added to the residual. vLLM writes this in two ways. In
one a fused add and norm takes the norm's result. In the other the add is the graph's own; a norm may read its sum.

The pass starts from our own ops, in the forms of `norms_in_graphs`, and runs behind `norm_quantised`. The op has the
bits of the separate kernels. An add of the graph's own is left where the compiler would compute it in one kernel with
what makes its terms or reads its sum: there the sum is not rounded in between, and costs no launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...fused.linear_norm.graph import tunes_products, writes
from ...fused.norm_add import op as norm_add_op
from ...numerics.contract import FUSED_ADD_IN_PLACE
from ...numerics.spec import NormSpec
from .. import trial
from .managed import ManagedPass
from .norms_in_graphs import (
    Norm,
    Positions,
    erase_unread,
    is_the_only_name,
    keep_place,
    may_be_a_view,
    norm_of,
    path_of,
    tell_once,
    unpacked,
)

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
_SERVING = ("backend", "enable_pdl")


@dataclass(frozen=True)
class Site:
    """A norm, the add that takes its result, and the norm of the sum where there is one. add: where the op will stand;
    the fused add and norm, or the graph's own add. residual: the other term."""

    norm: Norm
    add: fx.Node
    residual: fx.Node
    following: Norm | None

    @property
    def is_own_add(self) -> bool:
        return self.add.target is aten.add.Tensor

    @property
    def spec(self) -> NormSpec:
        """Of the op. A norm behind an add of the graph's own reads the sum as it was stored."""
        if self.following is None or self.is_own_add:
            return replace(self.norm.spec, sum="rounded")
        return self.following.spec


def fuse(graph: fx.Graph) -> int:
    """Put each norm of a graph and the add behind it into one op, with the norm of the sum; returns how many were."""
    count, gone = 0, set[fx.Node]()
    for node in list(graph.nodes):
        if node in gone or node.target is not torch.ops.rmsnorm_patch.rms_norm.default:
            continue
        norm = norm_of(node)
        places = {node: place for place, node in enumerate(graph.nodes)}
        site = None if norm is None else _site(norm, places)
        if site is None:
            continue
        if why := _declined(site, places):
            _tell(site, f"keeps the add behind it apart: {why}", why)
            continue
        _tell_served(site)
        gone |= _replace(graph, site, places)
        count += 1
    return count


def _site(norm: Norm, places: Positions) -> Site | None:
    """What adds a norm's result alone, if something does."""
    held = norm.node
    if len(held.users) == 1 and (copy := next(iter(held.users))).target is aten.clone.default:
        held = copy  # vLLM's, for an op that writes
    first = min(held.users, key=places.__getitem__, default=None)
    if first is None:
        return None
    if first.target is aten.add.Tensor:
        return _of_own_add(norm, first, places) if first in norm.node.users else None
    following = norm_of(first)
    if following is None or not following.adds:
        return None
    terms = [following.arguments["x"], following.arguments["residual"]]
    if terms.count(held) != 1 or (following.functional and len(held.users) > 1):
        return None
    terms.remove(held)
    return Site(norm, first, terms[0], following)


def _of_own_add(norm: Norm, add: fx.Node, places: Positions) -> Site | None:
    terms = [*add.args]
    if len(norm.node.users) > 1 or terms.count(norm.node) != 1 or add.kwargs.get("alpha", 1) != 1:
        return None
    terms.remove(norm.node)
    if not isinstance(terms[0], fx.Node) or not isinstance(terms[0].meta["val"], torch.Tensor):
        return None
    norms = (norm_of(user) for user in add.users if user.target is torch.ops.rmsnorm_patch.rms_norm.default)
    readers = [reader for reader in norms if reader is not None and reader.arguments["x"] is add]
    following = min(readers, key=lambda reader: places[reader.node], default=None)
    site = Site(norm, add, terms[0], following)
    if following is not None and _unlike(site, places):
        return replace(site, following=None)
    return site


def _unlike(site: Site, places: Positions) -> str:
    """Why one op does not compute both norms, or ""."""
    following = site.following
    if following is None:
        return ""
    one, other = (replace(norm.spec, sum="rounded") for norm in (site.norm, following))
    if one != other or any(site.norm.arguments[name] != following.arguments[name] for name in _SERVING):
        return "the norm of the sum has other numerics"
    weights = [norm.arguments["weight"] for norm in (site.norm, following)]
    if len({None if weight is None else weight.meta["val"].dtype for weight in weights}) > 1:
        return "the norms' weights have two dtypes"
    if weights[1] is not None and places[weights[1]] >= places[site.add]:
        return "the weight of the norm of the sum is computed behind the add"
    if site.is_own_add and _writer_between(site.add, following.node):
        return "something is written between the add and the norm of the sum"
    return ""


def _declined(site: Site, places: Positions) -> str:
    """Why these stay apart, or ""."""
    x, weight = site.norm.arguments["x"].meta["val"], site.norm.arguments["weight"]
    residual = site.residual.meta["val"]
    if residual.dtype != x.dtype or not _same_shape(residual, x):
        return "the residual has another dtype or shape"
    if not isinstance(x.shape[-1], int):
        return "the graph is one for rows of any length"
    value: Any = None if weight is None else weight.meta["val"]
    if site.norm.spec.output_dtype(x.dtype, None if weight is None else value.dtype) != x.dtype:
        return "the norm's result has another dtype than its input"
    if why := _unlike(site, places):
        return why
    if _writer_between(site.norm.node, site.add):
        return "something is written between the norm and the add"
    following = site.following
    if following is not None and following.op == FUSED_ADD_IN_PLACE.name and not residual.is_contiguous():
        return "the sum is written to rows that are not contiguous"
    if following is not None and not following.functional:
        written = [following.arguments[name] for name in ("x", "residual")]
        if not all(is_the_only_name(node, following.node, places) for node in written):
            return "a view of a term was taken before the sum was written"
    if site.is_own_add and (why := _left_to_the_compiler(site, places)):
        return why
    return trial.declined_norm_add(x, value, site.spec, following is not None)


def _same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    """As far as is known of numbers of rows that are left open; nothing is assumed of them."""
    pairs = zip(one.shape, other.shape, strict=False)
    return one.dim() == other.dim() and all(statically_known_true(mine == its) for mine, its in pairs)


def _writer_between(first: fx.Node, last: fx.Node) -> bool:
    node = first.next
    while node is not last:
        if node.op == "call_function" and writes(node.target):
            return True
        node = node.next
    return False


def _left_to_the_compiler(site: Site, places: Positions) -> str:
    """Which neighbour of the graph's own add the compiler may compute in one kernel with it, or ""."""
    if not site.add.meta["val"].is_contiguous():
        return "its sum is not contiguous"
    if not _is_stored(site, places):
        return "the compiler may compute the residual in the add's kernel"
    if reader := _unstored_reader(site.add):
        return f"the compiler may compute {reader.target} in the add's kernel"
    return ""


def _is_opaque(node: fx.Node) -> bool:
    """Whether the compiler computes nothing in one kernel with a node: what it reads and gives is stored."""
    if node.target is auto_functionalized:
        return True
    if node.target in _PRODUCTS:
        return not tunes_products()
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")


def _hands_on(node: fx.Node) -> bool:
    """Whether a node's readers read the memory of its input, or the values in it as they are."""
    return may_be_a_view(node) or node.target is aten.clone.default


def _unstored_reader(value: fx.Node) -> fx.Node | None:
    """What reads a value and may be computed in one kernel with it: no opaque node lies between the two."""
    direct, behind = {value}, set[fx.Node]()
    node = value.next
    while node.op == "call_function":
        inputs = node.all_input_nodes
        if not behind.isdisjoint(inputs):
            behind.add(node)
        elif not direct.isdisjoint(inputs):
            if _is_opaque(node):
                behind.add(node)
            elif _hands_on(node):
                direct.add(node)
            else:
                return node
        node = node.next
    return None


def _is_stored(site: Site, places: Positions) -> bool:
    """Whether the add reads its residual from memory: an input of the graph, what an opaque node gives, or what one
    reads that stands between the residual and the norm."""
    term = site.residual
    while _hands_on(term) and term.all_input_nodes:
        term = term.all_input_nodes[0]
    if term.op != "call_function" or _is_opaque(term):
        return True
    names, reached, stored = {term}, {term}, False
    node = term.next
    while node is not site.add:
        inputs = node.all_input_nodes
        stored = stored or (_is_opaque(node) and not names.isdisjoint(inputs))
        if not reached.isdisjoint(inputs):
            reached.add(node)
        if _hands_on(node) and not names.isdisjoint(inputs):
            names.add(node)
        node = node.next
    return stored and site.norm.node in reached


def _replace(graph: fx.Graph, site: Site, places: Positions) -> set[fx.Node]:
    """Put the op in place of the norm, the add and the norm of the sum; returns the norms that are gone."""
    unread = [site.residual] if _is_copy(site) else []
    with graph.inserting_before(site.add):
        normed, total = _insert(graph, site)
    following, dead = site.following, [site.add]
    if site.is_own_add:
        site.add.replace_all_uses_with(total)
        if following is not None:
            following.node.replace_all_uses_with(normed)
            dead = [following.node, site.add]
    elif following is not None and following.functional:
        following.rows.replace_all_uses_with(normed)
        dead = [following.rows, site.add]
        if following.total is not None:
            following.total.replace_all_uses_with(total)
            dead = [following.total, *dead]
    elif following is not None:
        for name, result in (("x", normed), ("residual", total)):
            following.arguments[name].replace_all_uses_with(
                result, delete_user_cb=lambda user: places.get(user, -1) > places[site.add]
            )
    for node in dead:
        graph.erase_node(node)
    copies = [user for user in site.norm.node.users if user.target is aten.clone.default]
    erase_unread(graph, [*copies, *unread, site.norm.node, normed, total])
    return {site.norm.node} if following is None else {site.norm.node, following.node}


def _is_copy(site: Site) -> bool:
    """Whether the residual was copied for an op that writes, and nothing has written since."""
    return site.residual.target is aten.clone.default and not _writer_between(site.residual, site.add)


def _insert(graph: fx.Graph, site: Site) -> tuple[fx.Node, fx.Node]:
    """(normed, sum); without a norm of the sum the first is the second."""
    given = site.norm.arguments
    residual = site.residual.args[0] if _is_copy(site) else site.residual
    arguments = {**given, "residual": residual, "sum": site.spec.sum}
    if site.following is not None:
        arguments.update({f"next_{name}": site.following.arguments[name] for name in ("weight", "eps")})
    name = norm_add_op.NORM_ADD if site.following is None else norm_add_op.NORM_ADD_NORM
    op = getattr(torch.ops.rmsnorm_patch, name).default
    node = graph.call_function(op, tuple(arguments[argument.name] for argument in op._schema.arguments))
    keep_place(node, site.norm.node)
    x = given["x"].meta["val"]
    if site.following is None:
        node.meta["val"] = x.new_empty(x.shape)
        return node, node
    normed, total = unpacked(graph, node, (x.new_empty(x.shape), x.new_empty(x.shape)))
    return normed, total


_TOLD: set[tuple[Any, ...]] = set()


def _tell(site: Site, what: str, *once: Any) -> None:
    tell_once(_TOLD, site.norm, f"{what}; so do others like it", *once)


def _tell_served(site: Site) -> None:
    if site.following is None:
        _tell(site, "adds the residual in its launch", site.is_own_add, "add")
    else:
        what = f"adds the residual and computes {path_of(site.following)} in its launch"
        _tell(site, what, site.is_own_add, site.following.functional)


PASS = ManagedPass("norm_add", fuse, "not every norm takes the add behind it")
