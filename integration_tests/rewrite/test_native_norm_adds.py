"""launcher.c with adds behind norms, in whole models on the CPU: each is one launch, with the norm of the sum where
there is one; where a check says no, nothing is launched and the original arithmetic runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from native_driver import Driver, held, norm_add_table
from torch import nn
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.fused.norm_add.op import NORM_ADD, NORM_ADD_NORM
from rmsnorm_patch.rewrite import layer_calls, native, norm_adds, observe

TOKENS = torch.arange(1, 8)[None]
LAYERS = 3
ADDS = 2 * LAYERS
"""Behind each sub-layer."""


def patch(model: PreTrainedModel, path: Path) -> Driver:
    """Apply, and let launcher.c serve the adds behind norms, and nothing else."""
    rmsnorm_patch.apply(model)
    norm = model.model.norm
    kernel = layer_calls.kernel_of(norm)
    assert kernel is not None
    for op in (NORM_ADD, NORM_ADD_NORM):
        table = norm_add_table(op, type(norm)._rmsnorm_patch_key.spec, model.config.hidden_size)
        native.enroll_norm_add(type(norm), kernel, table, following=op == NORM_ADD_NORM)
    with torch.no_grad():
        model(TOKENS)  # finds where the loop's frame is
    return Driver(path)


@pytest.fixture(params=["glm4", "olmo2"])
def model(request, small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model(request.param, torch.float32, num_hidden_layers=LAYERS)


@pytest.fixture
def glm4(small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model("glm4", torch.float32, num_hidden_layers=LAYERS)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_add_is_one_launch(model, launchers, mode) -> None:
    with mode():
        before = model(TOKENS).logits
        found = patch(model, launchers)
        model(TOKENS)
        start = found.launches
        after = model(TOKENS).logits
    assert found.launches - start == ADDS
    assert close(before, after)
    rmsnorm_patch.revert(model)
    with mode():
        assert torch.equal(model(TOKENS).logits, before)


def test_no_python_check_runs(model, launchers, monkeypatch) -> None:
    patch(model, launchers)

    def never(*operands):
        raise AssertionError("the C functions were to decide")

    for name in ("_norm_add", "_norm_add_norm", "_norm_add_tail"):
        monkeypatch.setattr(norm_adds, name, never)
    with torch.no_grad():
        model(TOKENS)


def test_calls_are_counted_and_taken(glm4, launchers) -> None:
    patch(glm4, launchers)
    before = rmsnorm_patch.status(glm4).counts()
    with torch.no_grad():
        glm4(TOKENS)
    counts = rmsnorm_patch.status(glm4).counts()
    grown = {name: counts[name] - before[name] for name in counts if counts[name] != before[name]}
    # One norm is alone: the first, which no add precedes.
    assert grown == {"calls": 4 * LAYERS + 1, "added": ADDS, "fused": LAYERS, "handed_over": LAYERS, "reference": 1}


def test_a_refused_launch_runs_the_original(model, launchers) -> None:
    with torch.no_grad():
        before = model(TOKENS).logits
        found = patch(model, launchers)
        start = found.launches
        found.library.set_result(1)
        assert torch.equal(model(TOKENS).logits, before)
    assert found.launches == start


def test_eps_and_weights_are_the_modules_at_the_call(glm4, launchers) -> None:
    found = patch(glm4, launchers)
    layer = glm4.model.layers[1]
    with torch.no_grad():
        start = found.launches
        layer.post_attention_layernorm.variance_epsilon = 0.5
        layer.post_self_attn_layernorm.variance_epsilon = 0.25
        weight = layer.post_mlp_layernorm.weight
        layer.post_mlp_layernorm.weight = nn.Parameter(torch.full_like(weight, 3.0))
        after = glm4(TOKENS).logits
        usual = pytest.approx(glm4.config.rms_norm_eps)  # the driver notes the eps of the norm that reads the sum
        assert found.eps()[start:] == [usual, usual, 0.5, usual, usual, usual]
        rmsnorm_patch.revert(glm4)
        assert close(glm4(TOKENS).logits, after)


AROUND = ["grad", "training", "autocast", "forward AD", "hook on the inner norm", "hook on the next norm"]
AROUND += ["global hooks", "eps is no float", "another class"]


@pytest.mark.parametrize("around", AROUND)
def test_nothing_is_launched_where_the_original_must_run(glm4, launchers, around: str) -> None:
    found = patch(glm4, launchers)
    start, handle = found.launches, None
    for layer in glm4.model.layers:
        inner = (layer.post_self_attn_layernorm, layer.post_mlp_layernorm)
        readers = (layer.post_attention_layernorm, layer.input_layernorm, glm4.model.norm)
        for norm in (
            inner if around == "hook on the inner norm" else readers if around == "hook on the next norm" else ()
        ):
            norm.register_forward_hook(lambda module, args, output: None)
        for norm in inner if around == "eps is no float" else ():
            norm.variance_epsilon = torch.tensor(1e-5)
        for norm in inner if around == "another class" else ():
            norm.__class__ = type("Other", (norm.__class__,), {})
    if around == "training":
        glm4.train()
    if around == "global hooks":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    contexts = {
        "grad": torch.enable_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "forward AD": torch.autograd.forward_ad.dual_level(),
    }
    with torch.no_grad(), contexts.get(around, nullcontext()):
        glm4(TOKENS)
    if handle is not None:
        handle.remove()
    assert found.launches == start


def test_an_observer_sees_what_the_c_functions_ran(glm4, launchers) -> None:
    found = patch(glm4, launchers)
    events: list[observe.Event] = []
    with torch.no_grad():
        start = found.launches
        with observe.observing(events.append):
            glm4(TOKENS)
    assert found.launches - start == ADDS
    kinds = [event.kind for event in events]
    assert kinds == ["norm", *["norm_add", "in_layer", "norm_add", "cross_layer", "taken"] * LAYERS]
    for event, following in zip(events, [*events[1:], None], strict=True):
        if event.kind == "norm_add":
            x, residual = event.operands
            assert following is not None
            assert torch.equal(event.normed, layer_calls.kernel_of(event.norm).original(event.norm, x))
            assert following.operands[0] is residual
            assert torch.equal(following.operands[1], event.normed)
        if event.kind in ("in_layer", "cross_layer"):
            assert close(event.total, event.operands[0] + event.operands[1])
            assert close(event.normed, layer_calls.kernel_of(event.norm).original(event.norm, event.total))


@pytest.mark.parametrize("operands", [(), (1,), (None, 2, 3, 4), (nn.Linear(2, 2), 0, torch.ones(2), torch.ones(2), 1)])
def test_odd_operands_are_declined(glm4, launchers, operands) -> None:
    patch(glm4, launchers)
    for function in (native.norm_add, native.norm_add_norm, native.norm_hand_over):
        assert function(*operands) is None


def test_odd_tensors_are_declined(glm4, launchers) -> None:
    found = patch(glm4, launchers)
    inner, norm, n = glm4.model.layers[0].post_mlp_layernorm, glm4.model.norm, glm4.config.hidden_size
    good = torch.randn(2, n)
    start = found.launches
    with torch.no_grad():
        for other in (good[:1], good.double(), good.bfloat16(), torch.randn(2, 2 * n)[:, ::2], None, 3):
            for a, b in ((good, other), (other, good)):
                assert native.norm_add(inner, 1, a, b) is None
                assert native.norm_add_norm(norm, inner, 0, a, b) is None
        assert found.launches == start
        left, right = (native.norm_add(inner, side, good, 2 * good) for side in (0, 1))
        assert close(left, inner(good) + 2 * good)
        assert close(right, good + inner(2 * good))


def test_nothing_leaks(glm4, launchers, collect_garbage) -> None:
    patch(glm4, launchers)
    layer = glm4.model.layers[1]
    inner = layer.post_mlp_layernorm
    watched = (inner, inner.weight, inner.__dict__, native._norm_add_norm[type(inner)], layer_calls.kernel_of(inner))
    with torch.no_grad():
        for _ in range(3):
            glm4(TOKENS)
        objects, counts = held(watched, collect_garbage)
        for _ in range(50):
            glm4(TOKENS)
        objects_after, counts_after = held(watched, collect_garbage)
    assert counts_after == counts
    assert abs(objects_after - objects) < 50
