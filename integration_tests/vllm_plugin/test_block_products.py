"""Norms in front of the product of FP8 blocks that quantises for itself: which graphs change, and that no bit does.

The libraries are plain PyTorch here. In front of them stands an op as vLLM's, and where vLLM is installed its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import block_libraries
import pytest
import torch
from block_libraries import CALLS, weights
from quantised_graphs import BF16, FORMS, INDUCTOR, Made, N, norm
from torch._inductor import config as inductor
from torch._inductor import metrics

from rmsnorm_patch.vllm_plugin import ir_route, log, trial
from rmsnorm_patch.vllm_plugin.passes import block_products, block_rows, norm_quantised


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    library, module = block_libraries.without_vllm()
    monkeypatch.setattr(block_products, "_libraries", lambda: module)
    CALLS.clear()
    yield module
    del library


def theirs(rows: Any, weight: Any, scales: Any, power_of_two: bool = True, group: int = 128) -> Any:
    return getattr(torch.ops.vllm, block_rows.NAME)(rows, weight, scales, group, power_of_two)


def same(left: Any, right: Any) -> bool:
    return all(
        one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(left, right, strict=True)
    )


def layer(read: Callable[..., Any], form: str = "written", m: int = 5, k: int = N) -> Made:
    """One fused norm whose rows `read(rows, weight, scales)` reads, and the sum."""

    def forward(x: Any, residual: Any, weight: Any, matrix: Any, scales: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, INDUCTOR, form)
        return *read(rows, matrix, scales), total

    return Made(forward, form, m, weights(k=k))


@pytest.mark.parametrize(
    ("form", "m", "power_of_two"),
    [
        *[(FORMS[0], m, power_of_two) for m in (5, 31, 32, 45) for power_of_two in (False, True)],
        *[(form, m, True) for form in FORMS[1:] for m in (5, 32)],
    ],
)
def test_no_bit_changes(form: str, m: int, power_of_two: bool) -> None:
    """The number of rows chooses the library and, with it, the arithmetic. The second norm has two products."""

    def forward(x: Any, residual: Any, weight: Any, matrix: Any, scales: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, INDUCTOR, form)
        out = theirs(rows.view(-1, N), matrix, scales, power_of_two)
        rows, total = norm(out[:, :N] * 3, total, weight, INDUCTOR, form)
        return theirs(rows, matrix, scales, power_of_two), theirs(rows, matrix, scales * 2, power_of_two), total

    made = Made(forward, form, m, weights())
    before = made.run()
    expected = "flashinfer" if m < 32 else "deepgemm"
    assert {name for name, _ in CALLS} == {expected}
    CALLS.clear()
    assert block_products.fuse(made.graph) == 2
    assert same(made.run(), before)
    assert [(expected, True)] * 3 == CALLS
    written = [(op["arithmetic"], op["value"], op["layout"], op["power_of_two"], op["both"]) for op in made.quantised()]
    assert written == [("by_rows", "rounded", "tma_aligned", power_of_two, False)] * 2
    assert not any("vllm." in target or "block_rows" in target for target in made.targets())
    assert norm_quantised.fuse(made.graph) == 0


@pytest.mark.usefixtures("compiled_cpp")
@pytest.mark.parametrize("m", [5, 45])
def test_the_compilers_code_copies_no_argument(m: int) -> None:
    """It lays arguments out as a node says that they were in the model: those of the parted product are others."""

    def forward(x: Any, residual: Any, weight: Any, matrix: Any, scales: Any) -> Any:
        rows, total = norm(x * 2, residual + 1, weight, INDUCTOR, "functional")
        out = theirs(rows, matrix, scales)
        rows, total = norm(out[:, :N] * 3, total, weight, INDUCTOR, "functional")
        return theirs(rows, matrix, scales * 2), total

    inputs = layer(lambda rows, matrix, scales: (rows,), m=m)

    def compiled(change: Callable[[Any], Any]) -> tuple[Any, int]:
        torch._dynamo.reset()
        metrics.reset()
        with inductor.patch(post_grad_custom_post_pass=change, force_disable_caches=True), torch.no_grad():
            found = torch.compile(forward, fullgraph=True, dynamic=True)(*inputs.copies())
        return found, metrics.generated_kernel_count

    before = compiled(lambda graph: None)
    CALLS.clear()
    after = compiled(block_products.fuse)
    assert [given for _, given in CALLS] == [True, True]
    assert same(after[0], before[0])
    assert after[1] == before[1], "the compiler writes more"


def test_a_second_reader_gets_plain_rows_beside_them() -> None:
    made = layer(lambda rows, matrix, scales: (theirs(rows, matrix, scales), torch.relu(rows)))
    before = made.run()
    assert block_products.fuse(made.graph) == 1
    assert [op["both"] for op in made.quantised()] == [True]
    assert same(made.run(), before)


def test_a_product_that_rounds_its_scales_otherwise_stays_what_it_was() -> None:
    """From 32 rows on the two read unlike scales."""
    made = layer(
        lambda rows, matrix, scales: (theirs(rows, matrix, scales, True), theirs(rows, matrix, scales, False)), m=40
    )
    before = made.run()
    CALLS.clear()
    assert block_products.fuse(made.graph) == 1
    assert [(op["power_of_two"], op["both"]) for op in made.quantised()] == [(True, True)]
    assert same(made.run(), before)
    assert len(CALLS) == 2
    assert sum(block_rows.NAME in target for target in made.targets()) == 1


def test_a_line_for_each_site(told: Callable[[], list[str]]) -> None:
    made = layer(lambda rows, matrix, scales: (theirs(rows, matrix, scales),))
    assert block_products.fuse(made.graph) == 1
    (line,) = told()
    assert f"({N} columns) writes fp8_block rows of its rounded value, in place of vllm.{block_rows.NAME}" in line


@pytest.mark.parametrize("route_op", ["rms_norm", "fused_add_rms_norm"])
def test_where_products_have_to_be_parted_a_norm_that_fails_its_trial_is_vllms(
    route_op: str, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere it is ours, with plain rows. The product's trial counts, and the norm's."""
    monkeypatch.setattr(block_products, "_power_of_two", lambda: True)
    x, weight = torch.empty(5, N, dtype=BF16), torch.empty(N, dtype=BF16)
    make = {"rms_norm": ir_route._rms_norm_serves, "fused_add_rms_norm": ir_route._fused_add_serves}[route_op]
    arguments = (x, weight, 1e-5) if route_op == "rms_norm" else (x, x, weight, 1e-5)

    def serves() -> tuple[bool, bool]:
        with block_products.needed():
            found = make(INDUCTOR)(*arguments)
        return found, make(INDUCTOR)(*arguments)

    assert serves() == (True, True)
    assert told() == []
    for name in ("_declined", "trial.declined_quantised"):
        log.warn_once.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"{block_products.__name__}.{name}", lambda *arguments, **named: "it does not run here")
            assert serves() == (False, True)
        said = f"norms of {N} columns stay vLLM's: they would write plain rows for products of FP8 blocks"
        assert said in told()[-1]
        assert "(it does not run here); RMSNORM_PATCH_VLLM=ir serves them all the same" in told()[-1]
    assert serves() == (True, True)


def test_a_library_that_cannot_be_asked_costs_a_warning_and_not_the_engine(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> bool:
        raise ImportError("it has moved")

    monkeypatch.setattr(block_products, "_power_of_two", gone)
    with block_products.needed():
        assert not ir_route._rms_norm_serves(INDUCTOR)(torch.empty(5, N, dtype=BF16), None, 1e-5)
    assert "(ImportError: it has moved)" in told()[0]


def test_vllms_own_passes_run_under_the_need_of_their_engine() -> None:
    """The choice of providers is one of them. Whatever ends it, no other engine has it."""
    seen = []

    def original(manager: Any, graph: Any) -> None:
        seen.append(block_products.is_needed())
        if graph is None:
            raise RuntimeError("it ended")

    call = block_products.NEEDED.wrap_call(original)
    needing, other = SimpleNamespace(rmsnorm_patch_needs_blocks=True), SimpleNamespace()
    for manager in (needing, other):
        call(manager, "a graph")
        with pytest.raises(RuntimeError, match="it ended"):
            call(manager, None)
    assert seen == [True, True, False, False]
    assert not block_products.is_needed()


def test_lengths_of_no_whole_groups_stay(told: Callable[[], list[str]]) -> None:
    assert "no whole groups of 128 columns" in block_products._declined(320, 128, True, torch.device("cpu"))
    assert "of 320 columns quantises its rows itself" in told()[0]


def test_a_product_of_other_rows_stays_what_it_was() -> None:
    """Behind attention and behind an activation no norm writes the rows."""
    made = layer(lambda rows, matrix, scales: (theirs(torch.relu(rows), matrix, scales),))
    before = str(made.graph)
    assert block_products.fuse(made.graph) == 0
    assert str(made.graph) == before


def test_groups_of_another_size_stay(told: Callable[[], list[str]]) -> None:
    made = layer(lambda rows, matrix, scales: (theirs(rows, matrix, scales),))
    node = next(node for node in made.graph.nodes if block_rows.NAME in str(node.target))
    node.args = (*node.args[:3], 64, node.args[4])
    before = str(made.graph)
    assert block_products.fuse(made.graph) == 0
    assert str(made.graph) == before
    assert "quantises its rows itself: its groups have 64 columns, and ours 128" in told()[0]


def test_a_norm_whose_kernel_fails_its_trial_leaves_the_product(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "declined_quantised", lambda *arguments: "its kernel does not run here")
    made = layer(lambda rows, matrix, scales: (theirs(rows, matrix, scales), theirs(rows, matrix, scales)))

    def laid_out() -> list[Any]:
        return [node.meta["eager_input_vals"] for node in made.graph.nodes if block_rows.NAME in str(node.target)]

    before, known = made.run(), laid_out()
    assert block_products.fuse(made.graph) == 0
    assert all(found is one for found, one in zip(laid_out(), known, strict=True))
    CALLS.clear()
    assert same(made.run(), before)
    assert CALLS == [("flashinfer", False)] * 2
    assert made.quantised() == []
    assert not any("block" in target and "vllm." not in target for target in made.targets())
    assert f"keeps plain rows for vllm.{block_rows.NAME}: its kernel does not run here" in told()[0]


def test_a_failure_leaves_a_right_graph_and_one_warning(told: Callable[[], list[str]]) -> None:
    made = layer(lambda rows, matrix, scales: (theirs(rows, matrix, scales),))
    before = made.run()
    tensors = (node for node in made.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor))
    weight = next(node for node in tensors if node.op == "placeholder" and list(node.meta["val"].shape) == [N])
    kept = weight.meta.pop("val")
    manager = SimpleNamespace(rmsnorm_patch_blocks=True)
    block_products.PASS.wrap_call(lambda manager, graph: None)(manager, made.graph)
    weight.meta["val"] = kept
    assert told() == [f"rmsnorm_patch: {block_products.PASS.failed}: KeyError: 'val'"]
    assert same(made.run(), before)
    assert made.quantised() == []


def test_the_pass_runs_where_it_was_asked_for_and_is_part_of_the_key() -> None:
    call = block_products.PASS.wrap_call(lambda manager, graph: None)
    uuid = block_products.PASS.wrap_uuid(lambda manager: "manager")
    on, off, unknown = SimpleNamespace(rmsnorm_patch_blocks=True), SimpleNamespace(rmsnorm_patch_blocks=False), object()
    for manager, count in ((off, 0), (unknown, 0), (on, 1)):
        made = layer(lambda rows, matrix, scales: (theirs(rows, matrix, scales),))
        call(manager, made.graph)
        assert len(made.quantised()) == count
    assert uuid(off) == uuid(unknown) != uuid(on)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_trial_multiplies_by_both_libraries(
    power_of_two: bool, libraries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, for a device that is not here."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def tried() -> str:
        return block_products._trial(512, power_of_two, torch.device("cpu"))

    assert tried() == ""
    assert [name for name, given in CALLS if given] == ["flashinfer", "deepgemm", "deepgemm"]
    flashinfer, deepgemm = libraries.flashinfer_fp8_blockscale_gemm, libraries.fp8_gemm_nt

    def by_rows(input: Any, input_scale: Any = None, **named: Any) -> Any:
        """A release that reads scales row by row."""
        if input_scale is not None:
            input_scale = torch.cat([input_scale.contiguous().flatten()] * 2)
        return flashinfer(input, input_scale=input_scale, **named)

    libraries.flashinfer_fp8_blockscale_gemm = by_rows
    assert "gives something else for 3 rows" in tried()
    libraries.flashinfer_fp8_blockscale_gemm = flashinfer
    libraries.fp8_gemm_nt = lambda left, right, out, **named: deepgemm((left[0], left[1] * 1.1), right, out, **named)
    assert "gives something else for 33 rows" in tried()
    del libraries.fp8_gemm_nt
    assert "does not take rows that are quantised before" in tried()


def test_the_op_is_opaque_with_the_shape_of_vllms() -> None:
    rows, scales = torch.randn(5, N).to(torch.float8_e4m3fn), torch.ones(5, 2)
    op = torch.ops.rmsnorm_patch.block_product.default
    arguments = (rows, torch.empty_strided((5, 2), (1, 8)).copy_(scales), *weights(), True)
    torch.library.opcheck(op, arguments, test_utils="test_faketensor")
    assert op(*arguments).dtype == BF16


OF_VLLM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import block_libraries
import torch
from block_libraries import CALLS, weights
from rmsnorm_patch import ops
from rmsnorm_patch.fused.norm_quantised.op import quant_args
from rmsnorm_patch.vllm_plugin.passes import block_products, block_rows
from rmsnorm_patch.vllm_plugin.decision import SPECS

assert block_products._libraries() is block_libraries.of_vllm()
theirs, ours = getattr(torch.ops.vllm, block_rows.NAME), torch.ops.rmsnorm_patch
assert str(theirs.default._schema) == f"vllm::{{block_rows.NAME}}{{block_libraries._SCHEMA}}"
weight, matrix, spec = torch.randn(256).bfloat16(), weights(), ops.spec_args(SPECS["rmsnorm_patch"])
for m in (1, 31, 32, 45):
    for power_of_two in (False, True):
        CALLS.clear()
        x, quant = torch.randn(m, 256).bfloat16(), block_rows.spec_of(power_of_two)
        want = theirs(ours.rms_norm(x, weight, 1e-5, *spec), *matrix, 128, power_of_two)
        rows, scales, _ = ours.rms_norm_quantised(x, weight, None, quant.scheme, 1e-5, *spec, *quant_args(quant))
        found = ours.block_product(rows, scales, *matrix, power_of_two)
        assert torch.equal(found, want), (m, power_of_two)
        name = "flashinfer" if m < 32 else "deepgemm"
        assert CALLS == [(name, name == "deepgemm"), (name, True)], CALLS
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed in this environment")
def test_vllms_own_op_gives_the_same_bits(environment: Callable[..., dict[str, str]], run_program: Any) -> None:
    done = run_program(["-c", OF_VLLM], environment())
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
