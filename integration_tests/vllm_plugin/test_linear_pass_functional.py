"""Functional norms, as graphs without vLLM's IR hold them, and the products in front; needs no vLLM."""

from __future__ import annotations

import operator

import pytest
import torch
from lowered_layers import JOINED, NORM, Layer, M, N, aten, same_bits
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from rmsnorm_patch import ops
from rmsnorm_patch.numerics.spec import GEMMA
from rmsnorm_patch.vllm_plugin.decision import SPECS
from rmsnorm_patch.vllm_plugin.passes import linear_norm

PLAIN = torch.ops.rmsnorm_patch.fused_add_rms_norm.default
OFFSET_ARGS = ops.spec_args(GEMMA)[:4]


def functional(made: Layer, x: fx.Node, residual: fx.Node, form: str) -> tuple[fx.Node, fx.Node]:
    """The normed rows and the sum, of an op that writes, as torch makes a functional call of it, or of one that
    writes nothing, with fp32 `1 + w`."""
    if form == "plain":
        norm = made.call(PLAIN, x, residual, made.weight, 1e-5, *OFFSET_ARGS)
        return made.call(operator.getitem, norm, 0), made.call(operator.getitem, norm, 1)
    names = [argument.name for argument in NORM._schema.arguments]
    given = (x, residual, made.weight, 1e-5, *ops.spec_args(SPECS["rmsnorm_patch"]))
    norm = made.graph.call_function(auto_functionalized, (NORM,), dict(zip(names, given, strict=True)))
    norm.meta["val"] = (None, x.meta["val"], residual.meta["val"])
    return made.call(operator.getitem, norm, 1), made.call(operator.getitem, norm, 2)


def functional_layer(form: str, read_later: str = "") -> Layer:
    """Two products with a norm behind each. read_later: which operand of the first norm somebody reads after it."""
    made = Layer()
    square = made.input("square", N, N)
    residual = made.call(aten.relu.default, made.residual)
    x = made.product(made.rows, made.matrix)
    normed, total = functional(made, x, residual, form)
    second, second_total = functional(made, made.product(normed, square), total, form)
    later = {"x": x, "residual": residual, "": second}[read_later]
    return made.made(second, second_total, made.call(aten.relu.default, later))


def joined_calls(made: Layer) -> list[fx.Node]:
    return [node for node in made.graph.nodes if node.target is auto_functionalized and node.args == (JOINED,)]


@pytest.mark.parametrize("form", ["written", "plain"])
def test_a_functional_norm_and_its_product_become_one_functional_op(form: str) -> None:
    made = functional_layer(form)
    before = made.run()
    assert linear_norm.join(made.graph, "ahead 1 8") == 2
    made.graph.lint()
    first, second = joined_calls(made)
    assert (first.kwargs["rows"], first.kwargs["matrix"]) == (made.rows, made.matrix)
    assert {call.kwargs["splits"] for call in (first, second)} == {"ahead 1 8"}
    assert {call.kwargs["weight_offset"] for call in (first, second)} == {"fp32" if form == "plain" else "none"}
    assert [value.shape for value in first.meta["val"]] == [(M, N), (M, N)]
    assert not {aten.mm.default, aten.permute.default, PLAIN} & set(made.targets())
    assert same_bits(made.run(), before)


@pytest.mark.parametrize(
    ("form", "read_later", "joined"),
    [("written", "x", 1), ("plain", "x", 1), ("written", "residual", 2), ("plain", "residual", 1)],
)
def test_operands_that_are_read_after_a_functional_norm(form: str, read_later: str, joined: int) -> None:
    """A product that others read stays one. A residual that nobody gave up is not written; that of an op which writes
    is copied where it must be, with its product or without."""
    made = functional_layer(form, read_later)
    before = made.run()
    assert linear_norm.join(made.graph) == joined
    made.graph.lint()
    assert same_bits(made.run(), before)


@pytest.mark.parametrize(("form", "joined"), [("written", 1), ("plain", 0)])
def test_a_residual_that_is_the_graphs_input(form: str, joined: int) -> None:
    made = Layer()
    made.made(*functional(made, made.product(made.rows, made.matrix), made.residual, form))
    assert linear_norm.join(made.graph) == joined


def test_a_functional_norm_whose_results_go_on_as_a_pair_is_left() -> None:
    made = Layer()
    residual = made.call(aten.relu.default, made.residual)
    norm = made.call(PLAIN, made.product(made.rows, made.matrix), residual, made.weight, 1e-5)
    made.made(norm)
    assert linear_norm.join(made.graph) == 0
