"""launcher.c in a whole model on the CPU: its driver is one that computes fp32 norms, all else is what a GPU runs.

Each pair is one launch; where a check says no, nothing is launched and the original arithmetic runs.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from native_driver import held
from native_model import LAYERS, PAIRS, TOKENS, close, patch, settle
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rmsnorm_patch
from rmsnorm_patch.patch_state import original_class
from rmsnorm_patch.rewrite import handover, layer_calls, native, observe


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_pair_is_one_launch(model, launchers, monkeypatch, mode) -> None:
    with mode():
        before = model(TOKENS).logits
        found = patch(model, launchers, monkeypatch)
        settle(model)
        start = found.launches
        after = model(TOKENS).logits
    assert found.launches - start == PAIRS
    assert close(before, after)


def test_no_python_check_runs(patched, monkeypatch) -> None:
    model, _ = patched
    with torch.no_grad():
        settle(model)

        def never(*operands):
            raise AssertionError("the C functions were to decide")

        monkeypatch.setattr(layer_calls, "_in_layer", never)
        monkeypatch.setattr(layer_calls, "_tail", never)
        model(TOKENS)


@pytest.mark.parametrize("part", ["norm", "layers.1"])
def test_nothing_is_launched_for_a_class_that_got_another_forward(patched, monkeypatch, part) -> None:
    model, found = patched
    with torch.no_grad():
        settle(model)
        cls = original_class(type(model.model.get_submodule(part)))
        before, calls = cls.forward, []

        def counted(self, *args, **named):
            calls.append(self)
            return before(self, *args, **named)

        monkeypatch.setattr(cls, "forward", counted)
        launched = found.launches
        model(TOKENS)
    assert found.launches == launched
    assert len(calls) == (2 * LAYERS + 1 if part == "norm" else LAYERS)


def test_the_first_call_on_a_device_lets_the_c_functions_serve(model, monkeypatch) -> None:
    """A model is not patched for them by anybody: the guarded call of each class, for which the op has a table, is."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rmsnorm_patch.apply(model, backend="triton")
    norm = model.model.layers[0].post_attention_layernorm
    kernel = layer_calls.kernel_of(norm)
    enrolled = []
    monkeypatch.setattr(native, "enroll", lambda cls, kernel: enrolled.append((cls, kernel)))
    with torch.no_grad():
        model(TOKENS)
        assert not enrolled
        monkeypatch.setattr(kernel.fused, "table", object())
        model(TOKENS)
    assert set(enrolled) == {(type(norm), kernel)}


def test_held_forwards_launch_nothing_after_revert(model, launchers, monkeypatch) -> None:
    with torch.no_grad():
        before = model(TOKENS).logits
        found = patch(model, launchers, monkeypatch)
        settle(model)
        for module in (*model.model.layers, *(m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm")):
            module.forward = functools.partial(module.forward)
        rmsnorm_patch.revert(model)
        start = found.launches
        assert torch.equal(model(TOKENS).logits, before)
    assert found.launches == start


def test_generation_is_the_models(model, launchers, monkeypatch) -> None:
    with torch.inference_mode():
        before = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
        found = patch(model, launchers, monkeypatch)
        after = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
    assert torch.equal(before, after)
    assert found.launches >= PAIRS * 7


def test_a_refused_launch_runs_the_original(model, launchers, monkeypatch) -> None:
    with torch.no_grad():
        before = model(TOKENS).logits
        found = patch(model, launchers, monkeypatch)
        found.library.set_result(1)
        assert torch.equal(model(TOKENS).logits, before)
    assert found.launches == 0


def test_eps_and_weight_are_the_modules_at_the_call(model, launchers, monkeypatch) -> None:
    found = patch(model, launchers, monkeypatch)
    layer = model.model.layers[1]
    with torch.no_grad():
        settle(model)
        start = found.launches
        layer.input_layernorm.variance_epsilon = 0.5
        layer.post_attention_layernorm.weight = nn.Parameter(torch.full_like(layer.input_layernorm.weight, 3.0))
        after = model(TOKENS).logits
        assert [round(eps, 7) for eps in found.eps()[start:]] == [1e-6, 0.5, 1e-6, 1e-6, 1e-6, 1e-6]
        rmsnorm_patch.revert(model)
        assert close(model(TOKENS).logits, after)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class CoarseAdd(TorchFunctionMode):
    """Simulates another precision, as quantisation studies do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.to(torch.float8_e5m2).to(result.dtype) if func is torch.Tensor.add else result


def test_a_default_device_is_no_reason(patched) -> None:
    model, found = patched
    with torch.no_grad(), torch.device("cpu"):
        settle(model)
        start = found.launches
        model(TOKENS)
    assert found.launches - start == PAIRS


AROUND = ["grad", "training", "autocast", "dispatch mode", "function mode", "forward AD", "vmap", "hooks"]
AROUND += ["global hooks"]


@pytest.mark.parametrize("around", AROUND)
def test_nothing_is_launched_where_the_original_must_run(model, launchers, monkeypatch, around: str) -> None:
    found = patch(model, launchers, monkeypatch)
    with torch.no_grad():
        settle(model)
    start = found.launches
    handle = None
    if around == "training":
        model.train()
    if around == "hooks":
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.register_forward_hook(lambda module, args, output: None)
    if around == "global hooks":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    contexts = {
        "grad": torch.enable_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "dispatch mode": Watching(),
        "function mode": CoarseAdd(),
        "forward AD": torch.autograd.forward_ad.dual_level(),
    }
    with torch.no_grad(), contexts.get(around, nullcontext()):
        if around == "vmap":
            x = torch.ones(2, 1, model.config.hidden_size)
            norm = model.model.layers[0].post_attention_layernorm
            torch.vmap(lambda row: layer_calls.in_layer(norm, row, row)[0])(x)
        else:
            model(TOKENS)
    if handle is not None:
        handle.remove()
    assert found.launches == start


def test_an_observer_sees_what_the_c_functions_ran(patched) -> None:
    model, found = patched
    events: list[observe.Event] = []
    with torch.no_grad():
        settle(model)
        start = found.launches
        with observe.observing(events.append):
            model(TOKENS)
    assert found.launches - start == PAIRS
    kinds = [event.kind for event in events]
    assert [kinds.count(kind) for kind in ("in_layer", "cross_layer", "taken", "norm")] == [3, 3, 3, 1]
    for event in events:
        if event.total is not None:
            assert torch.equal(event.total, event.operands[0] + event.operands[1])
            assert close(event.normed, layer_calls.kernel_of(event.norm).original(event.norm, event.total))


class Scaled(nn.Module):
    """Stands between two modules and edits the residual stream where no version is counted."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **named):
        hidden_states = self.inner(*args, **named)
        hidden_states.data.mul_(1.5)
        return hidden_states


def _wrap_a_layer(model: nn.Module) -> None:
    model.model.layers[1] = Scaled(model.model.layers[1])


class Editing(nn.Module):
    """In place of a norm: edits what it is given where no version is counted, then asks the norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states):
        hidden_states.data.mul_(1.5)
        return self.norm(hidden_states)


def _wrap_the_reader(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm = Editing(model.model.layers[1].input_layernorm)


def _wrap_the_last_reader(model: nn.Module) -> None:
    model.model.norm = Editing(model.model.norm)


def _hook_a_layer(model: nn.Module) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, output: output.mul_(1.5))


def _pre_hook_the_reader(model: nn.Module) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].data.mul_(1.5), None)[1])


def _drop_a_layer(model: nn.Module) -> None:
    del model.model.layers[1]


def _swap_layers(model: nn.Module) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def _new_norm(model: nn.Module) -> None:
    weight = model.model.layers[1].input_layernorm.weight
    model.model.layers[1].input_layernorm = nn.RMSNorm(weight.numel(), eps=0.1)


def _own_forward(model: nn.Module) -> None:
    layer = model.model.layers[1]
    run = layer.forward
    layer.forward = lambda hidden_states, *args, **named: run(hidden_states.mul_(1.5), *args, **named)


@pytest.mark.parametrize(
    "change",
    [
        _wrap_a_layer,
        _wrap_the_reader,
        _wrap_the_last_reader,
        _hook_a_layer,
        _pre_hook_the_reader,
        _drop_a_layer,
        _swap_layers,
        _new_norm,
        _own_forward,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_changed_model_computes_what_it_would(small_model, launchers, monkeypatch, change, mode) -> None:
    stock, model = (small_model("llama", torch.float32, num_hidden_layers=LAYERS) for _ in range(2))
    model.load_state_dict(stock.state_dict())
    found = patch(model, launchers, monkeypatch)
    with mode():
        settle(model)
        for each in (stock, model):
            change(each)
        start = found.launches
        assert close(model(TOKENS, use_cache=False).logits, stock(TOKENS, use_cache=False).logits)
        assert found.launches > start


def test_checkpointing_around_the_layers_call(model, launchers, monkeypatch) -> None:
    """Where `GradientCheckpointingLayer` has the `__call__` that older transformers gave it."""
    from transformers import modeling_layers

    code = "def __call__(self, *args, **named):\n    return call(self, *args, **named)"
    scope = {"call": nn.Module.__call__}
    exec(compile(code, modeling_layers.__file__, "exec"), scope)
    monkeypatch.setattr(modeling_layers.GradientCheckpointingLayer, "__call__", scope["__call__"], raising=False)
    found = patch(model, launchers, monkeypatch)
    with torch.no_grad():
        settle(model)
        start = found.launches
        model(TOKENS)
    assert found.launches - start == PAIRS


def test_a_users_loop_gets_nothing_handed_over(patched) -> None:
    model, found = patched
    base = model.model
    with torch.no_grad():
        settle(model)
        x = base.embed_tokens(TOKENS)
        position = torch.arange(TOKENS.shape[1])[None]
        rotary = base.rotary_emb(x, position)
        start = found.launches
        for layer in base.layers:
            x = layer(x, position_embeddings=rotary, position_ids=position)
            assert handover.CARRIED not in x.__dict__
    assert found.launches - start == LAYERS


def test_what_nobody_takes_is_counted_and_given_up(patched, monkeypatch) -> None:
    model, found = patched
    link = model.model.layers[0].__dict__["_rmsnorm_patch"][handover.LINK]
    counted = []
    monkey = native.take
    monkeypatch.setattr(native, "take", lambda *operands: (counted.append(link.untaken), monkey(*operands))[1])
    with torch.no_grad():
        settle(model)
        counted.clear()
        model(TOKENS)
        assert (counted, link.untaken) == ([0, 1, 0], 0)
        link.untaken, start = handover.MAX_UNTAKEN, found.launches
        model(TOKENS)
    assert found.launches - start == PAIRS - 1


@pytest.mark.parametrize("operands", [(), (1,), (None, 2, 3), (nn.Linear(2, 2), torch.ones(2), torch.ones(2))])
def test_odd_operands_are_declined(patched, operands) -> None:
    settle(patched[0])
    for function in (native.in_layer, native.hand_over, native.take):
        assert function(*operands) is None


def test_nothing_leaks(patched, collect_garbage) -> None:
    model, _ = patched
    norm = model.model.layers[1].input_layernorm
    link = model.model.layers[0].__dict__["_rmsnorm_patch"][handover.LINK]
    watched = (norm, norm.weight, norm.__dict__, link, native._classes[type(norm)], layer_calls.kernel_of(norm))
    with torch.no_grad():
        for _ in range(3):
            model(TOKENS)
        objects, counts = held(watched, collect_garbage)
        for _ in range(50):
            model(TOKENS)
        objects_after, counts_after = held(watched, collect_garbage)
    assert counts_after == counts
    assert abs(objects_after - objects) < 50
