"""A hand-over that was rightly not taken is listed with its reason, and is no failure; one without a reason is red."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from proof_models import build, prompts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rmsnorm_patch import UnsupportedModel, VerificationFailed, apply, verify
from rmsnorm_patch.proof import Proof
from rmsnorm_patch.rewrite import layer_calls, norms

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
        "rope_theta": 1e4,
    },
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
IMAGE, ENTRY = 90, "model.language_model.layers.1.input_layernorm"


def qwen3_vl() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model that adds vision features to the residual stream behind its first layer, and inputs with an image."""
    torch.manual_seed(0)
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=TEXT, vision_config=VISION, **tokens)).eval()
    ids = torch.tensor([[1, 5, 6, 7, *[IMAGE] * 4, 8, 9]])
    image = {"pixel_values": torch.randn(16, 12), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    apply(model, backend="reference")
    return model, {"input_ids": ids, **image, "mm_token_type_ids": (ids == IMAGE).int()}


def listed(proof: Proof, path: str) -> str:
    assert proof.passed, proof.explain()
    return next(text for text in proof.fired.fallbacks if text.startswith(path))


def test_another_tensor_reached_the_norm() -> None:
    model, inputs = qwen3_vl()
    proof = verify(model, inputs, greedy_tokens=0)
    assert "1 of 1 residual-adds" in listed(proof, ENTRY)
    assert "another tensor" in listed(proof, ENTRY)
    assert (proof.fired.pairs_fused, proof.fired.pairs_expected) == (5, 6)
    assert not verify(model, inputs, greedy_tokens=0, strict=True, raise_on_failure=False).passed
    text = verify(model, {"input_ids": inputs["input_ids"][:, :4]}, greedy_tokens=0)
    assert text.fired.pairs_fused == text.fired.pairs_expected
    assert text.fired.fallbacks == ()


def test_inference_mode_with_code_in_between() -> None:
    model, inputs = qwen3_vl()
    with torch.inference_mode():
        proof = verify(model, inputs, greedy_tokens=0)
    assert "inference mode" in listed(proof, ENTRY)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_operands_of_two_dtypes(kind: str) -> None:
    """These keep their residual stream in fp32, and hand it over to norms with weights in bf16."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "pad_token_id": 0}
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8} if kind == "mamba2" else {}
    config = AutoConfig.for_model(kind, residual_in_fp32=True, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config).eval().bfloat16()
    apply(model)
    proof = verify(model, prompts(1, 6), greedy_tokens=2)
    assert proof.passed
    assert proof.logits.bit_identical
    assert not proof.fired.fallbacks
    assert proof.fired.pairs_fused == proof.fired.pairs_expected > 0


def mllama() -> nn.Module:
    """With a cross-attention layer, which a forward without an image leaves out."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 128}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1]}
    tiles = {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "image_size": 28, "patch_size": 14}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4, **tiles}
    vision |= {"intermediate_size": 48, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    config = MllamaConfig(text_config={**sizes, **rope, **heads}, vision_config=vision, image_token_index=90)
    model = MllamaForConditionalGeneration(config).eval()
    apply(model, backend="reference")
    return model


def test_a_layer_that_the_model_left_out() -> None:
    proof = verify(mllama(), prompts(1, 8), greedy_tokens=0)
    assert "model.language_model.layers.1 did not run" in listed(proof, "model.language_model.layers.2.input_layernorm")


def test_a_model_that_stops_early() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    model.config.num_hidden_layers = 2  # of three: its loop goes that far
    assert "model.layers.2 did not run" in listed(verify(model, prompts(), greedy_tokens=0), "model.norm")


def test_a_hook_in_between() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    assert "since apply" in listed(verify(model, prompts(), greedy_tokens=0), "model.layers.1.input_layernorm")


def test_a_site_that_moved_since_apply_is_named() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    model.model.layers[0] = nn.Sequential(model.model.layers[0])
    with pytest.raises(UnsupportedModel, match="moved or replaced since apply") as caught:
        verify(model, prompts())
    assert caught.value.site == "model.layers.0.input_layernorm"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda total: total.clone(), "a copy of the layer's sum"),
        (lambda total: total + 1, "another tensor"),
        (lambda total: total.add_(1), "another tensor"),
    ],
    ids=["copy", "sum", "in place"],
)
def test_an_edit_in_the_loop_itself(edit: Callable, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reached the norm is told from the data, also where nothing on the modules shows it."""
    model = build("llama", torch.bfloat16)
    apply(model)
    right = layer_calls.entry
    first = model.model.layers[1].input_layernorm

    def entry(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return right(norm, edit(x) if norm.weight is first.weight else x)

    function = type(model.model.layers[1]).forward
    while "_rmsnorm_entry" not in function.__code__.co_freevars:
        function = function.__wrapped__
    cell = function.__closure__[function.__code__.co_freevars.index("_rmsnorm_entry")]
    monkeypatch.setattr(cell, "cell_contents", entry)
    fired = verify(model, prompts(), greedy_tokens=0, raise_on_failure=False).fired
    assert fired.passed
    assert any(reason in text and text.startswith("model.layers.1.input_layernorm") for text in fired.fallbacks)


def test_a_norm_that_refuses_the_very_sum_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    monkeypatch.setattr(norms, "take", lambda norm, x: None)
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts())
    assert not caught.value.proof.fired.passed
    assert len(caught.value.proof.fired.missing) == 3


def test_a_layer_that_hands_nothing_over_without_a_reason_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    monkeypatch.setattr(layer_calls.NormKernel, "run", lambda self, norm, a, b, weight, eps: None)
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts())
    assert caught.value.proof.flow.passed
    assert not caught.value.proof.fired.passed
