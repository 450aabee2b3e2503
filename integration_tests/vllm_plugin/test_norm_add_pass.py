"""Which norms of a graph take the add behind them, and the norm of the sum, and that no bit changes by it; needs no
vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from norm_add_graphs import (
    ADD,
    ADD_NORM,
    FUSED,
    OFFSET,
    PLAIN,
    Forward,
    check,
    compiled,
    layers,
    made_of,
    ours,
    rms,
    same,
    sums,
)
from quantised_graphs import BF16, INDUCTOR, STORED, Made, N, norm

from rmsnorm_patch.numerics.spec import NormSpec
from rmsnorm_patch.vllm_plugin.decision import SPECS
from rmsnorm_patch.vllm_plugin.passes import norm_add


@pytest.mark.parametrize("provider", [INDUCTOR, STORED, "rmsnorm_patch_native"])
@pytest.mark.parametrize("form", FUSED)
def test_a_norm_in_front_of_a_fused_add(form: str, provider: str) -> None:
    """As in Gemma 2 and 3 and GLM 4; the second residual is the first one's sum."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        rows, total = norm(rms(x * 2, weight, SPECS[provider]), residual + 1, following, provider, form)
        rows, total = norm(rms(rows * 3, following, SPECS[provider]), total, weight, provider, form)
        return rows, total

    made = made_of(forward, form)
    check(made, ADD_NORM, ADD_NORM)
    assert sums(made) == [SPECS[provider].sum] * 2


@pytest.mark.parametrize("form", FUSED)
def test_the_norms_result_may_be_the_residual(form: str) -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        return norm(residual * 2, rms(x, weight), following, INDUCTOR, form)

    check(made_of(forward, form), ADD_NORM)


@pytest.mark.parametrize("form", FUSED)
def test_a_sum_or_a_norm_that_nobody_reads(form: str) -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        return (norm(rms(x, weight), residual + 1, following, INDUCTOR, form)[0],)

    check(made_of(forward, form), ADD_NORM)


def test_a_copy_that_vllm_makes_for_an_op_that_writes() -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        return norm(rms(x, weight), residual + 1, following, INDUCTOR, "in place")

    made = made_of(forward, "in place")
    (plain,) = (node for node in made.graph.nodes if str(node.target) == PLAIN)
    with made.graph.inserting_after(plain):
        copy = made.graph.call_function(torch.ops.aten.clone.default, (plain,))
    copy.meta["val"] = plain.meta["val"]
    plain.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    check(made, ADD_NORM)
    assert not any("clone" in target for target in made.targets())


@pytest.mark.parametrize("written", [False, True])
def test_a_copy_of_a_residual_that_is_read_again(written: bool) -> None:
    """The op writes nothing, and needs none; unless what was copied is written first."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        own = residual + 1
        return *norm(rms(x, weight), own, following, INDUCTOR, "in place"), own

    def copy(graph: Any) -> None:
        (plain,) = (node for node in graph.nodes if str(node.target) == PLAIN)
        (fused,) = (node for node in graph.nodes if "fused_add" in str(node.target))
        own = fused.args[1]
        with graph.inserting_before(plain):
            made = graph.call_function(torch.ops.aten.clone.default, (own,))
            made.meta["val"] = own.meta["val"]
            if written:
                graph.call_function(torch.ops.aten.mul_.Tensor, (own, 2))
        fused.replace_input_with(own, made)

    made = _in_place(forward, copy)
    check(made, ADD_NORM)
    assert [target for target in made.targets() if "clone" in target] == ["aten.clone.default"] * written


@pytest.mark.parametrize("spec", [SPECS[INDUCTOR], SPECS[STORED], OFFSET], ids=["fp32 sum", "rounded sum", "offset"])
def test_adds_of_the_graphs_own(spec: NormSpec) -> None:
    """As in OLMo 2 and EXAONE 4: products read the sums. The last one is read by the final norm."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, *_: Any) -> Any:
        total = residual + rms(x, weight, spec)
        total = rms(total @ matrix, following, spec) + total
        total = total + rms(total @ matrix, weight, spec)
        return rms(total, following, spec), total

    made = made_of(forward)
    check(made, ADD, ADD, ADD_NORM)
    assert sums(made) == ["rounded"]  # as the compiler stored it


def test_rows_of_three_dimensions() -> None:
    """As the models that vLLM takes from transformers have them."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, *_: Any) -> Any:
        total = residual.unsqueeze(0) + rms(x.unsqueeze(0), weight)
        return total.reshape(-1, N) @ matrix, rms(total, following)

    check(made_of(forward), ADD_NORM)


def test_one_of_several_norms_of_a_sum() -> None:
    """As in Gemma 4 with experts."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        total = rms(x, weight) + residual
        return rms(total, following), rms(total, weight), total

    check(made_of(forward), ADD_NORM, PLAIN)


LEFT: dict[str, tuple[Forward, str]] = {
    "a reader that the compiler fuses": (
        lambda x, residual, weight, following, matrix, number: ((residual + rms(x, weight)) * number,),
        "the compiler may compute aten.mul.Tensor in the add's kernel",
    ),
    "such a reader of a view": (
        lambda x, residual, weight, following, matrix, number: ((residual + rms(x, weight)).view(-1) * number,),
        "the compiler may compute aten.mul.Tensor in the add's kernel",
    ),
    "a residual that the compiler fuses": (
        lambda x, residual, weight, following, matrix, number: (residual * number + rms(x, weight),),
        "the compiler may compute the residual in the add's kernel",
    ),
    "a residual that is stored, and not in front of the norm": (
        lambda x, residual, weight, following, matrix, number: _beside(x, residual * number, weight, matrix),
        "the compiler may compute the residual in the add's kernel",
    ),
    "a residual that is made anew in the add's kernel": (
        lambda x, residual, weight, following, matrix, number: _made_anew(residual * number, weight),
        "the compiler may compute the residual in the add's kernel",
    ),
    "two dtypes": (
        lambda x, residual, weight, following, matrix, number: (residual.float() + rms(x, weight),),
        "the residual has another dtype or shape",
    ),
    "one row for all": (
        lambda x, residual, weight, following, matrix, number: (following + rms(x, weight),),
        "the residual has another dtype or shape",
    ),
    "other numerics": (
        lambda x, residual, weight, following, matrix, number: norm(
            rms(x, weight), residual + 1, following, STORED, "functional"
        ),
        "",
    ),
    "an offset of one weight": (
        lambda x, residual, weight, following, matrix, number: norm(
            rms(x, weight, OFFSET), residual + 1, following, INDUCTOR, "functional"
        ),
        "the norm of the sum has other numerics",
    ),
    "weights of two dtypes": (
        lambda x, residual, weight, following, matrix, number: norm(
            rms(x, weight.float()), residual + 1, following, INDUCTOR, "functional"
        ),
        "the norms' weights have two dtypes",
    ),
    "two readers of the norm": (
        lambda x, residual, weight, following, matrix, number: _twice(residual, rms(x, weight)),
        "",
    ),
    "two readers of the norm in front of a fused add": (
        lambda x, residual, weight, following, matrix, number: _fused_twice(rms(x, weight), residual, following),
        "",
    ),
    "a fused add of one norm twice": (
        lambda x, residual, weight, following, matrix, number: _fused_with_itself(rms(x, weight), following),
        "",
    ),
    "a multiple": (
        lambda x, residual, weight, following, matrix, number: (torch.add(residual, rms(x, weight), alpha=2),),
        "",
    ),
    "a number": (lambda x, residual, weight, following, matrix, number: (rms(x, weight) + 1,), ""),
    "twice the norm": (lambda x, residual, weight, following, matrix, number: _doubled(rms(x, weight)), ""),
}
"""What stays apart -> the reason that the log gives; "" where there is no add to be spoken of."""


def _beside(x: Any, residual: Any, weight: Any, matrix: Any) -> Any:
    product = residual @ matrix
    return residual + rms(x, weight), product


def _twice(residual: Any, normed: Any) -> Any:
    return residual + normed, normed


def _made_anew(residual: Any, weight: Any) -> Any:
    return (residual + rms(residual * 2, weight),)


def _fused_twice(normed: Any, residual: Any, weight: Any) -> Any:
    return *norm(normed, residual, weight, INDUCTOR, "functional"), normed


def _fused_with_itself(normed: Any, weight: Any) -> Any:
    return norm(normed, normed, weight, INDUCTOR, "functional")


def _doubled(normed: Any) -> Any:
    return (normed + normed,)


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_apart(name: str, told: Callable[[], list[str]]) -> None:
    forward, why = LEFT[name]
    made = made_of(forward)
    before = ours(made)
    if name == "other numerics":  # the norm in front reads no sum: its own says nothing
        check(made, ADD_NORM)
        assert sums(made) == ["rounded"]
        return
    check(made, *before)
    lines = [line for line in told() if "apart" in line]
    assert [why in line for line in lines] == ([True] if why else [])


def test_a_residual_that_is_stored_in_front_of_the_norm() -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, number: Any) -> Any:
        scaled = residual * number
        return (scaled + rms(scaled @ matrix, weight),)

    check(made_of(forward), ADD)


def test_products_that_the_compiler_tunes_may_take_in_the_add() -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, *_: Any) -> Any:
        return ((residual + rms(x, weight)) @ matrix,)

    with inductor.patch(max_autotune=True):
        check(made_of(forward), PLAIN)
    check(made_of(forward), ADD)


def test_a_norm_of_other_numerics_stays_behind_the_add() -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        return (rms(residual + rms(x, weight), following, OFFSET),)

    check(made_of(forward), ADD, PLAIN)


def test_a_weight_that_is_made_behind_the_add() -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, *_: Any) -> Any:
        total = residual + rms(x, weight)
        return (rms(total, (total @ matrix)[0]),)

    check(made_of(forward), ADD, PLAIN)


def test_a_sum_that_is_written_before_its_norm_reads_it() -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, *_: Any) -> Any:
        rows, total = norm(x @ matrix, residual + rms(x, weight), following, INDUCTOR, "in place")
        return rows, rms(total, following)

    check(made_of(forward, "in place"), ADD, "rmsnorm_patch.fused_add_rms_norm_.default", PLAIN)


def _in_place(forward: Forward, change: Callable[[Any], None]) -> Made:
    made = made_of(forward, "in place")
    change(made.graph)
    return made


def test_what_is_written_in_between_keeps_them_apart(told: Callable[[], list[str]]) -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        return norm(rms(x, weight), residual + 1, following, INDUCTOR, "in place")

    def write(graph: Any) -> None:
        (plain,) = (node for node in graph.nodes if str(node.target) == PLAIN)
        with graph.inserting_after(plain):
            graph.call_function(torch.ops.aten.mul_.Tensor, (plain.args[0], 2))

    made = _in_place(forward, write)
    check(made, PLAIN, "rmsnorm_patch.fused_add_rms_norm_.default")
    assert "something is written between the norm and the add" in told()[0]


@pytest.mark.parametrize("late", [True, False])
def test_a_view_of_the_residual_that_was_taken_before(late: bool, told: Callable[[], list[str]]) -> None:
    """Read behind the norm it holds the sum; in front of it, the residual."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, number: Any) -> Any:
        stored = residual @ matrix
        return *norm(rms(x, weight), stored, following, INDUCTOR, "in place"), stored.view(-1) * number

    def read(graph: Any) -> None:
        (view,) = (node for node in graph.nodes if "view" in str(node.target) or "reshape" in str(node.target))
        (fused,) = (node for node in graph.nodes if "fused_add" in str(node.target))
        (scaled,) = view.users
        for node in (scaled, view):
            fused.prepend(node) if not late or node is view else fused.append(node)
        if not late:
            fused.prepend(scaled)

    fused = "rmsnorm_patch.fused_add_rms_norm_.default"
    check(_in_place(forward, read), *((PLAIN, fused) if late else (ADD_NORM,)))
    assert ("a view of a term was taken before the sum was written" in told()[0]) == late


@pytest.mark.parametrize("form", ["in place", "written"])
def test_a_sum_that_is_written_to_rows_apart(form: str, told: Callable[[], list[str]]) -> None:
    """Its readers know their strides, which the op's results have not."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        apart = torch.empty_strided(residual.shape, (2 * N, 1), dtype=BF16).copy_(residual)
        return norm(rms(x, weight), apart, following, INDUCTOR, form)

    made = made_of(forward, form)
    check(made, *ours(made))
    assert PLAIN in ours(made)
    assert "the sum is written to rows that are not contiguous" in told()[0]


@pytest.mark.parametrize("its_own", [False, True])
def test_a_sum_that_is_the_weight_of_a_norm(its_own: bool) -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        total = rms(weight, following) + following
        return rms(total if its_own else x, total), total

    check(made_of(forward), ADD, PLAIN)


def test_an_op_that_writes_may_be_called_by_name() -> None:
    """As vLLM puts its own ops."""

    def forward(x: Any, residual: Any, weight: Any, following: Any, *_: Any) -> Any:
        return norm(rms(x, weight), residual + 1, following, INDUCTOR, "in place")

    made = made_of(forward, "in place")
    (fused,) = (node for node in made.graph.nodes if "fused_add" in str(node.target))
    names = [argument.name for argument in fused.target._schema.arguments]
    fused.args, fused.kwargs = (), dict(zip(names, fused.args, strict=True))
    check(made, ADD_NORM)


def test_the_log_says_what_was_done_once(told: Callable[[], list[str]]) -> None:
    def forward(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, *_: Any) -> Any:
        rows, total = norm(rms(x, weight), residual, following, INDUCTOR, "functional")
        rows, total = norm(rms(rows @ matrix, weight), total, following, INDUCTOR, "functional")
        return (total + rms(rows @ matrix, weight),)

    check(made_of(forward), ADD_NORM, ADD_NORM, ADD)
    found = "adds the residual and computes a norm", "adds the residual"
    assert told() == [
        f"rmsnorm_patch: a norm ({N} columns) {what} in its launch; so do others like it" for what in found
    ]


class Manager:
    """vLLM's manager of passes, as far as our hooks see it."""

    def __init__(self, norm_add: bool = True) -> None:
        self.rmsnorm_patch_norm_add = norm_add

    def __call__(self, graph: Any) -> None:
        pass

    def uuid(self) -> str:
        return "manager"


def _exaone(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, *_: Any) -> Any:
    return ((residual + rms(x, weight)) @ matrix,)


def test_the_pass_runs_where_it_is_asked_for_and_is_part_of_the_key() -> None:
    call, uuid = norm_add.PASS.wrap_call(Manager.__call__), norm_add.PASS.wrap_uuid(Manager.uuid)
    off, unknown = Manager(False), Manager()
    del unknown.rmsnorm_patch_norm_add
    for manager, found in ((off, PLAIN), (unknown, PLAIN), (Manager(), ADD)):
        made = made_of(_exaone)
        call(manager, made.graph)
        assert ours(made) == [found]
    assert uuid(off) == uuid(unknown) != uuid(Manager())


def test_a_failure_leaves_a_right_graph_and_one_warning(told: Callable[[], list[str]]) -> None:
    made = made_of(_exaone)
    before = made.run()
    (add,) = (node for node in made.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    kept = add.meta.pop("val")
    norm_add.PASS.wrap_call(Manager.__call__)(Manager(), made.graph)
    add.meta["val"] = kept
    assert told() == ["rmsnorm_patch: not every norm takes the add behind it: KeyError: 'val'"]
    assert same(made.run(), before)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_cpp")
def test_no_bit_of_the_compilers_code_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it would if the adds that the compiler fuses were taken."""
    inputs = made_of(_exaone).inputs
    want, before = compiled(layers, False, inputs)
    got, after = compiled(layers, True, inputs)
    assert [op for op in before if "add" in op] == ["rmsnorm_patch.fused_add_rms_norm.default"]
    assert [op for op in after if "_add" in op] == [ADD, ADD_NORM]
    assert same(got, want)
    monkeypatch.setattr(norm_add, "_left_to_the_compiler", lambda *_: "")
    taken, every = compiled(layers, True, inputs)
    assert [op for op in every if "_add" in op] == [ADD, ADD, ADD_NORM, ADD_NORM]
    assert not same(taken, want)
