"""Which norms of a graph write quantised rows, and that no bit changes by it; needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantised_graphs import (
    BF16,
    FORMS,
    INDUCTOR,
    STORED,
    C,
    Made,
    N,
    block_op,
    call_as_they_are,
    int8_op,
    native,
    native_block,
    norm,
    same,
    static_op,
    token_op,
)

from rmsnorm_patch.numerics.quantisation import QuantSpec, rms_norm_quantised
from rmsnorm_patch.vllm_plugin.decision import SPECS
from rmsnorm_patch.vllm_plugin.passes import norm_quantised

QUANTISATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "static op": (lambda rows, scale: static_op(rows, scale), "fp8_static"),
    "token op": (lambda rows, scale: token_op(rows), "fp8_token"),
    "bounded op": (lambda rows, scale: token_op(rows, scale), "fp8_token"),
    "int8 op": (lambda rows, scale: int8_op(rows), "int8_token"),
    "block op": (lambda rows, scale: block_op(rows), "fp8_block"),
    "block op, columns": (lambda rows, scale: block_op(rows, "column_major"), "fp8_block"),
    "block op, TMA": (lambda rows, scale: block_op(rows, "tma_aligned", True), "fp8_block"),
    "static arithmetic": (lambda rows, scale: native(rows, scale)[:1], "fp8_static"),
    "token arithmetic": (lambda rows, scale: native(rows), "fp8_token"),
    "bounded arithmetic": (lambda rows, scale: native(rows, None, scale), "fp8_token"),
    "block arithmetic": (lambda rows, scale: native_block(rows), "fp8_block"),
    "block arithmetic, columns": (lambda rows, scale: native_block(rows, True), "fp8_block"),
}


EVERY_FORM = ("static op", "token arithmetic", "block op, columns")


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in QUANTISATIONS for form in (FORMS if name in EVERY_FORM else FORMS[:1])]
)
def test_no_bit_changes(name: str, form: str) -> None:
    """Of a norm whose result is stored first. The second norm's residual is the first one's sum."""
    quantisation, scheme = QUANTISATIONS[name]

    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, STORED, form)
        first = quantisation(rows.view(-1, N), scale)
        rows, total = norm(first[0].to(BF16) * 3, total, weight, STORED, form)
        return *first, *quantisation(rows, scale), total

    made = Made(forward, form)
    before = made.run()
    assert norm_quantised.fuse(made.graph) == 2
    assert same(made.run(), before)
    assert [(op["scheme"], op["value"], op["both"]) for op in made.quantised()] == [(scheme, "rounded", False)] * 2
    left = [target for target in made.targets() if target.startswith(("_C.", "rmsnorm_patch."))]
    assert all("quantised" in target for target in left), left
    assert not any("amax" in target or "empty" in target for target in made.targets())


@pytest.mark.parametrize("layout", ["row_major", "column_major", "tma_aligned"])
def test_scales_lie_as_the_product_expects_for_any_number_of_rows(layout: str) -> None:
    """As expressions of that number. Of two that are not seen to be equal the compiler would copy the scales."""

    def strides(made: Made) -> list[str]:
        output = next(node for node in made.graph.nodes if node.op == "output")
        return [str(stride) for stride in output.args[0][1].meta["val"].stride()]

    made = layer(lambda rows: block_op(rows, layout))
    before = strides(made)
    assert norm_quantised.fuse(made.graph) == 1
    assert strides(made) == before


Reader = Callable[[Any], Any]


def layer(read: Reader, provider: str = INDUCTOR, form: str = "in place", **more: Any) -> Made:
    """One fused norm whose rows `read` reads, and the sum."""

    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, provider, form)
        return *read(rows), total

    return Made(forward, form, **more)


@pytest.mark.parametrize("name", ["static arithmetic", "token arithmetic", "block arithmetic"])
def test_arithmetic_reads_the_fp32_value_where_the_compiler_would_have_fused(name: str) -> None:
    quantisation, scheme = QUANTISATIONS[name]

    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, INDUCTOR, "written")
        return *quantisation(rows, scale), total

    made = Made(forward)
    stored = made.run()
    assert norm_quantised.fuse(made.graph) == 1
    assert [op["value"] for op in made.quantised()] == ["fp32"]
    x, residual, weight, scale = made.copies()
    quant = QuantSpec(scheme, "fp32", "native")  # type: ignore[arg-type]
    given = scale if scheme == "fp8_static" else None
    rows, scales, _, total = rms_norm_quantised(x * 2, residual + 1, weight, SPECS[INDUCTOR], quant, 1e-5, given)
    found = made.run()
    assert same(found, [rows, total] if given is not None else [rows, scales, total])
    assert not same(found[:1], stored[:1])


@pytest.mark.parametrize("provider", [name for name in SPECS if name != INDUCTOR])
def test_any_other_numerics_are_quantised_as_they_are_stored(provider: str) -> None:
    made = layer(native, provider)
    assert norm_quantised.fuse(made.graph) == 1
    assert [op["value"] for op in made.quantised()] == ["rounded"]


@pytest.mark.parametrize("form", FORMS)
def test_readers_of_both_kinds_get_two_outputs(form: str) -> None:
    """A router and what quantises for the experts; so does the graph's own output."""
    made = layer(lambda rows: (*token_op(rows), torch.relu(rows)), STORED, form)
    before = made.run()
    assert norm_quantised.fuse(made.graph) == 1
    assert [op["both"] for op in made.quantised()] == [True]
    assert same(made.run(), before)


def test_arithmetic_that_shares_a_part_with_another_reader() -> None:
    made = layer(lambda rows: (*native(rows), rows.to(torch.float32) @ torch.ones(N, 2)), STORED)
    before = made.run()
    assert norm_quantised.fuse(made.graph) == 1
    assert [op["both"] for op in made.quantised()] == [True]
    assert same(made.run(), before)


def test_two_products_that_quantise_alike_read_the_same_rows() -> None:
    made = layer(lambda rows: (*int8_op(rows), *int8_op(rows)), STORED)
    before = made.run()
    assert norm_quantised.fuse(made.graph) == 1
    assert [op["both"] for op in made.quantised()] == [False]
    assert same(made.run(), before)
    assert not any("_C." in target for target in made.targets())


def _op(name: str, *rest: Any, dtype: torch.dtype = torch.float8_e4m3fn, scales: int = 1) -> Reader:
    """Rows and scales of an op that writes both."""

    def read(rows: torch.Tensor) -> Any:
        result, scale = torch.empty(rows.shape, dtype=dtype), torch.ones(scales)
        getattr(C, name)(result, rows, scale, *rest)
        return (result,)

    return read


def _groups(rows: torch.Tensor) -> Any:
    result, scale = torch.empty(rows.shape, dtype=torch.float8_e4m3fn), torch.empty(rows.shape[0], N // 64)
    C.per_token_group_fp8_quant(rows, result, scale, 64, 1e-10, -448.0, 448.0, False, False, False)
    return result, scale


def _whole(rows: torch.Tensor) -> Any:
    """One scale for all rows, in arithmetic."""
    scale = (rows.abs().max().unsqueeze(-1).to(torch.float32) / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return (rows.to(torch.float32) * scale.reciprocal()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


LEFT = {
    "one scale for all rows": (_op("dynamic_scaled_fp8_quant"), "_C.dynamic_scaled_fp8_quant: it has one scale"),
    "int8 with a given scale": (
        _op("static_scaled_int8_quant", None, dtype=torch.int8),
        "_C.static_scaled_int8_quant: no kernel of ours writes int8 rows with a given scale",
    ),
    "fp4": (_op("scaled_fp4_quant", dtype=torch.int8), "_C.scaled_fp4_quant: it is none that our kernels know"),
    "a given scale for each group": (_op("static_scaled_fp8_quant", scales=2), "it has a scale for each group, given"),
    "groups of 64": (_groups, "_C.per_token_group_fp8_quant: its groups have 64 columns, and ours 128"),
    "what was computed": (lambda rows: int8_op(rows * 2), "it reads what was computed of the rows"),
    "arithmetic, one scale": (_whole, "a quantisation in arithmetic: its arithmetic is none that our kernels have"),
    "arithmetic of another kind": (
        lambda rows: ((rows * 3).to(torch.float8_e4m3fn),),
        "a quantisation in arithmetic: its arithmetic is none that our kernels have",
    ),
    "arithmetic, more tensors": (
        lambda rows: native(rows * torch.sin(rows)),
        "a quantisation in arithmetic: it reads other tensors than the norm's rows and one scale",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_says_why(name: str, told: Callable[[], list[str]]) -> None:
    read, why = LEFT[name]
    made = layer(read)
    before = str(made.graph)
    assert norm_quantised.fuse(made.graph) == 0
    assert str(made.graph) == before
    (line,) = told()
    assert f"({N} columns) keeps plain rows for " in line
    assert why in line


def test_an_opaque_reader_gets_plain_rows(told: Callable[[], list[str]]) -> None:
    """W4A16, Marlin, an op that quantises inside: whatever the model's quantisation is called."""
    made = layer(lambda rows: (rows @ torch.ones(N, 8, dtype=BF16),))
    before = str(made.graph)
    assert norm_quantised.fuse(made.graph) == 0
    assert str(made.graph) == before
    assert told() == [
        f"rmsnorm_patch: a norm ({N} columns) writes plain rows, as aten.mm.default reads them; so do others like it"
    ]


def test_another_scale_for_the_same_rows_is_left(told: Callable[[], list[str]]) -> None:
    """The first product's becomes ours; the second reads the plain rows."""

    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, STORED, "written")
        return *static_op(rows, scale), *token_op(rows), total

    made = Made(forward)
    before = made.run()
    assert norm_quantised.fuse(made.graph) == 1
    assert same(made.run(), before)
    assert [op["both"] for op in made.quantised()] == [True]
    left, served = told()
    assert "_C.dynamic_per_token_scaled_fp8_quant: another quantisation reads the same rows" in left
    assert "writes fp8_static rows of its rounded value, in place of _C.static_scaled_fp8_quant, and plain" in served


def test_a_scale_that_is_computed_behind_the_norm(told: Callable[[], list[str]]) -> None:
    made = layer(lambda rows: static_op(rows, torch.sin(rows[0, :1].to(torch.float32))))
    assert norm_quantised.fuse(made.graph) == 0
    assert "_C.static_scaled_fp8_quant: its scale is computed behind the norm" in told()[0]


def test_a_residual_that_nobody_gave_up(told: Callable[[], list[str]]) -> None:
    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        rows, total = norm(x, residual, weight, INDUCTOR, "functional")
        return *token_op(rows), total

    assert norm_quantised.fuse(Made(forward).graph) == 0
    assert "nobody gave up the residual" in told()[0]


def test_a_view_that_was_taken_before_the_norm_wrote(told: Callable[[], list[str]]) -> None:
    made = layer(token_op)
    written = next(
        node for node in made.graph.nodes if node.target is torch.ops.rmsnorm_patch.fused_add_rms_norm_.default
    )
    x = written.args[0]
    with made.graph.inserting_before(written):
        view = made.graph.call_function(torch.ops.aten.view.default, (x, [-1]))
    output = next(node for node in made.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], view),)
    assert norm_quantised.fuse(made.graph) == 0
    assert "a view of the rows was taken before the norm wrote them" in told()[0]


@pytest.mark.parametrize("form", ["in place", "written", "functional"])
def test_rows_that_are_written_apart(form: str, told: Callable[[], list[str]]) -> None:
    """Who reads them plain knows their strides, which the op's results have not."""

    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        apart = torch.empty_strided(x.shape, (2 * N, 1), dtype=x.dtype).copy_(x)
        given = (residual + 1, apart) if form == "functional" else (apart, residual + 1)
        rows, total = norm(*given, weight, INDUCTOR, form)
        return *static_op(rows, scale), rows, total

    made = Made(forward, form)
    before = made.run()
    count = norm_quantised.fuse(made.graph)
    assert same(made.run(), before)
    assert count == 0
    assert "the rows are not contiguous" in told()[0]


@pytest.mark.parametrize("name", ["static op", "token op", "block op, columns", "int8 op"])
def test_a_quantisation_that_is_called_as_it_is(name: str) -> None:
    """Not as a functional call: it writes buffers that are read behind it."""
    quantisation, scheme = QUANTISATIONS[name]

    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, STORED, "in place")
        return *quantisation(rows, scale), total

    made = Made(forward, "in place")
    before = made.run()
    call_as_they_are(made)
    assert same(made.run(), before)
    assert norm_quantised.fuse(made.graph) == 1
    assert [op["scheme"] for op in made.quantised()] == [scheme]
    assert not any("_C." in target for target in made.targets())
    assert same(made.run(), before)


class Manager:
    """vLLM's manager of passes, as far as our hooks see it."""

    def __init__(self, quantised: bool = True) -> None:
        self.rmsnorm_patch_quantised = quantised

    def __call__(self, graph: Any) -> None:
        pass

    def uuid(self) -> str:
        return "manager"


def test_the_pass_runs_where_the_engine_may_quantise_rows_and_is_part_of_the_key() -> None:
    call, uuid = norm_quantised.PASS.wrap_call(Manager.__call__), norm_quantised.PASS.wrap_uuid(Manager.uuid)
    off, unknown = Manager(False), Manager()
    del unknown.rmsnorm_patch_quantised
    for manager, count in ((off, 0), (unknown, 0), (Manager(), 1)):
        made = layer(token_op)
        call(manager, made.graph)
        assert len(made.quantised()) == count
    assert uuid(off) == uuid(unknown) != uuid(Manager())


def test_a_failure_leaves_a_right_graph_and_one_warning(told: Callable[[], list[str]]) -> None:
    made = layer(token_op, STORED)
    before = made.run()
    tensors = (node for node in made.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor))
    weight = next(node for node in tensors if node.op == "placeholder" and list(node.meta["val"].shape) == [N])
    kept = weight.meta.pop("val")
    norm_quantised.PASS.wrap_call(Manager.__call__)(Manager(), made.graph)
    weight.meta["val"] = kept
    assert told() == ["rmsnorm_patch: not every norm writes quantised rows: KeyError: 'val'"]
    assert same(made.run(), before)
