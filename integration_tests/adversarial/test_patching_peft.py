"""PEFT: LoRA in both orders, modules_to_save on a norm, several adapters, disable_adapter, merging."""

from __future__ import annotations

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model

import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE, derives_from_patched

FUSED = {"norm": 1, "in_layer": 2, "cross_layer": 2, "taken": 2}


def _lora(model, seed=0, **fields):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **fields)
    torch.manual_seed(seed)
    return get_peft_model(model, config).eval()


def _add(model, name, seed):
    config = LoraConfig(r=2, target_modules=["o_proj", "gate_proj"], init_lora_weights=False)
    torch.manual_seed(seed)
    model.add_adapter(name, config)


def _is_clean(model):
    return not any(derives_from_patched(type(m)) or STATE in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("order", ["lora first", "lora after"])
def test_lora_in_either_order(small_model, run, ids, order):
    expected = run(_lora(small_model("llama")), ids)
    base = small_model("llama")
    assert not run(small_model("llama"), ids).same_as(expected)
    if order == "lora first":
        model = _lora(base)
        rmsnorm_patch.apply(model)
    else:
        rmsnorm_patch.apply(base)
        model = _lora(base)
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds == FUSED
    report = rmsnorm_patch.apply(model)
    assert len(report.norms) == 5
    assert run(model, ids).kinds == FUSED
    rmsnorm_patch.revert(model)
    reverted = run(model, ids)
    assert reverted.same_as(expected)
    assert reverted.kinds == {}
    assert _is_clean(model)


@pytest.mark.parametrize("order", ["lora first", "lora after"])
def test_several_adapters_disabled_and_switched(small_model, run, ids, order):
    def build(patch):
        base = small_model("llama")
        if patch and order == "lora after":
            rmsnorm_patch.apply(base)
        model = _lora(base)
        _add(model, "second", 5)
        if patch and order == "lora first":
            rmsnorm_patch.apply(model)
        return model.eval()

    plain, model = build(False), build(True)
    seen = []
    for name in ("default", "second", "default"):
        plain.set_adapter(name)
        model.set_adapter(name)
        expected, after = run(plain, ids), run(model, ids)
        assert after.same_as(expected)
        assert after.kinds == FUSED
        seen.append(expected)
    assert not seen[0].same_as(seen[1])
    with plain.disable_adapter(), model.disable_adapter():
        expected, after = run(plain, ids), run(model, ids)
    assert after.same_as(expected)
    assert after.same_as(run(small_model("llama"), ids))
    assert after.kinds == FUSED


@pytest.mark.parametrize("order", ["lora first", "lora after"])
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm", "norm"])
def test_modules_to_save_on_a_norm(small_model, run, ids, order, norm):
    def build(patch):
        base = small_model("llama")
        if patch and order == "lora after":
            rmsnorm_patch.apply(base)
        model = _lora(base, modules_to_save=[norm])
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                with torch.no_grad():
                    parameter.mul_(1.25)
        if patch and order == "lora first":
            rmsnorm_patch.apply(model)
        return model

    plain, model = build(False), build(True)
    expected = run(plain, ids)
    assert not expected.same_as(run(_lora(small_model("llama")), ids))
    assert run(model, ids).same_as(expected)
    assert run(model, ids, inference=True).same_as(expected)
    with plain.disable_adapter(), model.disable_adapter():
        assert run(model, ids).same_as(run(plain, ids))
    report = rmsnorm_patch.apply(model)  # the wrapped norms and their copies are norms of the model as it is now
    saved = [path for path in report.norms if "modules_to_save" in path]
    assert len(saved) == {"norm": 5}.get(norm, 2)  # PEFT matches the end of a name
    assert run(model, ids).same_as(expected)
    rmsnorm_patch.revert(model)
    reverted = run(model, ids)
    assert reverted.same_as(expected)
    assert reverted.kinds == {}
    assert _is_clean(model)


def test_norms_trained_by_ln_tuning(small_model, run, ids):
    def build():
        model = get_peft_model(small_model("llama"), LNTuningConfig(target_modules=["input_layernorm", "norm"])).eval()
        for name, parameter in model.named_parameters():
            if "ln_tuning" in name:
                with torch.no_grad():
                    parameter.mul_(0.75)
        return model

    plain, model = build(), build()
    expected = run(plain, ids)
    rmsnorm_patch.apply(model)
    assert run(model, ids).same_as(expected)
    with plain.disable_adapter(), model.disable_adapter():
        assert run(model, ids).same_as(run(plain, ids))


def test_merged_and_unloaded(small_model, run, ids):
    expected = run(_lora(small_model("llama")).merge_and_unload(), ids)
    base = small_model("llama")
    rmsnorm_patch.apply(base)
    model = _lora(base, modules_to_save=["norm"]).merge_and_unload()
    after = run(model, ids)
    assert after.same_as(expected)
    rmsnorm_patch.revert(model)
    assert run(model, ids).same_as(expected)
    assert _is_clean(model)


def test_training_an_adapter_gives_the_same_gradients(small_model, ids):
    def gradients(patch):
        model = _lora(small_model("llama"), modules_to_save=["norm"])
        if patch:
            rmsnorm_patch.apply(model)
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, ours = gradients(False), gradients(True)
    assert plain.keys() == ours.keys()
    assert len(plain) > 6
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
