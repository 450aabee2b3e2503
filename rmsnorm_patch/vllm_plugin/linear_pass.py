"""A change of vLLM's lowered graph: a product and the fused norm that reads it become one op (`linear_norm`).

Only this graph shows which product a norm reads. In a layer these are the output projection of attention and the down
projection, as long as nothing lies between: with tensor parallel an all-reduce does, and the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..fused.linear_norm import op as linear_ops
from ..fused.linear_norm import splits as product_splits
from .decision import Decision, decision_for
from .log import logger, warn_once

aten = torch.ops.aten


def _transposes(node: Any) -> bool:
    """Whether a node exchanges the two dimensions of a matrix."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[union-attr, operator, misc]
    if node.target is aten.transpose.int:
        return {d % 2 for d in node.args[1:3]} == {0, 1}  # type: ignore[operator]
    return node.target is aten.t.default


def join(graph: fx.Graph, splits: str = "") -> int:
    """Join every fused norm of a lowered graph with its product; returns how many were. splits: as `splits_of` gives
    it for the engine."""
    norm_op = torch.ops.rmsnorm_patch.fused_add_rms_norm_.default
    op = getattr(torch.ops.rmsnorm_patch, linear_ops.NAME).default
    count = 0
    norm: Any  # of a node's arguments mypy knows nothing
    for norm in [node for node in graph.nodes if node.target is norm_op]:
        x, residual, weight, *rest = norm.args
        product = _product_of(x, norm)
        if product is None:
            continue
        rows, transposed = product.args
        if splits:
            rest += [*linear_ops.DEFAULTS[len(rest) - 1 : -1], splits]
        with graph.inserting_before(norm):
            joined = graph.call_function(op, (rows, transposed.args[0], residual, weight, *rest))
        joined.meta.update(x.meta)
        x.replace_all_uses_with(joined, delete_user_cb=lambda user, norm=norm: user is not norm)
        for node in dict.fromkeys((norm, x, product)):
            graph.erase_node(node)
        if not transposed.users:
            graph.erase_node(transposed)
        count += 1
    return count


def _product_of(x: Any, norm: fx.Node) -> Any:
    """The product that x, which the norm reads and overwrites, holds, if it can be computed where the norm stands.

    x may be vLLM's clone of it, for nobody else's sake. Whatever lies between must not read x or write to anything.
    """
    product = x
    if isinstance(x, fx.Node) and x.target is aten.clone.default and len(x.all_input_nodes[0].users) == 1:
        product = x.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.mm.default or norm.kwargs:
        return None
    transposed: Any = product.args[1]
    residual = norm.args[1]
    if not _transposes(transposed):
        return None
    rows, matrix = product.args[0], transposed.args[0]
    if not isinstance(matrix, fx.Node) or matrix.op != "placeholder":
        return None
    if not isinstance(rows, fx.Node) or not isinstance(residual, fx.Node):
        return None
    node = product.next
    while node is not norm:
        if node.op == "call_function" and (_writes(node.target) or (node is not x and x in node.all_input_nodes)):
            return None
        node = node.next
    values = [node.meta["val"] for node in (rows, matrix, residual)]
    alike = all(value.dim() == 2 and value.dtype == values[0].dtype and value.is_contiguous() for value in values)
    return product if alike else None


def _writes(target: Any) -> bool:
    """Whether an op may change a tensor that it is given; what is no op with a schema counts as one that may."""
    schema = getattr(target, "_schema", None)
    return getattr(target, "__name__", "") != "getitem" and (schema is None or schema.is_mutable)


_TOLD: set[tuple[int, int]] = set()


def tell(product: product_splits.Product, split: product_splits.Split) -> None:
    """One line for each matrix whose products come in parts."""
    matrix = product.n, product.k
    if split.kind == "parts" and matrix not in _TOLD:
        _TOLD.add(matrix)
        text = "rmsnorm_patch: behind a product with a %d x %d matrix the norm adds up %d parts (first at %d rows)"
        logger.info(text, *matrix, split.parts, product.m)


def splits_of(vllm_config: Any, decision: Decision) -> str:
    """Under which settings an engine's ops look at products: ahead, at the rows of its captured graphs."""
    if not decision.linear:
        return ""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or ()
    return product_splits.settings_of(sizes, decision.reorder)


def wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of vLLM's lowering pass: it learns whether and how its engine joins products and norms."""

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        decision = decision_for(vllm_config)
        self.rmsnorm_patch_linear = decision.linear
        self.rmsnorm_patch_splits = splits_of(vllm_config, decision)

    return init


def wrap_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, graph: fx.Graph) -> None:
        original(self, graph)
        if _joins(self) and not _tunes_products():
            try:
                join(graph, _splits(self))
            except Exception as error:  # each step leaves a right graph
                warn_once(f"not every product is joined with its norm: {type(error).__name__}: {error}")

    return call


def _tunes_products() -> bool:
    """Whether the compiler chooses kernels for this graph's products itself, which an op would take from it."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def wrap_uuid(original: Callable[..., Any]) -> Callable[..., Any]:
    """The pass is part of the key of Inductor's own cache, which engines of different settings may share."""

    def uuid(self: Any) -> str:
        return f"{original(self)}|rmsnorm_patch linear {_joins(self)} {_splits(self)}"

    return uuid


def _joins(lowering: Any) -> bool:
    """What `wrap_init` has told a pass; one that was made before leaves products alone."""
    return getattr(lowering, "rmsnorm_patch_linear", False)


def _splits(lowering: Any) -> str:
    return getattr(lowering, "rmsnorm_patch_splits", "")
