"""A change of vLLM's graph after all of its passes: silu_and_mul and the quantisation that reads it become one op
(`fused.silu_quantised`).

The product stands in a graph in three forms: as arithmetic that vLLM left to the compiler, as its op, and, with the
quantisation, as one op (`silu_and_mul_quant` by the model or a pass of vLLM's, `silu_and_mul_per_block_quant` by that
pass). What is computed follows the form. Inductor keeps silu and the product in fp32. The ops round as they say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from ...fused.silu_quantised import kernel as silu_kernel
from ...fused.silu_quantised import op as silu_op
from ...numerics.quantisation import GROUP, SCHEMES, QuantSpec, Scheme
from ...numerics.silu import DTYPES, Silu, silu_and_mul
from .. import trial
from ..log import logger
from ..settings import SILU_QUANTISED_VARIABLE
from . import quantisations
from .managed import ManagedPass
from .norm_quantised import quantisations_of, read_instead
from .norms_in_graphs import Positions, erase_unread, keep_place, place_in_model, unpacked
from .quantisations import Quantisation, WritingCall

aten, prims = torch.ops.aten, torch.ops.prims
_PACKETS = (
    *(aten.mul, aten.div, aten.neg, aten.exp, aten.add, aten.sigmoid, aten.reciprocal, aten.slice),
    *(aten._to_copy, prims.convert_element_type),
)
_ARITHMETIC = {getattr(packet, name) for packet in _PACKETS for name in packet.overloads()}
_MOST_NODES = 16
"""Of a silu_and_mul: a guard against walking a graph of arithmetic from each of its products."""
_ROWS = 8
"""Of the trial of arithmetic."""


@dataclass(frozen=True)
class SiluProduct:
    """silu(gate) * up in a graph. x: both halves; rows: what holds the result, from behind `node` on. nodes: what
    computes it, from last to first."""

    node: fx.Node
    x: fx.Node
    rows: fx.Node
    silu: Silu
    nodes: list[fx.Node]


def fuse(graph: fx.Graph, schemes: tuple[Scheme, ...] = SCHEMES) -> int:
    """Let each silu_and_mul of a graph write quantised rows whose readers want them; returns how many do. Rows of other
    schemes stay what they are."""
    count, places = 0, _places(graph)
    for node in list(graph.nodes):
        if node in places and _changed(graph, node, places, schemes):
            count, places = count + 1, _places(graph)
    return count


def _places(graph: fx.Graph) -> Positions:
    return {node: place for place, node in enumerate(graph.nodes)}


def _changed(graph: fx.Graph, node: fx.Node, places: Positions, schemes: tuple[Scheme, ...]) -> bool:
    """Whether a node was a silu_and_mul, and writes quantised rows now."""
    if whole := _whole(node):
        product, one = whole
        return _fuse(graph, product, [one], places, schemes)
    product_alone = _product(node, places)
    return product_alone is not None and _fuse_readers(graph, product_alone, places, schemes)


def _whole(node: fx.Node) -> tuple[SiluProduct, Quantisation] | None:
    """The product and its quantisation that a node is, in one op; None for any other node."""
    call = quantisations.call_of(node)
    if call is None or call.name not in _WHOLE:
        return None
    try:
        known = _WHOLE[call.name](call)
    except KeyError:  # this vLLM has another op of that name
        return None
    results = quantisations.results_of(call)
    if known is None or results is None or not _has_halves(call.input, results[0][0] if results[0] else None):
        return None
    silu, spec = known
    rows, *others = results
    scales = others[0] if others else []
    nodes = [*(rows + scales if call.functional else []), node, *quantisations.buffers_of(call)]
    given = call.arguments["scale"] if spec.scheme == "fp8_static" else None
    name = f"{quantisations.NAMESPACE}.{call.name}"
    one = Quantisation(spec, given, rows, scales, node, nodes, is_op=True, name=name)
    return SiluProduct(node, call.input, node, silu, []), one


def _whole_static(call: WritingCall) -> tuple[Silu, QuantSpec] | None:
    scale = call.arguments["scale"]
    if not isinstance(scale, fx.Node) or scale.meta["val"].numel() != 1:
        return None
    return "rounded", QuantSpec("fp8_static", arithmetic="fused")


def _whole_block(call: WritingCall) -> tuple[Silu, QuantSpec] | None:
    given = call.arguments
    rows = given["out"]
    if given["group_size"] != GROUP or given["scale_ub"] is not None or rows.meta["val"].dtype != torch.float8_e4m3fn:
        return None
    return "product", QuantSpec("fp8_block", "fp32", "fused", quantisations.layout_of(call, "scales"))


_WHOLE: dict[str, Callable[[WritingCall], tuple[Silu, QuantSpec] | None]] = {
    "silu_and_mul_quant": _whole_static,
    "silu_and_mul_per_block_quant": _whole_block,
}


def _has_halves(x: Any, rows: fx.Node | None) -> bool:
    """Whether rows [M, N] are of x [M, 2 * N], of a length that is known."""
    if not isinstance(x, fx.Node) or rows is None:
        return False
    value, result = x.meta.get("val"), rows.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if value.dim() != 2 or result.dim() != 2 or value.dtype not in DTYPES:
        return False
    return isinstance(value.shape[-1], int) and value.shape[-1] == 2 * result.shape[-1]


def _product(node: fx.Node, places: Positions) -> SiluProduct | None:
    if call := quantisations.call_of(node, "silu_and_mul"):
        results = quantisations.results_of(call) if call.name == "silu_and_mul" else None
        if results is None or len(results[0]) != 1 or not _has_halves(call.input, results[0][0]):
            return None
        nodes = [*(results[0] if call.functional else []), node, *quantisations.buffers_of(call)]
        return SiluProduct(node, call.input, results[0][0], "rounded", nodes)
    return _product_in_arithmetic(node, places)


def _product_in_arithmetic(node: fx.Node, places: Positions) -> SiluProduct | None:
    value = node.meta.get("val")
    if node.target is not aten.mul.Tensor or not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
        return None
    inside: set[fx.Node] = set()
    sources, waiting = set[fx.Node](), [node]
    while waiting:
        each = waiting.pop()
        if each is not node and _has_halves(each, node) and each.meta["val"].dtype == value.dtype:
            sources.add(each)
        elif each.op == "call_function" and each.target in _ARITHMETIC and len(inside) < _MOST_NODES:
            if each not in inside:
                inside.add(each)
                waiting += each.all_input_nodes
        elif isinstance(each.meta.get("val"), torch.Tensor):
            return None
    if len(sources) != 1:
        return None
    nodes, (x,) = sorted(inside, key=places.__getitem__), sources
    with _disable_current_modes():
        if not _is_silu_and_mul(nodes, x):
            return None
    return SiluProduct(node, x, node, "fp32", nodes[::-1])


def _is_silu_and_mul(nodes: list[fx.Node], x: fx.Node) -> bool:
    """Run the nodes on a few rows, on the CPU, and compare: how they are written changes with releases of torch."""
    if sum(node.target in (aten.exp.default, aten.sigmoid.default) for node in nodes) != 1:
        return False
    n = x.meta["val"].shape[-1]
    rows = torch.randn(_ROWS, n, generator=torch.Generator().manual_seed(n)) * 4
    values: dict[fx.Node, Any] = {x: rows.to(x.meta["val"].dtype)}
    want = silu_and_mul(values[x])
    if any(not isinstance(each.meta.get("val"), torch.Tensor) for node in nodes for each in node.all_input_nodes):
        return False
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    value = values[nodes[-1]]
    rtol = 4 * torch.finfo(want.dtype).eps
    return value.shape == want.shape and torch.allclose(value.float(), want.float(), rtol=rtol, atol=1e-5)


def _fuse_readers(graph: fx.Graph, product: SiluProduct, places: Positions, schemes: tuple[Scheme, ...]) -> bool:
    """The product and what quantises its rows, if nothing else reads them."""
    quantisers, left = quantisations_of(product.rows, lambda node: places[node] > places[product.node], places, "fp32")
    if not quantisers and not left:
        return False
    same = [one for one in quantisers if one.key == quantisers[0].key]
    owned = {node for one in same for node in one.nodes} | set(product.nodes)
    others = [user for user in product.rows.users if user not in owned]
    if left or len(same) < len(quantisers) or others:
        why = "; ".join(left) or "its rows have other readers too"
        _tell(product, f"keeps plain rows: {why}", "plain", why)
        return False
    return _fuse(graph, product, same, places, schemes)


def _fuse(
    graph: fx.Graph,
    product: SiluProduct,
    same: list[Quantisation],
    places: Positions,
    schemes: tuple[Scheme, ...],
) -> bool:
    first = same[0]
    if why := _declined(product, first, places, schemes):
        _tell(product, f"is left to {first.name}: {why}", "left", first.spec, why)
        return False
    with graph.inserting_before(product.node):
        rows, scales = _insert(graph, product, first)
        read_instead(graph, same, rows, scales, places)
    for one in same:
        erase_unread(graph, one.nodes)
    erase_unread(graph, product.nodes)
    erase_unread(graph, [scales])
    text = f"writes {first.spec.scheme} rows of its {first.spec.value} value, in place of {first.name}"
    _tell(product, text, first.spec, first.name)
    return True


def _declined(product: SiluProduct, quantiser: Quantisation, places: Positions, schemes: tuple[Scheme, ...]) -> str:
    """Why the kernel does not write these rows, or ""."""
    if quantiser.spec.scheme not in schemes:
        return f"no engine with {quantiser.spec.scheme} rows was measured; {SILU_QUANTISED_VARIABLE}=on serves them"
    if quantiser.given is not None and places[quantiser.given] > places[product.node]:
        return "its scale is computed behind the product"
    return trial.declined_silu(product.x.meta["val"], product.silu, quantiser.spec, quantiser.given is not None)


def _insert(graph: fx.Graph, product: SiluProduct, quantiser: Quantisation) -> tuple[fx.Node, fx.Node]:
    """The op's two results."""
    op, spec = torch.ops.rmsnorm_patch.silu_and_mul_quantised.default, quantiser.spec
    node = graph.call_function(
        op, (product.x, quantiser.given, spec.scheme, *silu_op.silu_args(product.silu, spec), "auto", True)
    )
    keep_place(node, product.node)
    rows, scales = unpacked(graph, node, silu_kernel.new_results(product.x.meta["val"], spec))
    return rows, scales


_TOLD: set[tuple[Any, ...]] = set()


def _tell(product: SiluProduct, what: str, *once: Any) -> None:
    """One line in the log for products of a length that this is so of."""
    columns = product.x.meta["val"].shape[-1] // 2
    if (columns, *once) not in _TOLD:
        _TOLD.add((columns, *once))
        path = place_in_model(product.node, *product.nodes) or "a silu_and_mul"
        logger.info("rmsnorm_patch: %s (%s columns) %s; so do others like it", path, columns, what)


PASS = ManagedPass("silu_quantised", fuse, "not every silu_and_mul writes quantised rows")
