"""The shipped checkpoints: small, safe to load, trained, and what their record says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

LIMIT_BYTES = 4 * 2**20


def test_size_and_types(checkpoint: Path) -> None:
    assert (checkpoint / "model.safetensors").stat().st_size <= LIMIT_BYTES
    assert {p.suffix for p in checkpoint.iterdir()} == {".json", ".safetensors"}
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_trained_norm_weights_left_one(checkpoint: Path) -> None:
    """Else a kernel that forgets the weight would go unnoticed on these models."""
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        norms = [weights.get_tensor(name).float() for name in weights.keys() if "norm" in name]  # noqa: SIM118
    assert len(norms) == 9
    assert all((w - 1).abs().mean() > 0.02 for w in norms)


def test_tokenizer_is_bytes(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    text = "naïve  \n\t'rms' \N{SNOWMAN} \x00"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_mistral_has_grouped_queries(repository: Path) -> None:
    config = json.loads((repository / "integration_tests/data/tiny-mistral/config.json").read_text())
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@torch.inference_mode()
def test_perplexity_means_something(checkpoint: Path) -> None:
    """English prose that is not in the training text costs far less than 8 bits a byte, and reversed much more."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32).eval()
    text = b"This function returns a list of all the names that are defined in the module when it is imported. "

    def bits(data: bytes) -> float:
        ids = torch.tensor([list(data)])
        return model(input_ids=ids, labels=ids).loss.item() / math.log(2)

    assert bits(text) < 2.5
    assert bits(text[::-1]) > bits(text) + 2.0
    record = json.loads((checkpoint / "training.json").read_text())
    assert record["held_out_bits_per_byte_bf16"] < 2.2
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_record_names_the_text(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "training.json").read_text())
    assert len(record["text_sha256"]) == 64
    assert record["seed"] == 0
    assert record["sample"].startswith("The statement ")
    assert pytest.approx(record["bytes_per_step"]) == 16 * 256
