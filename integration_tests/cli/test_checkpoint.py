"""What users get wrong: a typed message with site, got, supported and next step, an exit status, nothing half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from rmsnorm_patch.cli.output import DAMAGED, UNSUPPORTED, USAGE

COMMANDS = ("plan", "verify", "generate", "bench")


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint folder to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refused(ended, status: int, kind: str, *words: str) -> None:
    """The error document, the message on stderr, and both naming what the case is about."""
    assert ended.status == status, ended.stderr
    error = ended.document["error"]
    assert error["type"] == kind
    assert all(error[part] for part in ("site", "got", "supported", "next_step"))
    message = ended.stderr.splitlines()[-1]
    for word in words:
        assert word in message
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_folder(command, name: str, tmp_path: Path) -> None:
    refused(command(name, tmp_path / "nowhere", "--json"), USAGE, "MissingCheckpoint", "nowhere", "no such folder")


def test_hub_name_is_not_fetched(command) -> None:
    refused(command("plan", "gpt2", "--json"), USAGE, "MissingCheckpoint", "nothing is ever downloaded")


def test_a_file_and_an_empty_folder(command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(command("plan", tmp_path / "file", "--json"), USAGE, "MissingCheckpoint", "a file")
    (tmp_path / "empty").mkdir()
    refused(command("plan", tmp_path / "empty", "--json"), USAGE, "MissingCheckpoint", "without config.json")


def test_plain_message_without_json(command, tmp_path: Path) -> None:
    ended = command("plan", tmp_path / "nowhere")
    assert (ended.status, ended.stdout) == (USAGE, "")
    assert ended.stderr.strip().startswith("error: ")


def test_pickled_weights_are_refused(command, copy: Path) -> None:
    torch.save({}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(command("plan", copy, "--json"), USAGE, "MissingCheckpoint", "pytorch_model.bin", "safetensors")


@pytest.mark.parametrize("keep", [0, 5, 2000, -100])
def test_truncated_weights(command, copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(command("plan", copy, "--json"), DAMAGED, "BrokenCheckpoint", str(copy), "damaged weights")


def test_damaged_config(command, copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "lla')
    refused(command("plan", copy, "--json"), DAMAGED, "BrokenCheckpoint", "config.json", "no JSON")


def test_missing_weight_is_not_filled_with_random_numbers(command, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(command("verify", copy, "--json"), DAMAGED, "BrokenCheckpoint", "model.layers.1.mlp.up_proj.weight")


def test_config_of_other_shapes(command, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 640}))
    refused(command("plan", copy, "--json"), DAMAGED, "BrokenCheckpoint", "config.json")


def test_unknown_model_type(command, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "nosuch", "architectures": ["NoSuch"]}))
    refused(command("plan", copy, "--json"), UNSUPPORTED, "UnsupportedModel", "nosuch")


@pytest.mark.parametrize("name", COMMANDS)
def test_model_without_rmsnorm(command, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    ended = command(name, tmp_path / "gpt2", "--json", *(["--max-new-tokens", 2] if name in COMMANDS[2:] else []))
    refused(ended, UNSUPPORTED, "UnsupportedModel", "RMSNorm")


def test_pattern_that_matches_nothing(command, tiny_llama: Path) -> None:
    refused(command("plan", tiny_llama, "--include", "modle.*", "--json"), UNSUPPORTED, "UnsupportedModel", "modle.*")


def test_site_that_the_plan_does_not_have(command, tiny_llama: Path) -> None:
    ended = command("verify", tiny_llama, "--site", "model.nrom", "--json")
    refused(ended, USAGE, "UnsupportedInput", "model.nrom", "model.norm")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "mps"])
def test_device_that_is_not_here(command, tiny_llama: Path, device: str) -> None:
    refused(command("plan", tiny_llama, "--device", device, "--json"), USAGE, "UnsupportedInput", "--device", "cpu")


def test_backend_that_does_not_run_here(command, tiny_llama: Path) -> None:
    ended = command("generate", tiny_llama, "--backend", "cuda", "--device", "cpu", "--json")
    refused(ended, USAGE, "UnsupportedInput", "cuda", "auto")


def test_empty_prompt(command, tiny_llama: Path) -> None:
    refused(command("generate", tiny_llama, "--prompt", "", "--json"), USAGE, "UnsupportedInput", "--prompt")


def test_prompt_without_tokenizer(command, copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    refused(command("generate", copy, "--prompt", "x", "--json"), USAGE, "MissingCheckpoint", "tokenizer")
    assert command("generate", copy, "--max-new-tokens", 2, "--compare", "--json").document["equal_to_stock"] is True


def test_remote_code_runs_only_when_told(command, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint with its own Python: refused without the flag and without touching the code, run with it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    witness = tmp_path / "ran"
    (copy / "modeling_own.py").write_text(
        f"from pathlib import Path\nPath({str(witness)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((copy / "config.json").read_text())
    mapping = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": mapping}))
    refused(command("plan", copy, "--json"), UNSUPPORTED, "UnsupportedModel", "--trust-remote-code")
    assert not witness.exists()
    plan = command("plan", copy, "--trust-remote-code", "--json").document
    assert witness.exists()
    assert (plan["model_class"], plan["counts"]["norm/fuse"]) == ("OwnModel", 9)
