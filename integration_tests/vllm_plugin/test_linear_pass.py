"""Which products of a lowered graph are joined with their norms, on graphs made by hand; needs no vLLM."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import config as inductor

from rmsnorm_patch import ops
from rmsnorm_patch.fused.linear_norm import op as linear_norm_op
from rmsnorm_patch.fused.linear_norm import splits as linear_norm_splits
from rmsnorm_patch.numerics.spec import GEMMA
from rmsnorm_patch.vllm_plugin import linear_pass, log
from rmsnorm_patch.vllm_plugin.decision import SPECS, Decision

aten = torch.ops.aten
NORM = torch.ops.rmsnorm_patch.fused_add_rms_norm_.default
JOINED = torch.ops.rmsnorm_patch.linear_fused_add_rms_norm_.default
BF16 = torch.bfloat16
SPEC_ARGS = ops.spec_args(SPECS["rmsnorm_patch"])[:4]
M, N, K = 5, 64, 96


class Layer:
    """A graph as vLLM's manager leaves it, each node with its value's shape. tensors: what it can be called with."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tensors: list[torch.Tensor] = []
        self.rows, self.matrix = self.input("rows", M, K), self.input("matrix", N, K)
        self.residual, self.weight = self.input("residual", M, N), self.input("weight", N)

    def input(self, name: str, *shape: int, dtype: torch.dtype = BF16) -> fx.Node:
        generator = torch.Generator().manual_seed(len(self.tensors))
        self.tensors.append(torch.randn(shape, generator=generator).to(dtype))
        node = self.graph.placeholder(name)
        node.meta["val"] = self.tensors[-1].to("meta")
        return node

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
        return node

    def product(self, rows: fx.Node, matrix: fx.Node) -> fx.Node:
        return self.call(aten.mm.default, rows, self.call(aten.permute.default, matrix, [1, 0]))

    def norm(self, x: fx.Node, residual: fx.Node, eps: float = 1e-5) -> fx.Node:
        return self.graph.call_function(NORM, (x, residual, self.weight, eps, *SPEC_ARGS))

    def made(self, *results: fx.Node) -> Layer:
        self.graph.output(results)
        self.graph.lint()
        return self

    def targets(self) -> list[Any]:
        return [node.target for node in self.graph.nodes if node.op == "call_function"]

    def joined(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.target is JOINED]

    def run(self) -> tuple[torch.Tensor, ...]:
        """The results, and what became of the inputs."""
        tensors = [tensor.clone() for tensor in self.tensors]
        return (*fx.GraphModule(torch.nn.Module(), self.graph)(*tensors), *tensors)


def layer(with_clone: bool) -> Layer:
    """A norm behind its product; its result goes to the next product and out."""
    made = Layer()
    following = made.input("following", 32, N)
    x = made.product(made.rows, made.matrix)
    if with_clone:
        x = made.call(aten.clone.default, x)
    made.norm(x, made.residual)
    return made.made(made.product(x, following), x, made.residual)


def same_bits(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(left, right, strict=True))


@pytest.mark.parametrize("with_clone", [False, True])
def test_a_product_and_its_norm_become_one_op(with_clone: bool) -> None:
    made = layer(with_clone)
    before = made.run()
    assert linear_pass.join(made.graph) == 1
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
    assert linear_pass.join(made.graph) == 2
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
    assert linear_pass.join(made.graph) == 1
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
    assert linear_pass.join(made.graph) == 1
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
    assert linear_pass.join(made.graph) == 0


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
    assert linear_pass.join(made.graph) == 1
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
    assert linear_pass.join(made.graph) == 1
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
    assert linear_pass.join(made.graph) == 0
    assert str(made.graph) == before
    made.graph.lint()


class Manager:
    """vLLM's manager of passes, as far as our hooks see it: the norms are in the graph once it was called."""

    def __init__(self, linear: bool = True, splits: str = "") -> None:
        self.rmsnorm_patch_linear = linear
        self.rmsnorm_patch_splits = splits
        self.found: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.found.append(str(graph))

    def uuid(self) -> str:
        return "manager"


call = linear_pass.wrap_call(Manager.__call__)


def test_the_pass_joins_after_the_manager() -> None:
    made, manager = layer(with_clone=True), Manager()
    before = str(made.graph)
    call(manager, made.graph)
    assert manager.found == [before]
    assert len(made.joined()) == 1


def test_the_pass_does_not_join_where_that_is_off() -> None:
    made, manager = layer(with_clone=True), Manager(linear=False)
    call(manager, made.graph)
    assert len(manager.found) == 1
    assert not made.joined()


def test_a_pass_that_was_made_before_the_hooks_joins_nothing() -> None:
    made, manager = layer(with_clone=True), Manager()
    del manager.rmsnorm_patch_linear, manager.rmsnorm_patch_splits
    call(manager, made.graph)
    assert not made.joined()
    assert linear_pass.wrap_uuid(Manager.uuid)(manager).startswith("manager")


@pytest.mark.parametrize("option", ["max_autotune", "max_autotune_gemm"])
def test_the_pass_leaves_products_that_the_compiler_tunes(option: str) -> None:
    made = layer(with_clone=True)
    with inductor.patch(**{option: True}):
        call(Manager(), made.graph)
    assert not made.joined()
    call(Manager(), made.graph)
    assert len(made.joined()) == 1


def test_a_failure_leaves_a_right_graph_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The second product's matrix does not tell its shape; the first one was joined before."""
    made = Layer()
    square = made.input("square", N, N)
    x = made.product(made.rows, made.matrix)
    made.norm(x, made.residual)
    second = made.product(x, square)
    made.norm(second, made.residual)
    made.made(second)
    del square.meta["val"]
    before, manager = made.run(), Manager()
    log.warn_once.cache_clear()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, logger=log.logger.name):
        for _ in range(2):
            call(manager, made.graph)
    assert [record.getMessage() for record in caplog.records] == [
        "rmsnorm_patch: not every product is joined with its norm: KeyError: 'val'"
    ]
    made.graph.lint()
    assert len(made.joined()) == 1
    assert NORM in made.targets()
    assert same_bits(made.run(), before)


def test_the_pass_has_another_cache_key_where_it_joins() -> None:
    uuid = linear_pass.wrap_uuid(Manager.uuid)
    on, off = uuid(Manager(linear=True)), uuid(Manager(linear=False))
    others = [uuid(Manager(splits=splits)) for splits in ("ahead 1 8", "ahead 1 8 reorder")]
    assert len({on, off, *others}) == 4
    assert all(key.startswith("manager") for key in (on, off, *others))


def test_each_engines_settings_reach_its_ops() -> None:
    """Two engines of one process: their graphs name their own settings, whichever of the arguments before are there."""
    for splits in ("ahead 1 8", "reorder", ""):
        made = layer(with_clone=True)
        call(Manager(splits=splits), made.graph)
        (joined,) = made.joined()
        named = joined.args[13:]
        assert named == ((splits,) if splits else ())
        assert linear_norm_op._bound(True, *joined.args[5:])[-1] is linear_norm_splits.finder_of(splits)


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
    assert linear_pass.join(made.graph, "ahead 1 8") == 2
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
    assert linear_pass.join(made.graph) == joined
    made.graph.lint()
    assert same_bits(made.run(), before)


@pytest.mark.parametrize(("form", "joined"), [("written", 1), ("plain", 0)])
def test_a_residual_that_is_the_graphs_input(form: str, joined: int) -> None:
    made = Layer()
    made.made(*functional(made, made.product(made.rows, made.matrix), made.residual, form))
    assert linear_pass.join(made.graph) == joined


def test_a_functional_norm_whose_results_go_on_as_a_pair_is_left() -> None:
    made = Layer()
    residual = made.call(aten.relu.default, made.residual)
    norm = made.call(PLAIN, made.product(made.rows, made.matrix), residual, made.weight, 1e-5)
    made.made(norm)
    assert linear_pass.join(made.graph) == 0


def test_what_an_engine_looks_at_ahead() -> None:
    linear = Decision("ir", "rmsnorm_patch", "", linear=True)
    for sizes, decision, settings in (
        ([8, 1, 512], linear, "ahead 1 8"),
        (None, linear, "ahead"),
        ([8, 1], replace(linear, reorder=True), "ahead 1 8 reorder"),
        ([8, 1], replace(linear, linear=False), ""),
    ):
        config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes))
        assert linear_pass.splits_of(config, decision) == settings
