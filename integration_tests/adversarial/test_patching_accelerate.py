"""accelerate's hooks before and after apply, CPU and disk offload, dispatch_model."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)

import rmsnorm_patch
from rmsnorm_patch.patch_state import derives_from_patched


class Count(ModelHook):
    def __init__(self):
        self.before = self.after = 0

    def pre_forward(self, module, *args, **kwargs):
        self.before += 1
        return args, kwargs

    def post_forward(self, module, output):
        self.after += 1
        return output


class Double(ModelHook):
    """Edits what the module gives: a hook whose effect shows in the logits."""

    def post_forward(self, module, output):
        return output * 2


NORMS = ("model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm")


def _hook(model, make, paths=NORMS):
    hooks = [make() for _ in paths]
    for path, hook in zip(paths, hooks, strict=True):
        add_hook_to_module(model.get_submodule(path), hook)
    return hooks


@pytest.mark.parametrize("order", ["hooks first", "hooks after"])
@pytest.mark.parametrize("hook", [Count, Double, lambda: AlignDevicesHook(execution_device="cpu", io_same_device=True)])
def test_hooks_on_norms_run_in_either_order_and_their_edits_count(small_model, run, ids, snapshot, order, hook):
    plain, model = small_model("llama"), small_model("llama")
    _hook(plain, hook)
    expected = run(plain, ids)
    if order == "hooks first":
        _hook(model, hook)
        run(model, ids)  # transformers installs its own recording hooks at the first call
        hooks = _hook(model, hook)
        before = snapshot(model)
        rmsnorm_patch.apply(model)
    else:
        rmsnorm_patch.apply(model)
        hooks = _hook(model, hook)
    after = run(model, ids)
    assert after.same_as(expected)
    if hook is Count:
        assert [(h.before, h.after) for h in hooks] == [(1, 1)] * 3
    assert after.kinds["norm"] >= 3
    rmsnorm_patch.revert(model)
    reverted = run(model, ids)
    assert reverted.same_as(expected)
    assert reverted.kinds == {}
    if order == "hooks first":
        assert [s[:3] for s in snapshot(model)] == [s[:3] for s in before]
    for path in NORMS:
        remove_hook_from_module(model.get_submodule(path))
    stock = run(small_model("llama"), ids)
    assert run(model, ids).same_as(stock)


@pytest.mark.parametrize("removed", ["before revert", "after revert"])
def test_hooks_removed_while_patched_leave_the_original_after_revert(small_model, run, ids, removed):
    model = small_model("llama")
    expected = run(model, ids)
    _hook(model, Count)
    rmsnorm_patch.apply(model)
    if removed == "before revert":
        remove_hook_from_submodules(model)
        assert run(model, ids).same_as(expected)
    rmsnorm_patch.revert(model)
    remove_hook_from_submodules(model)
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds == {}
    for path in NORMS:
        norm = model.get_submodule(path)
        assert norm.forward.__func__ is type(norm).forward
        assert not derives_from_patched(type(norm))


def test_hooks_added_while_patched_and_removed_leave_the_patch_on(small_model, run, ids):
    model = small_model("llama")
    expected = run(model, ids)
    rmsnorm_patch.apply(model)
    _hook(model, Count)
    remove_hook_from_submodules(model)
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds["norm"] >= 1
    assert len(after.events) >= 5
    rmsnorm_patch.revert(model)
    assert run(model, ids).kinds == {}
    norm = model.model.norm
    assert norm.forward.__func__ is type(norm).forward


def test_sequential_hooks_and_appended_ones(small_model, run, ids):
    plain, model = small_model("llama"), small_model("llama")
    for made in (plain, model):
        add_hook_to_module(made.model.norm, SequentialHook(Count(), Double()))
        if made is model:
            rmsnorm_patch.apply(model)
        add_hook_to_module(made.model.norm, Double(), append=True)
    assert run(model, ids).same_as(run(plain, ids))


@pytest.mark.parametrize("order", ["hooks first", "hooks after"])
@pytest.mark.parametrize("paths", [("model.layers.0", "model.layers.1"), ("model", ""), ("model.layers.1",)])
def test_hooks_on_layers_and_models(small_model, run, ids, order, paths):
    plain, model = small_model("llama"), small_model("llama")
    _hook(plain, Count, paths)
    expected = run(plain, ids)
    if order == "hooks first":
        hooks = _hook(model, Count, paths)
        rmsnorm_patch.apply(model)
    else:
        rmsnorm_patch.apply(model)
        hooks = _hook(model, Count, paths)
    after = run(model, ids)
    assert after.same_as(expected)
    assert [(h.before, h.after) for h in hooks] == [(1, 1)] * len(paths)
    assert after.kinds["in_layer"] == 2
    rmsnorm_patch.revert(model)
    reverted = run(model, ids)
    assert reverted.same_as(expected)
    assert reverted.kinds == {}


class Edit(ModelHook):
    """Changes the sum between the add and the norm that reads it, in place and by a new tensor."""

    def __init__(self, in_place):
        self.in_place = in_place

    def post_forward(self, module, output):
        return output.add_(0.25) if self.in_place else output + 0.25


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("order", ["hooks first", "hooks after"])
def test_a_hook_that_edits_a_layers_output_is_seen_by_the_next_norm(small_model, run, ids, order, in_place, inference):
    plain, model = small_model("llama"), small_model("llama")
    add_hook_to_module(plain.model.layers[0], Edit(in_place))
    expected = run(plain, ids, inference=inference)
    if order == "hooks first":
        add_hook_to_module(model.model.layers[0], Edit(in_place))
        rmsnorm_patch.apply(model)
    else:
        rmsnorm_patch.apply(model)
        add_hook_to_module(model.model.layers[0], Edit(in_place))
    assert run(model, ids, inference=inference).same_as(expected)


@pytest.mark.parametrize("order", [("apply", "on", "off"), ("on", "apply", "off"), ("apply", "on", "off", "apply")])
def test_hooks_taken_off_again_leave_every_pair_fused(small_model, run, ids, order):
    """They leave the class's own forward on each module, which is no other forward."""
    model = small_model("llama")
    expected = run(model, ids)
    for step in order:
        if step == "apply":
            rmsnorm_patch.apply(model, backend="reference")
        elif step == "on":
            for path, module in model.named_modules():
                if path:
                    add_hook_to_module(module, Count())
        else:
            remove_hook_from_submodules(model)
    assert "forward" in model.model.norm.__dict__
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds == {"norm": 1, "in_layer": 2, "cross_layer": 2, "taken": 2}
    assert after.backends == {"reference": 7}
    rmsnorm_patch.revert(model)
    reverted = run(model, ids)
    assert reverted.same_as(expected)
    assert reverted.kinds == {}


def _offloaded(model, how, folder):
    if how == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk"}
    places.update({"model.layers.1": "cpu", "model.norm": "disk", "lm_head": "disk"})
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("order", ["hooks first", "hooks after"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_weights_are_loaded_by_calling_the_module(small_model, run, ids, tmp_path, how, order):
    model = small_model("llama")
    expected = run(model, ids)
    if order == "hooks first":
        model = _offloaded(model, how, tmp_path)
        assert model.model.norm.weight.is_meta
        report = rmsnorm_patch.apply(model)
    else:
        report = rmsnorm_patch.apply(model)
        model = _offloaded(model, how, tmp_path)
    assert len(report.norms) == 5
    assert model.model.norm.weight.is_meta
    for _ in range(2):
        after = run(model, ids)
        assert after.same_as(expected)
        assert after.kinds == {"norm": 5, "in_layer": 2, "kept": 2}
        pairs = [event for event in after.events if event.kind != "norm"]
        assert {event.backend for event in pairs} == {"original"}  # they called the hooked norm
    rmsnorm_patch.revert(model)
    reverted = run(model, ids)
    assert reverted.same_as(expected)
    assert reverted.kinds == {}
    assert model.model.norm.weight.is_meta
