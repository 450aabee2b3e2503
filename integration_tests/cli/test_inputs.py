"""Folders of every kind of model on the command line: text, encoders and decoders, classifiers, images, sounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from rmsnorm_patch.cli.inputs import model_inputs
from rmsnorm_patch.cli.output import UNSUPPORTED

TEXT = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 100}
START = {"decoder_start_token_id": 0}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
PATCHES = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "window_size": 16,
    "fullatt_block_indexes": [0],
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
SOUND = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
    "max_source_positions": 16, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
GRID = {"vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93, "image_token_id": 90}


def seen(text: type, vision: type, **fields: Any) -> dict[str, Any]:
    return {"text_config": text(**TEXT), "vision_config": vision(**VISION), "image_token_id": 90, **fields}


def heard(text: type, **fields: Any) -> dict[str, Any]:
    return {"text_config": text(**TEXT).to_dict(), "audio_config": SOUND, **fields}


TAKEN = {"in": {"input_ids"}, "image": {"input_ids", "pixel_values"}, "sound": {"input_ids", "input_features"}}
TAKEN["both"] = {"input_ids", "decoder_input_ids"}
FAMILIES: dict[str, tuple[str, Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "Qwen3Model": ("in", lambda: tf.Qwen3Config(**TEXT), dict),
    "Qwen3ForSequenceClassification": ("in", lambda: tf.Qwen3Config(**TEXT), dict),
    "Qwen3ForTokenClassification": ("in", lambda: tf.Qwen3Config(**TEXT), dict),
    "Gemma3TextModel": ("in", lambda: tf.Gemma3TextConfig(**TEXT), dict),
    "EuroBertForMaskedLM": ("in", lambda: tf.EuroBertConfig(**TEXT), dict),
    "MambaForCausalLM": ("in", lambda: tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100), dict),
    "T5EncoderModel": ("in", lambda: tf.T5Config(**T5), dict),
    "T5ForSequenceClassification": ("in", lambda: tf.T5Config(**T5, **START, eos_token_id=1), dict),
    "T5Model": ("both", lambda: tf.T5Config(**T5, **START), dict),
    "T5ForConditionalGeneration": ("both", lambda: tf.T5Config(**T5, **START), dict),
    "UMT5ForConditionalGeneration": ("both", lambda: tf.UMT5Config(**T5, **START), dict),
    "T5GemmaForConditionalGeneration": (
        "both", lambda: tf.T5GemmaConfig(encoder=dict(TEXT), decoder=dict(TEXT), vocab_size=100), dict
    ),
    "LlavaForConditionalGeneration": ("image", tf.LlavaConfig, lambda: seen(tf.LlamaConfig, tf.CLIPVisionConfig)),
    "Mistral3ForConditionalGeneration": (
        "image", tf.Mistral3Config, lambda: seen(tf.MistralConfig, tf.PixtralVisionConfig, vision_feature_layer=-1)
    ),
    "LlavaNextForConditionalGeneration": (
        "image",
        tf.LlavaNextConfig,
        lambda: seen(tf.LlamaConfig, tf.CLIPVisionConfig, image_grid_pinpoints=[[16, 16]]),
    ),
    "Gemma3ForConditionalGeneration": (
        "image", tf.Gemma3Config, lambda: seen(tf.Gemma3TextConfig, tf.SiglipVisionConfig, mm_tokens_per_image=4)
    ),
    "SmolVLMForConditionalGeneration": (
        "image", tf.SmolVLMConfig, lambda: seen(tf.LlamaConfig, tf.SmolVLMVisionConfig, scale_factor=2)
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "image", tf.Qwen2_5_VLConfig, lambda: {"text_config": {**TEXT, **MROPE}, "vision_config": PATCHES, **GRID}
    ),
    "Qwen2AudioForConditionalGeneration": (
        "sound", tf.Qwen2AudioConfig, lambda: heard(tf.Qwen2Config, audio_token_index=90)
    ),
    "VoxtralForConditionalGeneration": ("sound", tf.VoxtralConfig, lambda: heard(tf.LlamaConfig, audio_token_id=90)),
    "GlmAsrForConditionalGeneration": (
        "sound",
        tf.GlmAsrConfig,
        lambda: heard(tf.LlamaConfig, audio_token_id=90, audio_config={**SOUND, "max_position_embeddings": 64}),
    ),
    "Aimv2VisionModel": ("picture", lambda: tf.Aimv2VisionConfig(**VISION), dict),
}  # fmt: skip
TAKEN["picture"] = {"pixel_values"}


def model_of(name: str) -> tuple[str, Any]:
    kind, config, fields = FAMILIES[name]
    torch.manual_seed(0)
    return kind, getattr(tf, name)(config(**fields())).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_folder(command, tmp_path: Path, name: str) -> None:
    """Planned and proved as the class that config.json names; text is continued where there is a head for it."""
    _, model = model_of(name)
    model.save_pretrained(tmp_path)
    ended = command("verify", tmp_path, "--max-new-tokens", 2, "--json")
    assert ended.status == 0, ended.stderr
    proof = ended.document
    assert (proof["model_class"], proof["logits"]["bit_identical"]) == (name, True)
    assert "warning" not in ended.stderr
    plan = command("plan", tmp_path, "--json").document
    assert plan["model_class"] == name
    generates = "input_ids" in inspect.signature(model.forward).parameters and model.can_generate()
    made = command("generate", tmp_path, "--max-new-tokens", 3, "--compare", "--json")
    if generates:
        assert made.document["equal_to_stock"] is True
        assert proof["greedy"]["equal"] is True
    else:
        assert (made.status, made.document["error"]["type"]) == (UNSUPPORTED, "UnsupportedModel")
        assert "no language-model head" in made.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_the_inputs_fit_and_reach_every_part(name: str) -> None:
    """Twice the same from one seed; every norm of a tower of images or sounds runs, and the text's too."""
    kind, model = model_of(name)
    ids = torch.tensor([[3, 5, 90, 7, 4, 11]]) if "input_ids" in TAKEN[kind] else None
    warnings: list[str] = []
    inputs, again = (model_inputs(model, ids, warnings.append) for _ in range(2))
    assert warnings == []
    assert set(inputs) >= TAKEN[kind]
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())
    for part in inspect.signature(model.forward).parameters.keys() & {"mm_token_type_ids", "token_type_ids"}:
        assert kind != "image" or torch.equal(inputs[part], (inputs["input_ids"] == 90).long())
    ran = set()
    for path, module in model.named_modules():
        if "norm" in path.rsplit(".")[-1]:
            module.register_forward_hook(lambda *_, path=path: ran.add(path))
    with torch.no_grad():
        model(**inputs)
    towers = {path.split(".layers")[0] for path in ran}
    assert len(towers) >= (2 if kind in ("image", "sound", "both") else 1), ran


def test_text_alone_where_no_image_can_be_made(command, tmp_path: Path) -> None:
    """Images that come with tiles and a mask of them are not known: said, and the text runs all the same."""
    vision = {**VISION, "attention_heads": 2, "num_hidden_layers": 1, "num_global_layers": 1, "max_num_tiles": 1}
    vision |= {"vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = tf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=90)
    tf.MllamaForConditionalGeneration(config).save_pretrained(tmp_path)
    ended = command("bench", tmp_path, "--rounds", 1, "--max-new-tokens", 2, "--json")
    assert (ended.status, ended.document["prompt_tokens"]) == (0, 64)
    assert "run on text alone" in ended.stderr
    assert ["run on text alone" in text for text in ended.document["warnings"]] == [True]


def test_bench_and_demo_of_an_encoder(command, tmp_path: Path) -> None:
    _, model = model_of("T5EncoderModel")
    model.save_pretrained(tmp_path)
    found = command("bench", tmp_path, "--rounds", 1, "--batch-size", 3, "--json").document
    assert [row["work"] for row in found["results"]] == ["forward"]
    (story,) = command("demo", tmp_path, "--rounds", 1, "--max-new-tokens", 2, "--json").document["checkpoints"]
    assert (story["passed"], story["restored"]) == (True, True)


def test_a_model_that_reads_something_else(command, tmp_path: Path) -> None:
    """Planned all the same; a proof of it needs inputs that only its user has."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.TimesFmConfig(**sizes, head_dim=16)
    tf.TimesFmModelForPrediction(config).save_pretrained(tmp_path)
    assert command("plan", tmp_path).status == 0
    ended = command("verify", tmp_path, "--json")
    assert ended.status == UNSUPPORTED
    assert "past_values" in ended.stderr
