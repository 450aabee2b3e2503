"""Logits recorded to a file and a model held against it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from proof_models import apply_as_kernel, as_kernel, build, honest, prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rmsnorm_patch import UnsupportedInput, UnsupportedModel, VerificationFailed, apply, verify
from rmsnorm_patch.proof import Comparison, compare_logits, record_logits


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "logits.safetensors"
    record_logits(build("llama", torch.bfloat16), [prompts(), prompts(1, 5)], path)
    return path


def test_the_same_model_is_bit_identical(recorded: Path) -> None:
    model = build("llama", torch.bfloat16)
    assert compare_logits(model, recorded).bit_identical
    apply(model)
    found = compare_logits(model, recorded)
    assert found.bit_identical
    assert found.positions == 48 + 5


def test_an_honest_kernel_passes_and_a_wrong_one_does_not(recorded: Path, kernel) -> None:
    kernel(as_kernel(honest))
    model = build("llama", torch.bfloat16)
    apply_as_kernel(model)
    assert compare_logits(model, recorded).passed
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, e + 0.01)))
    with pytest.raises(VerificationFailed) as caught:
        compare_logits(model, recorded)
    assert isinstance(caught.value.proof, Comparison)
    assert caught.value.proof.error > caught.value.proof.allowed
    assert not compare_logits(model, recorded, raise_on_failure=False).passed


def test_the_file_says_what_it_is(recorded: Path) -> None:
    with safe_open(recorded, framework="pt") as opened:
        described, names = opened.metadata(), set(opened.keys())
    assert described["model_class"] == "LlamaForCausalLM"
    assert described["dtype"] == "bfloat16"
    assert described["torch"] == torch.__version__
    assert len(described["config_digest"]) == 64
    assert 1e-4 < float(described["own_error"]) < 1e-1
    assert {"logits.0", "logits.1", "input.0.input_ids", "input.0.attention_mask"} <= names


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: build("qwen3", torch.bfloat16), "model_class"),
        (lambda: build("llama", torch.float32), "dtype"),
        (lambda: build("llama", torch.bfloat16, seed=1), "weights_digest"),
    ],
)
def test_another_model_is_refused(recorded: Path, model, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        compare_logits(model(), recorded)


def test_another_configuration_is_refused(recorded: Path) -> None:
    model = build("llama", torch.bfloat16)
    model.config.rms_norm_eps = 1e-5
    with pytest.raises(UnsupportedModel, match="config_digest"):
        compare_logits(model, recorded)


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "truncated", "text", "foreign", "no logits", "no dtype", "folder"]
)
def test_a_file_that_is_not_a_recording_is_refused(recorded: Path, damage: str) -> None:
    content = recorded.read_bytes()
    tensors = load_file(recorded)
    with safe_open(recorded, framework="pt") as opened:
        described = dict(opened.metadata())
    recorded.unlink()
    if damage == "empty":
        recorded.write_bytes(b"")
    elif damage == "truncated":
        recorded.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        recorded.write_text("{}")
    elif damage == "foreign":
        save_file(tensors, recorded)
    elif damage == "no logits":
        save_file({"input.0.input_ids": tensors["input.0.input_ids"]}, recorded, metadata=described)
    elif damage == "no dtype":
        del described["dtype"]
        save_file(tensors, recorded, metadata=described)
    elif damage == "folder":
        recorded.mkdir()
    with pytest.raises(UnsupportedInput) as caught:
        compare_logits(build("llama", torch.bfloat16), recorded)
    assert caught.value.site == str(recorded)
    assert "record_logits" in caught.value.next_step


def test_verify_records_and_compares(tmp_path: Path) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    path = tmp_path / "logits.safetensors"
    assert any(str(path) in note for note in verify(model, prompts(), record=path).notes)
    assert any("bit-identical to" in note for note in verify(model, prompts(), compare=path).notes)
