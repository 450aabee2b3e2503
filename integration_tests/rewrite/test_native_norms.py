"""launcher.c in the forward of a patched norm that is called alone: of a query, after a sublayer, at an entry.

On the CPU, with a driver that computes fp32 norms. Where a check says no, nothing is launched and the norm's own
arithmetic runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from native_driver import Driver, held, table_of
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.rewrite import handover, layer_calls, native, observe

TOKENS = torch.arange(1, 8)[None]
LAYERS = 2
HEADS = 2 * LAYERS
"""Norms over heads: of q and of k."""


def serve(model: PreTrainedModel, path: Path) -> Driver:
    """Apply, and let launcher.c serve every norm of the model that is called as a module."""
    rmsnorm_patch.apply(model)
    for module in model.modules():
        kernel = layer_calls.kernel_of(module)
        if kernel is not None:
            n = kernel.weight_of(module).numel()
            native.enroll_alone(type(module), kernel, table_of("rms_norm", type(module)._rmsnorm_patch_key.spec, n))
    return Driver(path)


@pytest.fixture
def model(small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model("qwen3", torch.float32, num_hidden_layers=LAYERS)


@pytest.fixture
def served(model, launchers) -> tuple[PreTrainedModel, Driver]:
    return model, serve(model, launchers)


@pytest.fixture
def norm(served) -> nn.Module:
    return served[0].model.layers[0].self_attn.q_norm


def rows(norm: nn.Module, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, norm.weight.numel(), generator=torch.Generator().manual_seed(3))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model_type", ["olmo2", "olmo3"])
def test_a_model_computes_what_it_did(small_model, launchers, model_type: str, mode) -> None:
    model = small_model(model_type, torch.float32, num_hidden_layers=LAYERS)
    with mode():
        before = model(TOKENS).logits
        found = serve(model, launchers)
        events: list[observe.Event] = []
        with observe.observing(events.append):
            after = model(TOKENS).logits
    alone = [event for event in events if event.kind == "norm"]
    assert found.launches == len(alone) >= HEADS
    assert {event.backend for event in alone} == {"cuda"}
    assert close(before, after)
    for event in alone:
        assert close(event.normed, layer_calls.kernel_of(event.norm).original(event.norm, event.operands[0]))


def test_no_python_check_runs(served, monkeypatch) -> None:
    model, found = served

    def never(*operands):
        raise AssertionError("the C function was to decide")

    monkeypatch.setattr("rmsnorm_patch.rewrite.guards.servable", never)
    monkeypatch.setattr("rmsnorm_patch.rewrite.norms.take", never)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm(rows(model.model.layers[0].self_attn.q_norm, 1, 3, 4))
    assert found.launches == 1


def test_a_refused_launch_runs_the_original(served, norm) -> None:
    _, found = served
    x = rows(norm, 2, 3)
    found.library.set_result(1)
    with torch.no_grad():
        assert torch.equal(norm(x), layer_calls.kernel_of(norm).original(norm, x))
    assert found.launches == 0


def test_eps_and_weight_are_the_modules_at_the_call(served, norm) -> None:
    _, found = served
    x = rows(norm, 2, 3)
    with torch.no_grad():
        norm.variance_epsilon = 0.5
        norm.weight = nn.Parameter(torch.full_like(norm.weight, 3.0))
        assert close(norm(x), layer_calls.kernel_of(norm).original(norm, x))
        norm.weight.data = torch.full_like(norm.weight, -2.0)
        assert close(norm(x), layer_calls.kernel_of(norm).original(norm, x))
    assert found.eps() == [0.5, 0.5]


def test_hooks_and_keywords_are_those_of_any_module(served, norm) -> None:
    _, found = served
    x = rows(norm, 2, 3)
    with torch.no_grad():
        plain = norm(x)
        handles = [
            norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
            norm.register_forward_hook(lambda module, args, output: output + 1),
        ]
        assert close(norm(x), plain + 1)  # a norm of twice the row is the norm of the row
        for handle in handles:
            handle.remove()
        assert torch.equal(norm(hidden_states=x), plain)
    assert found.launches == 3


def test_a_forward_put_over_ours_is_called(served, norm) -> None:
    _, found = served
    norm.forward = lambda hidden_states: hidden_states
    x = rows(norm, 2, 3)
    with torch.no_grad():
        assert norm(x) is x
    assert found.launches == 0


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


AROUND = {
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "dispatch mode": Watching,
    "function mode": WatchingFunctions,
    "forward AD": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("around", AROUND)
def test_nothing_is_launched_where_something_watches(served, norm, around: str) -> None:
    _, found = served
    x = rows(norm, 2, 3)
    with torch.no_grad(), AROUND[around]():
        assert torch.equal(norm(x), layer_calls.kernel_of(norm).original(norm, x))
    assert found.launches == 0


def test_vmap_and_training_run_the_original(served, norm) -> None:
    _, found = served
    x = rows(norm, 2, 3)
    with torch.no_grad():
        expected = layer_calls.kernel_of(norm).original(norm, x)
        assert close(torch.vmap(norm)(x), expected)
        norm.train()
        assert torch.equal(norm(x), expected)
    assert found.launches == 0


def _without_weight(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = norm.weight
    del norm.weight
    norm.__dict__["weight"] = weight  # found by the original's forward, and neither parameter nor buffer
    return x


def _whole_eps(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    norm.variance_epsilon = 1
    return x


@pytest.mark.parametrize(
    "change",
    [
        lambda norm, x: x.as_subclass(Subclass),
        lambda norm, x: nn.Parameter(x, requires_grad=False),
        lambda norm, x: x.double(),
        lambda norm, x: x.bfloat16(),
        lambda norm, x: x.to_mkldnn().to_dense().transpose(0, 1).unsqueeze(0).expand(3, -1, -1, -1),
        lambda norm, x: x[:0],
        _without_weight,
        _whole_eps,
    ],
    ids=["subclass", "parameter", "double", "bfloat16", "strides", "no rows", "no weight", "whole eps"],
)
def test_what_no_kernel_serves_runs_the_original(served, norm, change: Callable) -> None:
    _, found = served
    with torch.no_grad():
        x = change(norm, rows(norm, 2, 3))
        assert torch.equal(norm(x), layer_calls.kernel_of(norm).original(norm, x))
    assert found.launches == 0


def test_what_rides_on_the_input_is_taken(served) -> None:
    """A normed tensor from the layer before: nothing is computed, and it is taken once."""
    model, found = served
    norm = model.model.layers[1].input_layernorm
    x = rows(norm, 1, 3)
    with torch.no_grad():
        normed, kernel = torch.zeros_like(x), layer_calls.kernel_of(norm)
        handover.put(normed, x, norm, norm.weight, norm.variance_epsilon, kernel, handover.Link())
        assert norm(x) is normed
        assert found.launches == 0
        assert close(norm(x), kernel.original(norm, x))
    assert found.launches == 1


def test_a_default_device_is_no_reason(served, norm) -> None:
    _, found = served
    with torch.no_grad(), torch.device("cpu"):
        norm(rows(norm, 2, 3))
    assert found.launches == 1


def test_a_compiled_model_does_not_come_here(served, monkeypatch) -> None:
    model, found = served
    torch._dynamo.reset()
    norm = model.model.layers[0].self_attn.q_norm
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    x = rows(norm, 2, 3)
    with torch.no_grad():
        assert close(compiled(x), layer_calls.kernel_of(norm).original(norm, x))
    assert found.launches == 0


@pytest.mark.parametrize("operands", [(), (1,), (None, 2), (nn.Linear(2, 2), torch.ones(2))])
def test_odd_operands_are_declined(served, operands) -> None:
    assert native.alone(*operands) is None


def test_nothing_leaks(served, norm, collect_garbage) -> None:
    x = rows(norm, 2, 3)
    watched = (norm, norm.weight, norm.__dict__, x, x.__dict__, native._alone[type(norm)], layer_calls.kernel_of(norm))
    with torch.no_grad():
        for around in (nullcontext, Watching):  # served and declined
            with around():
                norm(x)
                objects, counts = held(watched, collect_garbage)
                for _ in range(100):
                    norm(x)
                objects_after, counts_after = held(watched, collect_garbage)
                assert counts_after == counts
                assert abs(objects_after - objects) < 50
