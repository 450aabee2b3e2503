"""Training and gradient checkpointing use the original arithmetic: gradients are identical."""

from __future__ import annotations

import pytest
import torch

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe


def _gradients(model, ids, **arguments):
    model.zero_grad()
    events = []
    with observe.observing(events.append):
        loss = model(ids, labels=ids, use_cache=False, **arguments).loss
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, events


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_identical(small_model, ids, checkpointing, dtype, backend):
    model = small_model("llama", dtype).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    loss, expected, _ = _gradients(model, ids)
    rmsnorm_patch.apply(model, backend=backend)
    again, got, events = _gradients(model, ids)
    assert torch.equal(loss, again)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not [event for event in events if event.kind in ("cross_layer", "taken")]
    assert {event.backend for event in events} <= {"original", "reference"}
    rmsnorm_patch.revert(model)
    _, got, events = _gradients(model, ids)
    assert events == []
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_checkpointing_really_recomputes_through_the_patched_layers(small_model, ids):
    model = small_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rmsnorm_patch.apply(model)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 2


def test_three_steps_of_training_end_in_the_same_weights(small_model, ids):
    def trained(patch):
        model = small_model("qwen3").train()
        if patch:
            rmsnorm_patch.apply(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimiser.step()
            with torch.no_grad():  # evaluation in between runs the fused path on the weights of this step
                model.eval()(ids)
            model.train()
        return model.state_dict()

    plain, ours = trained(False), trained(True)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_evaluation_between_steps_sees_the_new_weights(small_model, run, ids):
    plain, model = small_model("llama"), small_model("llama")
    rmsnorm_patch.apply(model)
    for _ in range(3):
        for made in (plain, model):
            made.zero_grad()
            made(ids, labels=ids).loss.backward()
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
        after = run(model, ids)
        assert after.kinds["in_layer"] == 2
        assert after.same_as(run(plain, ids))


def test_a_frozen_model_in_grad_mode(small_model, run, ids):
    model = small_model("llama").requires_grad_(False)
    expected = run(model, ids)
    rmsnorm_patch.apply(model)
    output = model(ids, output_hidden_states=True)
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "jacrev", "forward_ad", "functional_call"])
def test_function_transforms_see_the_original_arithmetic(small_model, transform):
    model = small_model("llama").requires_grad_(False)
    norm = model.model.norm
    x, t = torch.randn(3, 4, 64), torch.randn(3, 4, 64)

    def apply_transform():
        if transform == "vmap":
            return torch.func.vmap(norm)(x)
        if transform == "jvp":
            return torch.func.jvp(norm, (x,), (t,))[1]
        if transform == "jacrev":
            return torch.func.jacrev(norm)(x[0, :1])
        if transform == "functional_call":
            return torch.func.functional_call(norm, {"weight": norm.weight * 2}, (x,))
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = torch.autograd.forward_ad.make_dual(x, t)
            return torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent

    expected = apply_transform()
    rmsnorm_patch.apply(model)
    got = apply_transform()
    assert (got is None) == (expected is None)
    assert got is None or torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_what_it_gave(small_model, run, ids, dtype):
    model = small_model("llama", dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, ids)
        rmsnorm_patch.apply(model)
        assert run(model, ids).same_as(expected)
