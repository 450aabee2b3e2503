"""Which operands an add and its norm take as one, and why others are taken apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.ops import dispatch
from rmsnorm_patch.patch_state import STATE
from rmsnorm_patch.rewrite import layer_calls, observe
from rmsnorm_patch.rewrite.counts import CALLS


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Model(nn.Module):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6, elementwise_affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def patched(backend: str, affine: bool = True) -> tuple[nn.Module, layer_calls.NormKernel]:
    model = Model(affine).eval().requires_grad_(False)
    rmsnorm_patch.apply(model, backend=backend)
    kernel = layer_calls.kernel_of(model.norm)
    assert kernel is not None
    return model.norm, kernel


def test_a_pair_has_a_weight_exactly_where_its_norm_has_one() -> None:
    a, b, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    for affine in (True, False):
        _, kernel = patched("triton", affine)
        assert layer_calls.pair_servable(kernel, a, b, None) is not affine
    assert layer_calls.pair_servable(patched("triton")[1], a, b, weight)


@pytest.mark.parametrize(
    "b",
    [torch.randn(1, 8), torch.randn(3, 8).double(), torch.randn(3, 8, device="meta"), nn.Parameter(torch.ones(3, 8))],
)
def test_each_difference_of_the_operands_alone_is_named(b: torch.Tensor) -> None:
    norm, kernel = patched("triton")
    with torch.no_grad():
        why = layer_calls.why_not(norm, kernel, torch.randn(3, 8), b)
        assert not layer_calls.pair_servable(kernel, torch.randn(3, 8), b, norm.weight)
    assert why.startswith(("the operands differ: Tensor torch.float32 (3, 8) on cpu, ", "input dtype", "input on meta"))
    assert ("differ" in why) is (b.dtype == torch.float32 and not b.is_meta)


def test_two_dtypes_alone_are_named_where_the_backend_does_not_mix_them(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, kernel = patched("triton")
    a, b = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    assert layer_calls.why_not(norm, kernel, a, b) == ""
    monkeypatch.setattr(kernel, "mixes", False)  # as it is of the CUDA backend
    told = "the operands differ: Tensor torch.bfloat16 (3, 8) on cpu, Tensor torch.float32 (3, 8) on cpu"
    assert layer_calls.why_not(norm, kernel, a, b) == told


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_ops_of_a_class_are_bound_for_its_backend(backend: str) -> None:
    _, kernel = patched(backend)
    ops = (kernel.fused, kernel.norm_add, kernel.norm_add_norm)
    assert [op if op is None else (op.spec, op.backend) for op in ops] == (
        [None] * 3 if backend == "reference" else [(kernel.spec.variant, backend)] * 3
    )
    assert kernel.on_cpu is (backend == "triton")
    assert (kernel.plain.op, kernel.plain.backend) == ("rms_norm", backend)


@pytest.mark.parametrize("compiled", ["model", "joined"])
def test_whose_graphs_have_adds_and_norms_apart(compiled: str) -> None:
    model = Model(True).eval()
    rmsnorm_patch.apply(model, compiled=compiled)
    kernel = layer_calls.kernel_of(model.norm)
    assert kernel is not None
    assert kernel.joined is (compiled == "joined")


def test_a_class_of_auto_leaves_a_cpu_to_the_model_where_it_is_unpickled_under_a_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ops that are bound then would take another backend."""
    norm, _ = patched("auto")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    kernel, x = layer_calls.NormKernel(type(norm)), torch.randn(3, 8)
    assert kernel.fused is not None
    assert kernel.fused.backend_for(x, norm.weight, x) == "triton"
    assert kernel.backend(x, norm.weight, x) == "reference"


@pytest.mark.parametrize(("backend", "serves"), [("triton", True), ("auto", False), ("reference", False)])
def test_who_computes_on_a_cpu(backend: str, serves: bool) -> None:
    norm, kernel = patched(backend)
    x = torch.randn(3, 8)
    assert kernel.serves(x) is serves
    assert kernel.backend(x, norm.weight, x) == ("triton" if serves else "reference")


def test_which_dtypes_an_add_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    _, kernel = patched("triton")
    halves, wide, double = (torch.randn(3, 8).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert [kernel.adds(wide, b) for b in (wide, halves, double)] == [True, True, False]
    assert kernel.adds(halves, wide)
    monkeypatch.setattr(kernel, "mixes", False)  # as it is of the CUDA backend
    assert [kernel.adds(wide, b) for b in (wide, halves, double)] == [True, False, False]


def test_a_pair_runs_only_where_each_guard_lets_it() -> None:
    for backend in ("triton", "reference", "auto"):
        norm, kernel = patched(backend)
        a, b = torch.randn(3, 8), torch.randn(3, 8)
        with torch.no_grad():
            normed, total = kernel.run(norm, a, b, norm.weight, 1e-6)
            assert torch.equal(total, a + b)
            torch.testing.assert_close(normed, kernel.original(norm, a + b))
            assert kernel.run(norm, a, b, norm.weight, 1) is None
            assert kernel.run(norm, a, b[:1], norm.weight, 1e-6) is None
            assert kernel.run(norm.train(), a, b, norm.weight, 1e-6) is None


def test_eps_and_weight_are_named_last() -> None:
    norm, kernel = patched("triton")
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    assert layer_calls.why_not(norm, kernel, a, b) == ""
    norm.eps = 1
    assert layer_calls.why_not(norm, kernel, a, b) == "eps is a int, no float"
    norm.eps = 1e-6
    norm.weight = nn.Parameter(torch.rand(8, dtype=torch.float64), requires_grad=False)
    assert layer_calls.why_not(norm, kernel, a, b) == "weight dtype torch.float64 for input dtype torch.float32"


def told(norm: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[observe.Event, torch.Tensor, torch.Tensor]:
    """The event of one add and norm, and what it gave."""
    events: list[observe.Event] = []
    with torch.no_grad(), observe.observing(events.append):
        normed, total = layer_calls.in_layer(norm, a, b)
    (event,) = (each for each in events if each.kind == "in_layer")
    assert event.operands[0] is a
    assert event.operands[1] is b
    assert (event.normed is normed, event.total is total) == (True, True)
    return event, normed, total


def test_each_way_of_an_add_and_its_norm_is_counted_and_told() -> None:
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    hooked = "the norm has hooks or a forward of its own: it is called as a module"
    ways = {"triton": ("triton", ""), "auto": ("reference", ""), "reference": ("reference", "")}
    for backend in ways:
        norm, kernel = patched(backend)
        counts = norm.__dict__[STATE][CALLS]
        event, normed, total = told(norm, a, b)
        assert (event.backend, event.reason) == ways[backend]
        assert torch.equal(total, a + b)
        torch.testing.assert_close(normed, kernel.original(norm, a + b))
        told(norm, a, b)
        assert (counts.fused, counts.reference) == ((2, 0) if backend == "triton" else (0, 2))
        norm.register_forward_hook(lambda module, given, result: 2 * result)
        event, edited, total = told(norm, a, b)
        assert (event.backend, event.reason, counts.apart.counts()) == ("original", hooked, {hooked: 1})
        assert torch.equal(total, a + b)
        torch.testing.assert_close(edited, 2 * normed)


def test_an_add_and_a_norm_that_nobody_patched() -> None:
    norm, a, b = nn.RMSNorm(8).eval(), torch.randn(3, 8), torch.randn(3, 8)
    event, normed, total = told(norm, a, b)
    assert (event.backend, event.reason) == ("original", "the norm is a RMSNorm that is not patched")
    assert torch.equal(total, a + b)
    assert torch.equal(normed, norm(a + b))


def test_a_graph_has_the_add_of_a_layers_end() -> None:
    torch._dynamo.reset()
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    tail = torch.compile(lambda a, b: layer_calls.tail(nn.Identity(), a, b), backend="eager", fullgraph=True)
    assert torch.equal(tail(a, b), a + b)
    assert torch.equal(layer_calls.tail(nn.Identity(), a, b), a + b)
