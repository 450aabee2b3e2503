"""Models that Liger or `kernelize` patched before us or patch after us, and other people's forwards."""

from __future__ import annotations

import functools
import json
import pickle
import sys
from types import MethodType

import pytest
import torch
from liger_kernel.transformers import rms_norm as liger_rms_norm
from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, apply_liger_kernel_to_llama
from transformers.models.llama import modeling_llama

import kernels
import rmsnorm_patch
from rmsnorm_patch import UnsupportedModel

HUB_LAYER = """
import torch
import torch.nn as nn

CALLS = []


class FastNorm(nn.Module):
    has_backward = True
    can_torch_compile = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states):
        CALLS.append(self)
        h = hidden_states.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(hidden_states.dtype)
"""
METADATA = {
    "name": "fast-norm",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
    "backend": {"type": "cpu"},
}


@pytest.fixture
def kernelize(tmp_path, monkeypatch):
    """`kernelize(model)` with a layer from a local kernel repository; `kernelize.calls` counts its forwards."""
    kernels.replace_kernel_forward_from_hub(modeling_llama.LlamaRMSNorm, "RMSNorm")
    for name in ("kernel_layer_name", "kernel_condition"):
        value = vars(modeling_llama.LlamaRMSNorm)[name]
        delattr(modeling_llama.LlamaRMSNorm, name)
        monkeypatch.setattr(modeling_llama.LlamaRMSNorm, name, value, raising=False)
    build = tmp_path / "fast-norm" / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(json.dumps({"id": f"fast_norm_{tmp_path.name}", **METADATA}))
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(HUB_LAYER)
    repository = kernels.LocalLayerRepository(tmp_path / "fast-norm", layer_name="FastNorm")

    def run(model):
        with kernels.use_kernel_mapping({"RMSNorm": {"cpu": repository}}, inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
        run.calls = sys.modules[repository.load().__module__].CALLS
        return model

    return run


def test_kernelized_before_us_is_taken_over_and_given_back(small_model, run, ids, snapshot, kernelize):
    expected = run(small_model("llama"), ids)
    model = kernelize(small_model("llama"))
    norm = model.model.norm
    assert norm.forward.__func__.__qualname__ == "FastNorm.forward"
    run(model, ids)
    assert len(kernelize.calls) == 5
    before = snapshot(model)
    report = rmsnorm_patch.apply(model)
    assert len(report.norms) == 5
    kernelize.calls.clear()
    after = run(model, ids)
    assert after.same_as(expected)
    assert kernelize.calls == []
    assert after.kinds == {"norm": 1, "in_layer": 2, "cross_layer": 2, "taken": 2}
    rmsnorm_patch.revert(model)
    assert norm.forward.__func__.__qualname__ == "FastNorm.forward"
    run(model, ids)
    assert len(kernelize.calls) == 5
    again = snapshot(model)
    assert [entry[:3] for entry in again] == [entry[:3] for entry in before]


def test_kernelized_after_us_leaves_us_in_place(small_model, run, ids, kernelize, snapshot):
    model = small_model("llama")
    expected = run(model, ids)
    rmsnorm_patch.apply(model)
    before = snapshot(model)
    kernelize(model)
    assert snapshot(model) == before
    after = run(model, ids)
    assert after.same_as(expected)
    assert kernelize.calls == []
    assert after.kinds["taken"] == 2
    rmsnorm_patch.revert(model)
    kernelize(model)
    run(model, ids)
    assert len(kernelize.calls) == 5


def test_a_kernelized_model_that_we_patched_can_be_pickled(small_model, ids, kernelize):
    model = kernelize(small_model("llama"))
    rmsnorm_patch.apply(model)
    made = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(made(ids).logits, expected)
        rmsnorm_patch.revert(made)
        assert torch.equal(made(ids).logits, expected)
    assert made.model.norm.forward.__func__ is modeling_llama.LlamaRMSNorm.forward


def test_a_kernel_that_a_kernelize_without_conditions_put_over_us_is_honoured(small_model, run, ids, kernelize):
    """Older releases do not ask `kernel_condition`: the instance-level forward wins, in the pairs too."""
    model = small_model("llama")
    expected = run(model, ids)
    rmsnorm_patch.apply(model)
    kernelize(small_model("llama"))
    layer = next(iter(kernels.layer.layer._CACHED_LAYER.values()))
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.forward = MethodType(layer.forward, module)
    kernelize.calls = sys.modules[layer.__module__].CALLS
    kernelize.calls.clear()
    assert run(model, ids).same_as(expected)
    assert len(kernelize.calls) == 5
    rmsnorm_patch.revert(model)
    kernelize.calls.clear()
    assert run(model, ids).same_as(expected)
    assert len(kernelize.calls) == 5


@pytest.fixture
def liger_calls(monkeypatch):
    """Liger's Triton kernel needs a GPU: its arithmetic in torch, and a count of its calls."""
    calls = []

    def apply(x, weight, eps, offset, casting_mode, in_place, row_mode):
        calls.append((eps, offset, casting_mode))
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return (offset + weight) * h.to(x.dtype)

    monkeypatch.setattr(liger_rms_norm.LigerRMSNormFunction, "apply", apply)
    return calls


def _liger(model):
    apply_liger_kernel_to_llama(
        rope=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, model=model
    )


@pytest.fixture
def _liger_undone(monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm)


@pytest.mark.usefixtures("_liger_undone")
def test_liger_before_us_is_taken_over_and_given_back(small_model, run, ids, liger_calls):
    expected = run(small_model("llama"), ids)
    model = small_model("llama")
    _liger(model)
    assert run(model, ids).same_as(expected)
    assert len(liger_calls) == 5
    liger_calls.clear()
    report = rmsnorm_patch.apply(model)
    assert len(report.norms) == 5
    after = run(model, ids)
    assert after.same_as(expected)
    assert liger_calls == []
    assert after.kinds == {"norm": 1, "in_layer": 2, "cross_layer": 2, "taken": 2}
    rmsnorm_patch.revert(model)
    assert run(model, ids).same_as(expected)
    assert len(liger_calls) == 5
    assert model.model.norm.forward.__func__ is liger_rms_norm.LigerRMSNorm.forward


@pytest.mark.usefixtures("_liger_undone")
def test_liger_after_us_is_called(small_model, run, ids, liger_calls):
    model = small_model("llama")
    expected = run(model, ids)
    rmsnorm_patch.apply(model)
    _liger(model)
    assert run(model, ids).same_as(expected)
    assert len(liger_calls) == 5
    rmsnorm_patch.revert(model)
    liger_calls.clear()
    assert run(model, ids).same_as(expected)
    assert len(liger_calls) == 5


def test_a_model_built_with_ligers_class_is_left_alone_with_a_reason(small_model, snapshot, monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", liger_rms_norm.LigerRMSNorm)
    model = small_model("llama")
    assert type(model.model.norm) is liger_rms_norm.LigerRMSNorm
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match="LigerRMSNorm"):
        rmsnorm_patch.apply(model)
    assert snapshot(model) == before


def test_ligers_forward_with_somebodys_own_settings_is_left_alone(small_model, ids, run, liger_calls):
    plain, model = small_model("llama"), small_model("llama")
    for made in (plain, model):
        _patch_rms_norm_module(made.model.norm, offset=1.0, casting_mode="llama")
    expected = run(plain, ids)
    report = rmsnorm_patch.apply(model)
    assert "model.norm" not in report.norms
    [site] = [site for site in report.plan.norms if site.path == "model.norm"]
    assert site.action == "leave"
    assert "LigerRMSNorm.forward" in site.reason
    assert run(model, ids).same_as(expected)


def _squared(self, hidden_states):
    return self.weight * self.weight * hidden_states


@pytest.mark.parametrize("kind", ["method", "function", "partial"])
def test_a_forward_that_nobody_knows_is_left_alone(small_model, run, ids, kind):
    def install(model):
        norm = model.model.layers[1].post_attention_layernorm
        norm.forward = {
            "method": MethodType(_squared, norm),
            "function": lambda x: _squared(norm, x),
            "partial": functools.partial(_squared, norm),
        }[kind]

    plain, before, after = (small_model("llama") for _ in range(3))
    install(plain)
    expected = run(plain, ids)
    install(before)
    report = rmsnorm_patch.apply(before)
    assert len(report.norms) == 4
    [site] = [site for site in report.plan.norms if site.action == "leave"]
    assert site.path == "model.layers.1.post_attention_layernorm"
    assert "instance-level forward" in site.reason
    assert run(before, ids).same_as(expected)
    rmsnorm_patch.apply(after)
    run(after, ids)
    install(after)
    assert run(after, ids).same_as(expected)
    for model in (before, after):
        rmsnorm_patch.revert(model)
        assert run(model, ids).same_as(expected)


def test_a_class_level_patch_made_before_us_is_what_we_follow(small_model, run, ids, monkeypatch):
    """Somebody replaced the class's forward by another correct one: the scan reads what runs."""
    expected = run(small_model("llama"), ids)

    def forward(self, hidden_states):
        h = hidden_states.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(hidden_states.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    model = small_model("llama")
    rmsnorm_patch.apply(model)
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds["taken"] == 2


def test_a_class_level_patch_that_changes_the_arithmetic_is_left_alone(small_model, run, ids, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x.tanh() * self.weight)
    model = small_model("llama")
    with pytest.raises(UnsupportedModel, match="no module that computes an RMSNorm"):
        rmsnorm_patch.apply(model)
