"""The forward of a patched norm as its callers see it: names, signature, further arguments; and inside a graph."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.patch_state import STATE
from rmsnorm_patch.rewrite import guards, guise, layer_calls, native, norms, observe
from rmsnorm_patch.rewrite.counts import CALLS
from rmsnorm_patch.rewrite.guise import MORE_ARGUMENTS
from rmsnorm_patch.scan.plan import NormSite


class Extra(nn.Module):
    """A norm whose forward takes, and never reads, more than its input."""

    def __init__(self, weighted: bool = True) -> None:
        super().__init__()
        if weighted:
            self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 32), requires_grad=False)
        self.weighted = weighted
        self.eps = 1e-6

    def forward(self, rows: torch.Tensor, position: int = 0, *, scale: float = 1.0) -> torch.Tensor:
        """The rows, normed."""
        wide = rows.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed if self.weighted else normed).to(rows.dtype)


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def patched(norm: nn.Module, backend: str = "reference") -> nn.Module:
    model = Model(norm).eval().requires_grad_(False)
    assert rmsnorm_patch.apply(model, backend=backend).norms
    return norm


@pytest.mark.parametrize("make", [Extra, lambda: nn.RMSNorm(32, eps=1e-6)])
def test_a_patched_forward_shows_the_names_and_the_signature_of_the_original(make) -> None:
    norm = make()
    before = type(norm).forward
    after = type(patched(norm)).forward
    assert after is not before
    for name in ("__doc__", "__name__", "__qualname__", "__module__"):
        assert getattr(after, name) == getattr(before, name), name
    assert list(inspect.signature(after).parameters) == list(inspect.signature(before).parameters)
    if isinstance(norm, Extra):
        assert inspect.signature(after) == inspect.signature(before)


class Defaults(nn.Module):
    def forward(self, rows: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return rows * factor


def test_defaults_stay_those_of_the_original() -> None:
    def forward(self: nn.Module, x: torch.Tensor, y: float) -> torch.Tensor:
        return x * y

    made = guise.in_the_guise_of(Defaults, forward)
    assert made.__defaults__ == (2.0,)
    assert torch.equal(made(Defaults(), torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(made(Defaults(), torch.ones(2), factor=3.0), torch.full((2,), 3.0))


def test_a_call_with_more_than_the_input_goes_to_the_original() -> None:
    norm, x = Extra(), torch.randn(3, 32)
    expected = norm(x)
    patched(norm)
    counts = norm.__dict__[STATE][CALLS]
    for count, call in enumerate((lambda: norm(x), lambda: norm(rows=x)), 1):
        assert torch.equal(call(), expected)
        assert counts.reference == count
        assert counts.fallen_back.counts() == {}
    others = (
        lambda: norm(x, 1),
        lambda: norm(x, scale=2.0),
        lambda: norm(rows=x, position=1),
        lambda: norm(scale=2.0, rows=x),
    )
    for call in others:
        assert torch.equal(call(), expected)
    assert counts.reference == 2
    assert counts.fallen_back.counts() == {MORE_ARGUMENTS: len(others)}
    for call in (lambda: norm(position=1), lambda: norm(x, rows=x), lambda: norm()):
        with pytest.raises(TypeError, match="forward"):
            call()


def test_each_reason_alone_sends_a_call_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops.forget()
    x = torch.randn(3, 32)

    def because(change: Callable[[nn.Module], object], given: torch.Tensor = x) -> dict[str, int]:
        norm = patched(Extra(), "triton")
        counts = norm.__dict__[STATE][CALLS]
        change(norm)
        with torch.no_grad():
            norm(given)
        assert counts.alone + sum(counts.fallen_back.counts().values()) == 1
        return counts.fallen_back.counts()

    assert because(lambda norm: None) == {}
    assert because(lambda norm: norm.train()) == {guards.TRAINING: 1}
    assert because(lambda norm: setattr(norm, "eps", 1)) == {"eps is a int, no float": 1}
    assert because(lambda norm: None, x.double()) == {"input dtype torch.float64": 1}

    def take_away(norm: nn.Module) -> None:
        del norm.weight
        norm.__dict__["weight"] = torch.ones(32)

    assert because(take_away) == {"the norm's weight is not a parameter or buffer of its own": 1}


def told(norm: nn.Module, x: torch.Tensor) -> tuple[observe.Event, torch.Tensor]:
    """The event of one call, and what it gave."""
    events: list[observe.Event] = []
    with torch.no_grad(), observe.observing(events.append):
        normed = norm(x)
    (event,) = events
    assert (event.kind, event.norm, event.total) == ("norm", norm, None)
    assert event.operands[0] is x
    assert event.normed is normed
    return event, normed


@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
def test_each_way_of_a_norm_alone_is_counted_and_told(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops.forget()
    x, norm = torch.randn(3, 32), Extra()
    expected = norm(x)
    counts = patched(norm, backend).__dict__[STATE][CALLS]
    served = backend == "triton"
    for count in (1, 2):
        event, normed = told(norm, x)
        assert (event.backend, event.reason) == ("triton" if served else "reference", "")
        torch.testing.assert_close(normed, expected)
        assert (counts.alone, counts.reference, counts.fallen_back.counts()) == (
            count * served,
            count * (not served),
            {},
        )
    if served:
        norm.eps = 1
        event, _ = told(norm, x)
        assert (event.backend, event.reason) == ("original", "eps is a int, no float")


def test_the_originals_own_forward_on_the_module_makes_room() -> None:
    """accelerate's hooks leave one there when they are taken off."""
    norm, x = Extra(), torch.randn(3, 32)
    norm.forward = norm.forward
    assert "forward" in norm.__dict__
    expected = norm(x)
    patched(norm)
    with torch.no_grad():
        assert torch.equal(norm(x), expected)
    assert norm.__dict__[STATE][CALLS].reference == 1


def test_only_a_class_derived_from_the_patched_one_has_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 and parametrisations derive one, module by module. What is held beyond a revert is the original."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops.forget()
    norm, x = patched(Extra(), "triton"), torch.randn(3, 32)
    of_patched = type(norm)
    counts = norm.__dict__[STATE][CALLS]
    norm.__class__ = type("Sharded", (of_patched,), {})
    with torch.no_grad():
        served = norm(x)
        assert counts.alone == 1
        norm.__class__ = Extra
        assert torch.equal(of_patched.forward(norm, x), norm(x))
        torch.testing.assert_close(served, norm(x))
    assert (counts.alone, counts.reference, counts.fallen_back.counts()) == (1, 0, {})


def test_the_first_call_on_a_device_lets_the_c_functions_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op has a table of theirs from then on."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops.forget()
    norm, x, table = patched(Extra(), "triton"), torch.randn(3, 32), object()
    run = type(norm)._rmsnorm_patch_run
    enrolled: list[tuple[object, ...]] = []
    monkeypatch.setattr(native, "enroll_alone", lambda *given: enrolled.append(given))
    with torch.no_grad():
        norm(x)
        assert not enrolled
        monkeypatch.setattr(run, "table", table)
        norm(x)
    assert enrolled == [(type(norm), layer_calls.kernel_of(norm), table)]


def test_what_a_class_is_specialised_on() -> None:
    """An eps that an attribute has is none of it, and a gated norm is not joined."""
    spec = dataclasses.replace(LLAMA, eps=2.5e-6)
    site = NormSite("norm", "Extra", spec, "fuse", "", eps_attribute="eps", weight_attribute="weight")
    for compiled in ("model", "joined"):
        key = norms.key_of(site, "auto", compiled)
        assert key == (spec.variant, "weight", "eps", "auto", None, compiled)
    constant = dataclasses.replace(site, eps_attribute=None)
    assert norms.key_of(constant, "triton").spec is spec
    gated = dataclasses.replace(site, gating=GateSpec("silu", "norm_first"))
    assert norms.key_of(gated, "auto", "joined").compiled == "model"


def test_no_later_kernelize_puts_a_kernel_over_a_patched_class() -> None:
    norm = patched(Extra())
    assert type(norm).kernel_condition(norm) is False


def targets(norm: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the ops of ours in the graph of one call."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    torch.compile(norm, backend=counter, fullgraph=True)(x)
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    return [name for name in names if "rmsnorm_patch" in name]


def test_a_graph_keeps_the_op_only_where_a_kernel_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(ops.COMPILE_VARIABLE, "op")
    ops.forget()
    x = torch.randn(3, 32)
    for make in (Extra, lambda: Extra(weighted=False)):
        norm = patched(make(), "triton")
        assert targets(norm, x) == ["rmsnorm_patch.rms_norm.default"]
        with torch.no_grad():
            assert targets(norm, x.clone().requires_grad_()) == ["rmsnorm_patch.rms_norm.default"]
        assert targets(norm, x.clone().requires_grad_()) == []
        norm.train()
        assert targets(norm, x) == []
        assert targets(patched(make(), "auto"), x) == []
        assert targets(patched(make(), "reference"), x) == []
    norm = patched(Extra(), "triton")
    norm.weight = None
    norm.weighted = False
    assert targets(norm, x) == []
    monkeypatch.delenv(ops.COMPILE_VARIABLE)
    assert targets(patched(Extra(), "triton"), x) == []
