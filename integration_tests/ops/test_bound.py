"""`ops.bind_*`: caching, routing, and what they become inside `torch.compile`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from rmsnorm_patch import ops
from rmsnorm_patch.backends import launch_mode
from rmsnorm_patch.backends.triton import backend as triton_backend
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.gated_norm import op as gated_norm
from rmsnorm_patch.fused.linear_norm import op as linear_norm_op
from rmsnorm_patch.fused.norm_add import op as norm_add
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA
from rmsnorm_patch.ops import dispatch, library


class Layer(torch.nn.Module):
    """The fused op as a class attribute, as patched classes hold it."""

    fused = ops.bind_fused_add_rms_norm(LLAMA)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = self.fused(x * 2, residual, self.weight, self.eps)
        return normed + 1, total


def test_one_callable_for_each_variant_and_backend() -> None:
    assert ops.bind_rms_norm(LLAMA) is ops.bind_rms_norm(replace(LLAMA, eps=1e-5))
    assert ops.bind_rms_norm(LLAMA) is not ops.bind_rms_norm(LLAMA, "reference")
    assert ops.bind_rms_norm(LLAMA) is not ops.bind_rms_norm(GEMMA)
    assert ops.bind_rms_norm(LLAMA) is not ops.bind_fused_add_rms_norm(LLAMA)


def test_binding_from_many_threads_gives_one_callable() -> None:
    spec, found = replace(LLAMA, width=17), []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        found.append(ops.bind_rms_norm(spec))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


@pytest.mark.parametrize("op", PLAIN_OPS)
def test_what_was_bound_is_forgotten_and_bound_anew(op: str) -> None:
    """Also below: an op of torch's, a backend, and an op that lies in a folder."""
    spec = replace(LLAMA, width=23)
    held = (
        lambda: ops.bind(op, spec),
        lambda: library.bound_for(op, torch.ones(1), ops.spec_args(spec)),
        lambda: triton_backend.bind(op, spec),
        lambda: linear_norm_op._bound(True, *ops.spec_args(spec))[2],
    )
    before = [bound() for bound in held]
    assert all(bound() is first for bound, first in zip(held, before, strict=True))
    ops.forget()
    assert all(bound() is not first for bound, first in zip(held, before, strict=True))
    x = torch.randn(3, 64)
    operands = (x, x.clone())[: PLAIN_OPS[op].operands]
    before[0](*operands, torch.randn(64), 1e-6)  # what is held serves as before


def test_plain_launches_are_another_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch_mode.VARIABLE, raising=False)
    usual, plain = ops.bind_rms_norm(LLAMA), ops.bind_rms_norm(LLAMA, enable_pdl=False)
    assert (usual.dependent, plain.dependent) == (True, False)
    assert ops.bind_rms_norm(LLAMA, enable_pdl=True) is usual
    assert usual._args == ops.spec_args(LLAMA)
    assert plain._args == ops.spec_args(LLAMA, enable_pdl=False)
    monkeypatch.setenv(launch_mode.VARIABLE, "off")
    for asked in (None, True, False):
        assert ops.bind_rms_norm(LLAMA, enable_pdl=asked) is plain
    monkeypatch.setenv(launch_mode.VARIABLE, " Auto ")
    assert ops.bind_rms_norm(LLAMA) is usual


@pytest.mark.parametrize("bind", [ops.bind_rms_norm, ops.bind_fused_add_rms_norm, ops.bind_fused_add_rms_norm_])
def test_a_wrong_launch_mode_is_named_where_an_op_is_bound(bind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch_mode.VARIABLE, "on")
    with pytest.raises(UnsupportedInput, match="RMSNORM_PATCH_PDL: got 'on'; supported: 'auto', 'off' or unset"):
        bind(LLAMA)


def test_a_graph_keeps_plain_launches() -> None:
    norm = ops.bind_rms_norm(LLAMA, enable_pdl=False)
    weight, given = torch.ones(64), []

    def backend(graph, _):
        given.extend(node.args for node in graph.graph.nodes if "rms_norm" in str(node.target))
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ops.COMPILE_VARIABLE, "op")
        torch._dynamo.reset()
        torch.compile(lambda x: norm(x, weight, 1e-6), backend=backend, fullgraph=True)(torch.randn(2, 64))
    assert [args[-1] for args in given] == [False]


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="got 'rocm'; allowed: 'auto', 'reference', 'triton', 'cuda'"):
        ops.bind_rms_norm(LLAMA, "rocm")  # type: ignore[arg-type]


def test_cpu_tensors_take_the_reference() -> None:
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    for backend in ("auto", "reference"):
        fused = ops.bind_fused_add_rms_norm(LLAMA, backend)  # type: ignore[arg-type]
        assert fused.backend_for(x) == "reference"
        expected = reference.fused_add_rms_norm(x, residual, weight, LLAMA, 1e-5)
        for mine, other in zip(fused(x, residual, weight, 1e-5), expected, strict=True):
            assert torch.equal(mine, other)
    x_before, residual_before = x.clone(), residual.clone()
    assert ops.bind_fused_add_rms_norm_(LLAMA)(x, residual, weight, 1e-5) is None
    assert torch.equal(residual, x_before + residual_before)
    assert torch.equal(x, reference.rms_norm(residual, weight, LLAMA, 1e-5))


def test_forced_backends_are_reported_and_refuse_what_they_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(3, 64)
    assert ops.bind_rms_norm(LLAMA, "triton").backend_for(x) == "triton"
    with pytest.raises(UnsupportedInput, match="x on cpu; supported: CUDA tensors for backend='cuda'"):
        ops.bind_rms_norm(LLAMA, "cuda")(x, None, 1e-6)


def test_the_variable_is_read_when_an_op_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every call; and nothing that was bound under another value of it is handed out."""
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, before = torch.randn(3, 64), ops.bind_rms_norm(LLAMA)
    assert before.backend_for(x) == "reference"
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    after = ops.bind_rms_norm(LLAMA)
    assert (before.backend_for(x), after.backend_for(x)) == ("reference", "triton")
    assert ops.bind_rms_norm(LLAMA, "reference").backend_for(x) == "reference"
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
    assert ops.bind_rms_norm(LLAMA) is before
    assert after.backend_for(x) == "triton"


class OnDevice:
    """Stands for a CUDA tensor where only routing is of interest."""

    def __init__(self, n: int) -> None:
        self.is_cuda, self.dtype, self.shape, self.device = True, torch.bfloat16, torch.Size((2, n)), "cuda:0"


def test_what_the_cuda_backend_cannot_build_goes_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual call looks nothing up; a refusal is answered by a route of its own for that length only."""
    bound = ops.Bound("rms_norm", LLAMA, "auto", True)

    def cuda(x: Any, weight: Any, eps: Any) -> str:
        if x.shape[-1] > 100:
            raise KernelBuildError("rms_norm", "N=200", "N <= 100", "use triton")
        return "cuda"

    routes = {64: ("cuda", cuda), 200: ("triton", lambda x, weight, eps: "triton"), 300: ("cuda", cuda)}
    monkeypatch.setattr(ops.Bound, "_new_route", lambda self, x, weight, added: routes[x.shape[-1]])
    bound._device_call = cuda
    assert [bound(OnDevice(n), None, 0.0) for n in (64, 200, 64)] == ["cuda", "triton", "cuda"]
    with pytest.raises(KernelBuildError):
        bound(OnDevice(300), None, 0.0)


@pytest.mark.parametrize("form", ["op", "decomposed"])
def test_fullgraph_with_dynamic_rows_recompiles_a_bounded_number_of_times(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ops.COMPILE_VARIABLE, form)
    torch._dynamo.reset()
    counter, layer = CompileCounterWithBackend("aot_eager"), Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for rows in (1, 2, 3, 5, 64, 7):
            x, residual = torch.randn(rows, 64), torch.randn(rows, 64)
            for mine, other in zip(compiled(x, residual), layer(x, residual), strict=True):
                assert torch.equal(mine, other)
    assert counter.frame_count <= 3
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("rmsnorm_patch.fused_add_rms_norm" in target for target in targets) is (form == "op")


@pytest.mark.parametrize("form", ["op", "decomposed"])
def test_inductor(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.COMPILE_VARIABLE, form)
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (2, 9):
        x, residual = torch.randn(rows, 64), torch.randn(rows, 64)
        with torch.no_grad():
            results = zip(compiled(x, residual), layer(x, residual), strict=True)
        for mine, other in results:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_eps_that_changes_is_seen_by_compiled_code() -> None:
    torch._dynamo.reset()
    layer, x = Layer(), torch.randn(3, 64) * 1e-3
    compiled = torch.compile(layer, fullgraph=True, backend=CompileCounter())
    compiled(x, x)
    layer.eps = 1.0
    assert torch.equal(compiled(x, x)[0], layer(x, x)[0])


def test_export_keeps_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.COMPILE_VARIABLE, "op")
    x, layer, rows = torch.randn(3, 64), Layer().requires_grad_(False), torch.export.Dim("rows")
    for strict in (False, True):
        program = torch.export.export(layer, (x, x), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
        assert "rmsnorm_patch.fused_add_rms_norm.default" in str(program.graph)
        wide = torch.randn(7, 64)
        assert torch.equal(program.module()(wide, wide)[0], layer(wide, wide)[0])
        lowered = program.run_decompositions(ops.decompositions())
        assert "rmsnorm_patch" not in str(lowered.graph)


def test_the_form_of_compiled_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.COMPILE_VARIABLE, raising=False)
    assert (ops.compile_form("cpu"), ops.compile_form("cuda")) == ("decomposed", "op")
    monkeypatch.setenv(ops.COMPILE_VARIABLE, "op")
    assert ops.compile_form("cpu") == "op"
    monkeypatch.setenv(ops.COMPILE_VARIABLE, "opaque")
    with pytest.raises(UnsupportedInput, match="RMSNORM_PATCH_COMPILE: got 'opaque'; supported: 'op', 'decomposed'"):
        ops.compile_form("cpu")


def test_the_reference_has_the_gradients_of_the_arithmetic() -> None:
    x, residual = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)
    weight = torch.randn(64, requires_grad=True)
    normed, total = ops.bind_fused_add_rms_norm(LLAMA)(x, residual, weight, 1e-6)
    (normed.square().sum() + total.sum()).backward()
    mine = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    normed, total = reference.fused_add_rms_norm(x, residual, weight, LLAMA, 1e-6)
    (normed.square().sum() + total.sum()).backward()
    assert torch.equal(x.grad, mine[0])
    assert torch.equal(weight.grad, mine[1])


@pytest.mark.parametrize("form", ["op", "decomposed"])
def test_compiled_training_has_the_gradients_of_the_arithmetic(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op has no backward: a graph that needs one holds the arithmetic instead."""
    monkeypatch.setenv(ops.COMPILE_VARIABLE, form)
    torch._dynamo.reset()
    layer, x = Layer(), torch.randn(3, 64)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x)[0].square().sum().backward()
    compiled = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x, x)[0].square().sum().backward()
    assert torch.equal(compiled, layer.weight.grad)


BINDINGS: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: ops.bind_rms_norm(LLAMA),
    "fused_add_rms_norm": lambda: ops.bind_fused_add_rms_norm(LLAMA),
    "fused_add_rms_norm_": lambda: ops.bind_fused_add_rms_norm_(LLAMA),
    "norm_add": lambda: norm_add.bind_norm_add(LLAMA),
    "norm_add_norm": lambda: norm_add.bind_norm_add_norm(LLAMA),
    "gated": lambda: gated_norm.bind(LLAMA, GateSpec("silu", "norm_first")),
}


def backend_of(bound: Any, x: torch.Tensor) -> str:
    tensors = {norm_add.BoundNormAdd: (x, None), gated_norm.Bound: (x, x, None)}.get(type(bound), (x,))
    return bound.backend_for(*tensors)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BINDINGS)
def test_every_op_reads_the_variable_when_it_is_bound_and_then_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what is called for the first time under another value."""
    bind, variable = BINDINGS[name], dispatch.BACKEND_VARIABLE
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, wider = torch.randn(3, 64), torch.randn(3, 80)
    ops.forget()
    before = bind()
    assert backend_of(before, x) == "reference"
    monkeypatch.setenv(variable, "triton")
    after = bind()
    assert [backend_of(before, each) for each in (x, wider)] == ["reference", "reference"]
    assert backend_of(after, x) == "triton"
    monkeypatch.delenv(variable)
    assert bind() is before
    assert [backend_of(after, each) for each in (x, wider)] == ["triton", "triton"]


def test_on_a_gpu_too_a_bound_op_keeps_what_the_variable_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_describe", lambda _: (90, "a GPU", ""))
    before = ops.Bound("rms_norm", LLAMA, "auto", True)
    after = ops.Bound("rms_norm", LLAMA, "auto", True, "triton")
    x, cuda = torch.empty(2, 4096, dtype=torch.bfloat16), torch.device("cuda", 0)
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "reference")
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *given, **named: choose(*given, **{**named, "device": cuda}))
    assert (before._chosen(x, None, x.dtype), after._chosen(x, None, x.dtype)) == ("cuda", "triton")
