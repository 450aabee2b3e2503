"""What vLLM's product for FlashInfer and DeepGEMM does to its bf16 rows, as a node of a graph while passes look at it.

`block_products` parts such a product in two: this node, which quantises, and a product of quantised rows. The pass for
quantised rows knows it as one more quantisation. No graph that runs has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...numerics.quantisation import QuantSpec, new_scales
from .norms_in_graphs import unpacked
from .quantisations import Quantisation, views_to

NAME = "dynamic_flashinfer_deepgemm_blockscale_gemm"
"""The product's op, in the namespace `vllm`."""


def quantised(rows: Any, power_of_two: bool) -> Any:
    """The node's target: (rows, scales) of bf16 rows [M, K]."""
    raise AssertionError("the node is taken out of the graph before it runs")


def spec_of(power_of_two: bool) -> QuantSpec:
    """As the product quantises: the number of rows chooses. Both of its libraries read scales in padded columns."""
    return QuantSpec("fp8_block", "rounded", "by_rows", "tma_aligned", power_of_two)


def insert(graph: fx.Graph, rows: fx.Node, power_of_two: bool) -> tuple[fx.Node, fx.Node]:
    """(rows, scales), the results of a new node."""
    quant, value = spec_of(power_of_two), rows.meta["val"]
    values = value.new_empty(value.shape, dtype=quant.dtype), new_scales(value, quant)
    node = graph.call_function(quantised, (rows, power_of_two))
    written, scales = unpacked(graph, node, values)
    return written, scales


def is_inserted(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is quantised


def of_node(node: fx.Node, rows: fx.Node) -> Quantisation | str:
    """What the node quantises these rows of a norm to, or why it is left alone."""
    given, power_of_two = node.args
    views, source = views_to(given)
    if source is not rows:
        return "it reads what was computed of the rows"
    if rows.meta["val"].dtype != torch.bfloat16:
        return f"its rows are {rows.meta['val'].dtype}"
    held: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    for user in node.users:
        held[user.args[1]].append(user)  # type: ignore[index]
    quantised_rows, scales = held
    made_by = [*quantised_rows, *scales, node, *views]
    return Quantisation(spec_of(bool(power_of_two)), None, quantised_rows, scales, node, made_by, is_op=True)
