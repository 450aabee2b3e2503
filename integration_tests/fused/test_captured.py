"""Which norms of a compiled graph take over the product in front: graphs traced from small functions, run on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import config as inductor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from rmsnorm_patch import ops
from rmsnorm_patch.fused.linear_norm import captured, kernel
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, NormSpec

JOINABLE: Any = torch.ops.rmsnorm_patch.joinable_rms_norm.default
JOINED: Any = torch.ops.rmsnorm_patch.linear_fused_add_rms_norm_.default
N, K = 64, 96
EPS = 1e-5
Step = Callable[..., Any]


def norm(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec = LLAMA) -> torch.Tensor:
    return JOINABLE(x, weight, EPS, *ops.spec_args(spec))


def operands(*batch: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """rows, matrix, residual, weight of a layer; rows and residual with these leading dimensions."""
    generator = torch.Generator().manual_seed(0)
    shapes = (*batch, K), (N, K), (*batch, N), (N,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def traced(step: Step, given: list[torch.Tensor], tracing: str = "fake") -> torch.fx.GraphModule:
    """The graph as Inductor's passes see it."""
    with torch.no_grad():
        return make_fx(step, select_decomp_table(), tracing_mode=tracing)(*given)


def settled(
    step: Step, given: list[torch.Tensor], is_captured: bool = True
) -> tuple[torch.fx.GraphModule, captured.Outcome]:
    """The graph after the pass, which must compute what it did, bit for bit."""
    graph = traced(step, given)
    want = step(*(tensor.clone() for tensor in given))
    outcome = captured.settle(graph.graph, is_captured)
    graph.graph.lint()
    graph.recompile()
    assert not [node for node in graph.graph.nodes if node.target is JOINABLE]
    assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
    got = graph(*(tensor.clone() for tensor in given))
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    assert all(torch.equal(mine, other) and mine.stride() == other.stride() for mine, other in pairs)
    return graph, outcome


def calls(graph: torch.fx.GraphModule) -> list[Any]:
    return [node for node in graph.graph.nodes if node.target is auto_functionalized and node.args == (JOINED,)]


def layer(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    """(norm, sum) of a residual that the graph made itself."""
    total = residual * 2 + F.linear(rows, matrix)
    return norm(total, weight), total


@pytest.mark.parametrize("batch", [(5,), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("spec", [LLAMA, GEMMA, NormSpec(has_weight=False)], ids=["llama", "gemma", "no weight"])
def test_a_norm_takes_over_its_product(batch: tuple[int, ...], spec: NormSpec) -> None:
    def step(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
        total = residual * 2 + F.linear(rows, matrix)
        return norm(total, weight if spec.has_weight else None, spec), total

    assert settled(step, operands(*batch), is_captured=False)[1].joined == 0
    graph, outcome = settled(step, operands(*batch))
    assert (outcome.joined, dict(outcome.left)) == (1, {})
    (joined,) = calls(graph)
    assert joined.kwargs["eps"] == EPS
    assert joined.kwargs["splits"] == ""


def test_the_product_on_either_side_of_the_add() -> None:
    def step(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
        return norm(F.linear(rows, matrix) + residual * 2, weight)

    assert settled(step, operands(2, 1))[1].joined == 1


def test_layers_in_a_row_give_the_sum_on() -> None:
    """The second residual is the first sum: written in place, it is read by nobody else."""

    def step(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
        normed, total = layer(rows, matrix, residual, weight)
        again = total + F.linear(F.pad(normed, (0, K - N)), matrix)
        return norm(again, weight)

    graph, outcome = settled(step, operands(2, 2))
    assert outcome.joined == 2
    assert len(calls(graph)) == 2


def test_results_share_no_memory_with_what_the_op_reads() -> None:
    """Else Inductor would take a later reader of the sum for one of the residual, and copy it."""
    graph, _ = settled(layer, operands(2, 3))
    (joined,) = calls(graph)
    results = [user.meta["val"].untyped_storage()._cdata for user in joined.users]
    residual = joined.kwargs["residual"].meta["val"].untyped_storage()._cdata
    assert len({*results, residual}) == 3


@pytest.mark.parametrize(("m", "joined"), [(3, 1), (kernel.MOST_ROWS + 1, 0)])
def test_a_number_of_rows_that_is_left_open(m: int, joined: int) -> None:
    """The number of rows that the graph was traced with decides."""
    real = operands(2, m)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows_open = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    sizes = [rows_open, None, rows_open, None]
    fakes = [
        mode.from_tensor(
            tensor,
            symbolic_context=None if each is None else StatelessSymbolicContext(each),
            static_shapes=each is None,
        )
        for tensor, each in zip(real, sizes, strict=True)
    ]
    with torch.no_grad(), mode:
        graph = make_fx(same_rows, select_decomp_table())(*fakes)
    assert captured.settle(graph.graph, captured=True).joined == joined
    graph.graph.lint()
    graph.recompile()
    other = operands(2, 7)
    assert torch.equal(graph(*other), same_rows(*other))


def same_rows(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    torch._check(rows.shape[1] == residual.shape[1])
    return layer(rows, matrix, residual, weight)[0]


def test_a_matrix_whose_sizes_are_left_open() -> None:
    graph = traced(layer, operands(2, 3), "symbolic")
    why = "the sizes of the product's matrix are left open"
    assert dict(captured.settle(graph.graph, captured=True).left) == {why: 1}


def no_add(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm(F.linear(rows, matrix), weight)


def scaled(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm(residual * 2 + F.linear(rows, matrix) * 0.5, weight)


def scaled_by_the_add(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm(torch.add(residual * 2, F.linear(rows, matrix), alpha=3), weight)


def product_read_by_others(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    x = F.linear(rows, matrix)
    return norm(residual * 2 + x, weight), x.relu()


def product_with_itself(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    x = F.linear(rows, matrix)
    return norm(x + x, weight)


def bias(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm(residual * 2 + F.linear(rows, matrix, weight), weight)


def computed_matrix(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm(residual * 2 + F.linear(rows, matrix * 2), weight)


def residual_of_the_caller(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm(residual + F.linear(rows, matrix), weight)


def residual_read_later(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    own = residual * 2
    return norm(own + F.linear(rows, matrix), weight) + own


def residual_returned(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    own = residual * 2
    return norm(own + F.linear(rows, matrix), weight), own


def view_of_the_residual_read_later(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    own = residual * 2
    view = own.view(-1)
    return norm(own + F.linear(rows, matrix), weight), view.relu()


def one_row_for_all(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm(residual * 2 + F.linear(rows[:1], matrix), weight)


def other_shape(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    return norm((residual * 2)[:1] + F.linear(rows, matrix), weight)


def heads(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    """Rows of another length than the product's."""
    x = F.linear(rows, matrix)
    return norm(x.view(*x.shape[:-1], 2, N // 2) + (residual * 2).view(*x.shape[:-1], 2, N // 2), weight[: N // 2])


def weight_computed_later(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
    total = residual * 2 + F.linear(rows, matrix)
    return norm(total, weight * 2)


APART = {
    no_add: "no add stands in front",
    scaled_by_the_add: "no add stands in front",
    scaled: "no operand of the add is a product that nothing else reads",
    product_read_by_others: "no operand of the add is a product that nothing else reads",
    product_with_itself: "no operand of the add is a product that nothing else reads",
    bias: "no operand of the add is a product that nothing else reads",
    heads: "no operand of the add is a product that nothing else reads",
    computed_matrix: "the product's matrix is no weight of the model's as it is stored",
    residual_of_the_caller: "the residual is read later, or is the graph's own input",
    residual_read_later: "the residual is read later, or is the graph's own input",
    residual_returned: "the residual is read later, or is the graph's own input",
    view_of_the_residual_read_later: "the residual is read later, or is the graph's own input",
    one_row_for_all: "product, residual and norm are not contiguous rows of one 16-bit dtype",
    other_shape: "product, residual and norm are not contiguous rows of one 16-bit dtype",
    weight_computed_later: "the norm's weight is computed behind the add",
}


@pytest.mark.parametrize("step", APART, ids=lambda step: step.__name__)
def test_arithmetic_again(step: Step) -> None:
    graph, outcome = settled(step, operands(2, 3))
    assert (outcome.joined, dict(outcome.left)) == (0, {APART[step]: 1})
    assert not calls(graph)
    assert [node for node in graph.graph.nodes if node.target is torch.ops.aten.rsqrt.default]


def test_one_row_of_two_dimensions_for_all() -> None:
    graph, outcome = settled(one_row_for_all, operands(3))
    assert (outcome.joined, dict(outcome.left)) == (0, {APART[one_row_for_all]: 1})
    assert not calls(graph)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (operands(3, dtype=torch.float32), "product, residual and norm are not contiguous rows of one 16-bit dtype"),
        (operands(kernel.MOST_ROWS + 1), f"more than {kernel.MOST_ROWS} rows"),
    ],
    ids=["fp32", "many rows"],
)
def test_operands_that_the_kernel_does_not_take(given: list[torch.Tensor], why: str) -> None:
    assert dict(settled(layer, given)[1].left) == {why: 1}


def test_the_most_rows_that_the_kernel_takes() -> None:
    assert settled(layer, operands(kernel.MOST_ROWS))[1].joined == 1


def test_a_graph_that_is_not_captured_keeps_its_arithmetic() -> None:
    assert dict(settled(layer, operands(3), is_captured=False)[1].left) == {"the graph is not captured": 1}


@pytest.mark.parametrize("option", ["max_autotune", "max_autotune_gemm"])
def test_products_that_the_compiler_tunes_are_left_to_it(option: str) -> None:
    with inductor.patch(**{option: True}):
        outcome = settled(layer, operands(3))[1]
    assert dict(outcome.left) == {"Inductor chooses kernels for products itself (max_autotune)": 1}


def test_arithmetic_is_that_of_the_model_itself() -> None:
    """Node for node what a graph has where the norm was never an op."""

    def own(rows: Any, matrix: Any, residual: Any, weight: Any) -> Any:
        total = residual * 2 + F.linear(rows, matrix)
        wide = total.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * wide.to(total.dtype), total

    given = operands(2, 3)
    mine, theirs = settled(layer, given, is_captured=False)[0], traced(own, given)
    targets = [
        [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in (mine, theirs)
    ]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_op_itself_is_the_norm(transposed: bool) -> None:
    """As no pass has seen it; with the strides that elementwise arithmetic gives."""
    x, weight = torch.randn(3, 5, N).to(torch.bfloat16), torch.randn(N).to(torch.bfloat16)
    x = x.transpose(0, 1) if transposed else x
    got = norm(x, weight)
    assert torch.equal(got, ops.bind_rms_norm(LLAMA)(x, weight, EPS))
    assert got.stride() == torch.empty_like(x).stride()
    torch.library.opcheck(JOINABLE, (x, weight, EPS, *ops.spec_args(LLAMA)))


def test_who_asked_is_told() -> None:
    told: list[captured.Outcome] = []
    captured.on_settled.append(told.append)
    try:
        settled(layer, operands(3))
        settled(no_add, operands(3))
        captured.settle(torch.fx.Graph(), captured=True)
    finally:
        captured.on_settled.clear()
    assert [str(outcome) for outcome in told] == [
        "1 norms take over the product in front",
        "0 norms take over the product in front; 1 not: no add stands in front",
    ]


def test_who_is_told_of_a_graph_may_leave_while_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def leaves(_: captured.Outcome) -> None:
        told.append("leaves")
        captured.on_settled.remove(leaves)

    monkeypatch.setattr(captured, "on_settled", [leaves, lambda _: told.append("stays")])
    settled(no_add, operands(3))
    assert told == ["leaves", "stays"]
