"""Which products of a lowered graph are joined with their norms, on graphs made by hand; needs no vLLM."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowered_layers import JOINED, NORM, SPEC_ARGS, K, Layer, M, N, aten, layer, same_bits

from rmsnorm_patch.vllm_plugin.passes import linear_norm


@pytest.mark.parametrize("with_clone", [False, True])
def test_a_product_and_its_norm_become_one_op(with_clone: bool) -> None:
    made = layer(with_clone)
    before = made.run()
    assert linear_norm.join(made.graph) == 1
    made.graph.lint()
    assert made.targets() == [JOINED, aten.permute.default, aten.mm.default]
    (joined,) = made.joined()
    assert joined.args == (made.rows, made.matrix, made.residual, made.weight, 1e-5, *SPEC_ARGS)
    assert not joined.kwargs
    assert {user.target for user in joined.users} == {aten.mm.default, "output"}
    assert joined.meta["val"].shape == (M, N)
    assert same_bits(made.run(), before)


def test_every_norm_of_a_graph_is_joined_where_it_stands() -> None:
    made = Layer()
    square = made.input("square", N, N)
    x = made.product(made.rows, made.matrix)
    residual = made.call(aten.clone.default, made.residual)
    made.norm(x, residual)
    second = made.call(aten.clone.default, made.product(x, square))
    made.norm(second, residual)
    made.made(second, residual)
    before = made.run()
    assert linear_norm.join(made.graph) == 2
    made.graph.lint()
    assert made.targets() == [aten.clone.default, JOINED, JOINED]
    assert same_bits(made.run(), before)


def test_a_transposition_that_others_read_stays() -> None:
    made = Layer()
    transposed = made.call(aten.permute.default, made.matrix, [1, 0])
    x = made.call(aten.mm.default, made.rows, transposed)
    made.norm(x, made.residual)
    made.made(x, made.call(aten.mm.default, made.rows, transposed))
    before = made.run()
    assert linear_norm.join(made.graph) == 1
    made.graph.lint()
    assert made.targets() == [aten.permute.default, JOINED, aten.mm.default]
    assert same_bits(made.run(), before)


@pytest.mark.parametrize(
    ("target", "dims"),
    [
        (aten.t.default, ()),
        (aten.permute.default, ([-1, -2],)),
        (aten.transpose.int, (0, 1)),
        (aten.transpose.int, (-1, 0)),
    ],
)
def test_any_form_of_a_transposition(target: Any, dims: tuple[Any, ...]) -> None:
    made = Layer()
    x = made.call(aten.mm.default, made.rows, made.call(target, made.matrix, *dims))
    made.norm(x, made.residual)
    made.made(x)
    before = made.run()
    assert linear_norm.join(made.graph) == 1
    assert made.targets() == [JOINED]
    assert same_bits(made.run(), before)


@pytest.mark.parametrize(
    ("target", "dims"),
    [(aten.permute.default, ([0, 1],)), (aten.permute.default, ([0, -1],)), (aten.transpose.int, (1, -1))],
)
def test_a_square_matrix_exchanged_with_itself_is_not_transposed(target: Any, dims: tuple[Any, ...]) -> None:
    made = Layer()
    rows, square = made.input("left", M, N), made.input("square", N, N)
    x = made.call(aten.mm.default, rows, made.call(target, square, *dims))
    made.norm(x, made.residual)
    made.made(x)
    assert linear_norm.join(made.graph) == 0


@pytest.mark.parametrize("with_clone", [False, True])
def test_what_only_reads_may_stand_between(with_clone: bool) -> None:
    """Also the choice of one of several results, which is no op."""
    made = Layer()
    x = made.product(made.rows, made.matrix)
    half = made.call(operator.getitem, made.call(aten.split.Tensor, made.residual, 32, 1), 1)
    if with_clone:
        x = made.call(aten.clone.default, x)
    other = made.call(aten.add.Tensor, made.call(aten.relu.default, made.rows), made.rows)
    residual = made.call(aten.clone.default, made.residual)
    made.norm(x, residual)
    made.made(x, residual, half, other)
    before = made.run()
    assert linear_norm.join(made.graph) == 1
    made.graph.lint()
    assert same_bits(made.run(), before)


def weightless() -> Layer:
    made = Layer()
    x = made.product(made.rows, made.matrix)
    made.graph.call_function(NORM, (x, made.residual, None, None))
    return made.made(x)


def test_no_weight_no_eps_and_no_spec_arguments_are_passed_on() -> None:
    made = weightless()
    before = made.run()
    assert linear_norm.join(made.graph) == 1
    assert made.joined()[0].args == (made.rows, made.matrix, made.residual, None, None)
    assert same_bits(made.run(), before)


def read_before_the_norm(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    other = made.call(aten.relu.default, x)
    made.norm(x, made.residual)
    return made.made(x, other)


def a_view_taken_before_the_norm(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    view = made.call(aten.view.default, x, [-1])
    made.norm(x, made.residual)
    return made.made(x, view)


def source_of_the_clone_read_before(made: Layer) -> Layer:
    source = made.product(made.rows, made.matrix)
    other = made.call(aten.relu.default, source)
    x = made.call(aten.clone.default, source)
    made.norm(x, made.residual)
    return made.made(x, other)


def source_of_the_clone_read_after(made: Layer) -> Layer:
    source = made.product(made.rows, made.matrix)
    x = made.call(aten.clone.default, source)
    made.norm(x, made.residual)
    return made.made(x, made.call(aten.relu.default, source))


def source_of_the_clone_is_a_result(made: Layer) -> Layer:
    source = made.product(made.rows, made.matrix)
    x = made.call(aten.clone.default, source)
    made.norm(x, made.residual)
    return made.made(x, source)


def clone_read_before_the_norm(made: Layer) -> Layer:
    x = made.call(aten.clone.default, made.product(made.rows, made.matrix))
    other = made.call(aten.relu.default, x)
    made.norm(x, made.residual)
    return made.made(x, other)


def computed_matrix(made: Layer) -> Layer:
    x = made.product(made.rows, made.call(aten.mul.Tensor, made.matrix, 2))
    made.norm(x, made.residual)
    return made.made(x)


def bias(made: Layer) -> Layer:
    transposed = made.call(aten.permute.default, made.matrix, [1, 0])
    x = made.call(aten.addmm.default, made.weight, made.rows, transposed)
    made.norm(x, made.residual)
    return made.made(x)


def transposed_on_the_left(made: Layer) -> Layer:
    columns, right = made.input("columns", K, M), made.input("right", K, N)
    x = made.call(aten.mm.default, made.call(aten.permute.default, columns, [1, 0]), right)
    made.norm(x, made.residual)
    return made.made(x)


def matrix_as_it_is(made: Layer) -> Layer:
    x = made.call(aten.mm.default, made.rows, made.input("right", K, N))
    made.norm(x, made.residual)
    return made.made(x)


def no_product(made: Layer) -> Layer:
    x = made.call(aten.clone.default, made.input("x", M, N))
    made.norm(x, made.residual)
    return made.made(x)


def rows_written_between(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    made.call(aten.add_.Tensor, made.rows, 1)
    made.norm(x, made.residual)
    return made.made(x)


def residual_written_between(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    made.call(aten.mul_.Tensor, made.residual, 2)
    made.norm(x, made.residual)
    return made.made(x)


def another_norm_between(made: Layer) -> Layer:
    """It writes the rows through a view that the pass does not follow."""
    other = made.input("other", M, K)
    view = made.call(aten.view.default, made.rows, [M, K])
    x = made.call(aten.clone.default, made.product(made.rows, made.matrix))
    made.graph.call_function(NORM, (view, other, None, 1e-5, *SPEC_ARGS))
    made.norm(x, made.residual)
    return made.made(x, view, other)


def plain_function_between(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    made.graph.call_function(torch.Tensor.zero_, (made.rows,))
    made.norm(x, made.residual)
    return made.made(x)


def spec_argument_by_name(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    norm = made.norm(x, made.residual)
    norm.args, norm.kwargs = norm.args[:4], {"sum": "fp32"}
    return made.made(x)


def residual_of_another_dtype(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    made.norm(x, made.input("wide", M, N, dtype=torch.float32))
    return made.made(x)


def residual_of_three_dimensions(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    made.norm(x, made.input("deep", 1, M, N))
    return made.made(x)


def rows_apart(made: Layer) -> Layer:
    wide = made.input("wide", M, 2 * K)
    x = made.product(made.call(aten.slice.Tensor, wide, 1, 0, K), made.matrix)
    made.norm(x, made.residual)
    return made.made(x)


def residual_rows_apart(made: Layer) -> Layer:
    x = made.product(made.rows, made.matrix)
    residual = made.call(aten.slice.Tensor, made.input("wide", M, 2 * N), 1, 0, N)
    made.norm(x, residual)
    return made.made(x, residual)


SEPARATE = [
    read_before_the_norm,
    a_view_taken_before_the_norm,
    source_of_the_clone_read_before,
    source_of_the_clone_read_after,
    source_of_the_clone_is_a_result,
    clone_read_before_the_norm,
    computed_matrix,
    bias,
    transposed_on_the_left,
    matrix_as_it_is,
    no_product,
    rows_written_between,
    residual_written_between,
    another_norm_between,
    plain_function_between,
    spec_argument_by_name,
    residual_of_another_dtype,
    residual_of_three_dimensions,
    rows_apart,
    residual_rows_apart,
]


@pytest.mark.parametrize("build", SEPARATE, ids=lambda build: build.__name__)
def test_not_joined(build: Callable[[Layer], Layer]) -> None:
    made = build(Layer())
    before = str(made.graph)
    assert linear_norm.join(made.graph) == 0
    assert str(made.graph) == before
    made.graph.lint()
