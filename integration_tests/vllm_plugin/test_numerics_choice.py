"""Whose numerics an engine gets: the variable, what transformers' modules compute, when they are refused. No vLLM."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, T5
from rmsnorm_patch.scan.plan import NormSite
from rmsnorm_patch.vllm_plugin import calls, huggingface, oot_route, settings
from rmsnorm_patch.vllm_plugin.decision import Facts, decide

FAMILIES = {
    "llama": ("LlamaForCausalLM", "rmsnorm_patch_hf_llama", False),
    "qwen3": ("Qwen3ForCausalLM", "rmsnorm_patch_hf_llama", False),
    "mistral": ("MistralForCausalLM", "rmsnorm_patch_hf_llama", False),
    "gemma3_text": ("Gemma3ForCausalLM", "rmsnorm_patch_hf_olmo", True),
    "olmo2": ("Olmo2ForCausalLM", "rmsnorm_patch_hf_olmo", False),
}


def _config(model_type: str, architecture: str, **fields: Any) -> Any:
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**sizes, **heads, **fields})
    config.architectures = [architecture]
    return config


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_the_modules_of_a_model_compute(model_type: str) -> None:
    architecture, provider, adds_one = FAMILIES[model_type]
    found = huggingface.numerics_of(_config(model_type, architecture, rms_norm_eps=3e-6))
    assert found.provider == provider
    assert architecture in found.reason
    assert {(norm.eps, norm.adds_one) for _, norm in found.norms} == {(3e-6, adds_one)}
    last = found.of("model.norm", 96, True)
    assert last is not None
    assert found.of("language_model.model.norm", 96, True) == last  # a wrapper's path: by the length
    assert found.of("model.norm", 95, True) is None
    assert found.of("model.norm", 96, False) is None  # one without a weight is another norm


def test_the_process_is_left_as_it_was() -> None:
    """vLLM asks under its own default dtype, and with a seed of its own."""
    config = _config("llama", "LlamaForCausalLM", rms_norm_eps=5e-6)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = huggingface.numerics_of(config)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.provider == "rmsnorm_patch_hf_llama"
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_be_known_is_said() -> None:
    found = huggingface.numerics_of(_config("llama", "NobodysForCausalLM"))
    assert (found.provider, found.norms) == ("", ())
    assert "has no model class 'NobodysForCausalLM'" in found.reason
    found = huggingface.numerics_of(_config("llama", "LlamaForCausalLM", hidden_act="nobodys"))
    assert found.provider == ""
    assert "cannot build LlamaForCausalLM (KeyError" in found.reason


def test_a_model_without_an_rms_norm_is_said() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    config.architectures = ["GPT2LMHeadModel"]
    assert "no module that computes an RMSNorm" in huggingface.numerics_of(config).reason
    assert "cannot be read" in huggingface.numerics_of(SimpleNamespace()).reason


def _site(path: str, name: str, spec: Any) -> NormSite:
    return NormSite(path, name, spec, "fuse", "", 64, "bfloat16", "eps", (), "weight")


def test_classes_that_no_provider_computes() -> None:
    def judged(*specs: Any) -> huggingface.Numerics:
        return huggingface.judge(tuple(_site(f"n{i}", f"Norm{i}", spec) for i, spec in enumerate(specs)), "a model")

    assert judged(LLAMA, T5).provider == "rmsnorm_patch_hf_llama"  # alike for weights of the rows' dtype
    assert "round in different places (Norm0 and Norm1)" in judged(LLAMA, GEMMA).reason
    assert "in the weight's dtype" in judged(replace(GEMMA, weight_offset="weight_dtype")).reason
    assert "groups of 8 columns" in judged(replace(LLAMA, group=8)).reason
    assert "spec.output='promote'" in judged(replace(GEMMA, output="promote")).reason
    assert judged(LLAMA, None, replace(LLAMA, has_weight=False)).norms[1][1].columns is None


CUDA = Facts("auto", "0.32.0", has_ir=True, has_oot=True, device_type="cuda", compiled=True, capability=90)
KNOWN = huggingface.Numerics("rmsnorm_patch_hf_llama", "transformers 5, LlamaForCausalLM: LlamaRMSNorm")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compiled": False, "incumbents": ("vllm_c", "native")},
        {"requested": "oot"},
        {"tensor_parallel": 2},
        {"quantization": "fp8"},
        {"fusions": ("fuse_allreduce_rms",), "compiled": False},
    ],
)
def test_an_engine_gets_the_numerics_of_transformers(changes: dict[str, Any]) -> None:
    decision = decide(replace(CUDA, transformers=KNOWN, **changes))
    assert (decision.provider, decision.numerics, decision.refused) == (KNOWN.provider, KNOWN.reason, "")
    assert f"numerics of {KNOWN.reason}" in str(decision)


@pytest.mark.parametrize(
    ("changes", "provider", "refused"),
    [
        ({"transformers": huggingface.Numerics("", "no such class")}, "rmsnorm_patch", "no such class"),
        ({"fusions": ("fuse_allreduce_rms",)}, "rmsnorm_patch", "passes fuse_allreduce_rms take norms"),
        ({"requested": "off"}, "", "RMSNORM_PATCH_VLLM=off"),
        ({"incumbents": ("oink",)}, "", "begins with 'oink'"),
    ],
)
def test_the_engines_numerics_where_those_cannot_be_had(changes: dict[str, Any], provider: str, refused: str) -> None:
    decision = decide(replace(CUDA, **{"transformers": KNOWN, **changes}))
    assert (decision.provider, decision.numerics) == (provider, "")
    assert refused in decision.refused


def test_nothing_is_refused_where_nothing_was_asked() -> None:
    for changes in ({}, {"fusions": ("fuse_allreduce_rms",)}, {"quantization": "fp8"}):
        decision = decide(replace(CUDA, **changes))
        assert (decision.numerics, decision.refused) == ("", "")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "engine"), ("", "engine"), ("engine", "engine"), (" HuggingFace ", "huggingface")]
)
def test_values(value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMSNORM_PATCH_VLLM_NUMERICS", raising=False)
    if value is not None:
        monkeypatch.setenv("RMSNORM_PATCH_VLLM_NUMERICS", value)
    assert settings.read_numerics() == expected
    assert vllm_plugin.describe().numerics == expected


def test_a_bad_value_names_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_NUMERICS", "torch")
    told = "RMSNORM_PATCH_VLLM_NUMERICS: got 'torch'; supported: engine, huggingface; next: "
    with pytest.raises(UnsupportedInput, match=told):
        settings.check()
    assert told in vllm_plugin.describe().reason


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize(
    ("provider", "served"),
    [("rmsnorm_patch_hf_olmo", "rmsnorm_patch_hf_olmo"), ("rmsnorm_patch_hf_llama", "rmsnorm_patch")],
)
def test_the_class_of_1_plus_w_follows_where_its_provider_computes_that(
    provider: str, served: str, parallel: int
) -> None:
    """Else it has the engine's numerics, and is no norm of transformers in the count. The all-reduce fusion, for which
    the class stands aside where somebody turned it on, is off."""
    decision = decide(replace(CUDA, transformers=replace(KNOWN, provider=provider), tensor_parallel=parallel))
    norm = object.__new__(oot_route._OffsetNorm)
    assert norm._provider_of(decision) == served
    spec = calls.spec_of(norm._provider_of(decision), True, None, norm.rmsnorm_patch_offset)
    assert (spec.round_before_weight, spec.weight_offset) == ("none", "fp32")
    assert spec.sum == ("fp32" if served == "rmsnorm_patch" else "rounded")
    fused = replace(CUDA, requested="ir", tensor_parallel=parallel, fusions=("fuse_allreduce_rms",))
    assert decide(fused).offset is (parallel == 1)
