"""What users get wrong: a typed message with site, got, supported and next step, an exit status, nothing half done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

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


def change(path: Path, **fields: Any) -> None:
    """Fields of a JSON file; None takes one away."""
    found = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@pytest.fixture
def shards(copy: Path) -> Path:
    """The same checkpoint in several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="600KB")
    assert len(list(copy.glob("*-of-*.safetensors"))) > 2
    return copy


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*-of-*.safetensors"))


def lose_a_weight(folder: Path) -> None:
    weights = load_file(first_shard(folder))
    weights.popitem()
    save_file(weights, first_shard(folder), metadata={"format": "pt"})


INDEX = "model.safetensors.index.json"


def in_its_place(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def dangling(path: Path) -> None:
    """As in a cache of downloads whose blobs are gone."""
    path.symlink_to("nowhere")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def place_norm(folder: Path, place: str) -> None:
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map={**placed, "model.norm.weight": place})


DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "lost shard": (lambda f: first_shard(f).unlink(), ("1 of ", "shards missing", "model-00001-of", "download")),
    "lost index": (lambda f: (f / INDEX).unlink(), ("shards without", INDEX)),
    "cut index": (lambda f: (f / INDEX).write_text('{"weight_map": {'), (INDEX, "no JSON")),
    "listed index": (lambda f: (f / INDEX).write_text("[]"), (INDEX, "a JSON list")),
    "empty index": (lambda f: (f / INDEX).write_text("{}"), (INDEX, "no weight_map")),
    "odd index": (lambda f: change(f / INDEX, weight_map={"a": 1}), (INDEX, "weight_map")),
    "other index": (lose_a_weight, (INDEX, "not in the shard it names")),
    "cut shard": (lambda f: os.truncate(first_shard(f), 5000), ("model-00001-of", "damaged weights")),
    "pointer": (
        lambda f: first_shard(f).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("Git LFS pointer", "git lfs pull"),
    ),
    "config in another encoding": (
        lambda f: (f / "config.json").write_bytes((f / "config.json").read_text().encode("utf-16")),
        ("config.json", "no JSON"),
    ),
    "config with a mark in front": (
        lambda f: (f / "config.json").write_text("\ufeff" + (f / "config.json").read_text()),
        ("config.json", "no JSON", "BOM"),
    ),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), ("config.json", "no JSON")),
    "invalid value": (lambda f: change(f / "config.json", hidden_size="wide"), ("config.json", "hidden_size")),
    "values that do not fit": (lambda f: change(f / "config.json", num_key_value_heads=0), ("config.json", "llama")),
    "unknown activation": (lambda f: change(f / "config.json", hidden_act="nosuch"), ("config.json", "nosuch")),
    "fewer layers": (
        lambda f: change(f / "config.json", num_hidden_layers=2),
        ("that config.json does not name", "model.layers.2"),
    ),
    "no layers": (lambda f: change(f / "config.json", num_hidden_layers=0), ("does not name", "model.layers.0")),
    "cut generation_config": (lambda f: (f / "generation_config.json").write_text('{"a'), ("generation_config.json",)),
    "more layers": (lambda f: change(f / "config.json", num_hidden_layers=6), ("missing", "model.layers.4")),
    "smaller vocabulary": (lambda f: change(f / "config.json", vocab_size=64), ("64 embeddings", "vocab_size")),
    "larger vocabulary": (lambda f: change(f / "config.json", vocab_size=300), ("of other shapes", "config.json")),
    "FIFO for a config": (lambda f: in_its_place(f / "config.json", os.mkfifo), ("config.json", "no regular file")),
    "folder for a config": (lambda f: in_its_place(f / "config.json", os.mkdir), ("config.json", "a folder")),
    "FIFO for generation": (lambda f: in_its_place(f / "generation_config.json", os.mkfifo), ("no regular file",)),
    "FIFO for a shard": (lambda f: in_its_place(first_shard(f), os.mkfifo), ("1 of ", "shards missing")),
    "link of an index": (lambda f: in_its_place(f / INDEX, dangling), (INDEX, "a link that leads nowhere")),
    "circle of links": (lambda f: in_its_place(f / INDEX, circle), (INDEX, "a link that leads nowhere")),
    "shard elsewhere": (lambda f: place_norm(f, str(f.resolve() / first_shard(f).name)), ("1 of ", "shards missing")),
    "shard of no name": (lambda f: place_norm(f, "x" * 4000), ("1 of ", "shards missing")),
    "index without metadata": (lambda f: change(f / INDEX, metadata=None), (INDEX, "no metadata")),
    "index of listed metadata": (lambda f: change(f / INDEX, metadata=[1]), (INDEX, "no metadata")),
    "half an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ("adapter_config.json", "beside it")),
    "words for a count": (
        lambda f: change(f / "generation_config.json", max_new_tokens="many"), ("generation_config.json", "settings"),
    ),
    "cut tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"version"'), ("unreadable tokenizer",)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(command, shards: Path, damage: str) -> None:
    """Each its own diagnosis, and the status of a damaged checkpoint."""
    done, words = DAMAGES[damage]
    done(shards)
    refused(command("plan", shards, "--json"), DAMAGED, "BrokenCheckpoint", *words)


def test_shards_are_whole_as_they_were(command, shards: Path) -> None:
    assert command("plan", shards, "--json").document["counts"]["norm/fuse"] == 9


@pytest.mark.parametrize(
    ("make", "shown"), [(os.mkfifo, "no regular file"), (os.mkdir, "a folder"), (dangling, "link")]
)
def test_what_is_no_file_in_place_of_the_weights(command, copy: Path, make: Callable, shown: str) -> None:
    """To open a FIFO would wait for ever."""
    in_its_place(copy / "model.safetensors", make)
    refused(command("plan", copy, "--json"), DAMAGED, "BrokenCheckpoint", "model.safetensors", shown)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("adapter_config.json", "PEFT adapter"), ("model_index.json", "diffusers pipeline"), ("x.gguf", "x.gguf")],
)
def test_folders_of_another_kind(command, copy: Path, name: str, shown: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_text("{}")
    refused(command("plan", copy, "--json"), USAGE, "MissingCheckpoint", shown)


def test_weights_of_another_name(command, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model.fp16.safetensors")
    refused(command("plan", copy, "--json"), USAGE, "MissingCheckpoint", "model.fp16.safetensors")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "nosuch"])
def test_quantised_without_its_library(command, copy: Path, method: str) -> None:
    change(copy / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    refused(command("plan", copy, "--json"), UNSUPPORTED, "UnsupportedModel", method, "quantised", "install")


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=100, tie_word_embeddings=False)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def drop(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_embedding_model_saved_under_a_language_models_name(command, qwen: Path) -> None:
    """As Qwen3-Embedding: config.json says ForCausalLM, the weights have no lm_head. Nothing is filled in."""
    drop(qwen, "lm_head.weight")
    ended = command("plan", qwen, "--json")
    assert (ended.status, ended.document["model_class"]) == (0, "Qwen3Model")
    assert "no language-model head (lm_head.weight)" in ended.stderr
    assert command("verify", qwen).status == 0
    refused(command("generate", qwen, "--json"), UNSUPPORTED, "UnsupportedModel", "no language-model head")


def test_a_head_and_more_missing_is_damage(command, qwen: Path) -> None:
    drop(qwen, "lm_head.weight")
    drop(qwen, "model.layers.1.mlp.up_proj.weight")
    refused(command("plan", qwen, "--json"), DAMAGED, "BrokenCheckpoint", "up_proj")


def test_a_reward_model_without_its_head_is_damage(command, qwen: Path) -> None:
    change(qwen / "config.json", architectures=["Qwen3ForSequenceClassification"])
    refused(command("plan", qwen, "--json"), DAMAGED, "BrokenCheckpoint", "score.weight")


def test_weights_beside_the_model_are_said_and_left(command, qwen: Path) -> None:
    """A language-model head under an encoder, a value head beside a language model."""
    change(qwen / "config.json", architectures=["Qwen3Model"])
    ended = command("plan", qwen, "--json")
    assert (ended.status, ended.document["model_class"]) == (0, "Qwen3Model")
    assert "1 weights" in ended.stderr
    assert "lm_head.weight" in ended.stderr


@pytest.mark.parametrize("named", [None, ["NoSuchModel"], [], ["Qwen3Config"], ["Qwen2Tokenizer"], [5]])
def test_a_class_that_is_not_known_here(command, qwen: Path, named: list[str] | None) -> None:
    change(qwen / "config.json", architectures=named)
    assert command("plan", qwen, "--json").document["model_class"] == "Qwen3ForCausalLM"


def test_weights_inside_a_layer_that_are_not_named(command, qwen: Path) -> None:
    """A bias that the configuration leaves out would be missing from every answer."""
    weights = load_file(qwen / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    refused(command("plan", qwen, "--json"), DAMAGED, "BrokenCheckpoint", "q_proj.bias")


def test_weights_of_a_part_that_the_model_has_not(command, qwen: Path) -> None:
    """Layers that predict several tokens ahead, which transformers does not build: said, not refused."""
    weights = load_file(qwen / "model.safetensors")
    weights["mtp.layers.0.norm.weight"] = torch.ones(32)
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    ended = command("plan", qwen, "--json")
    assert ended.status == 0
    assert "mtp.layers.0.norm.weight" in ended.document["warnings"][0]


def test_shards_in_a_folder_below(command, shards: Path) -> None:
    """An index may name files in folders; one outside is missing."""
    (shards / "below").mkdir()
    first = first_shard(shards)
    first.rename(shards / "below" / first.name)
    placed = json.loads((shards / INDEX).read_text())["weight_map"]
    for place, status in (("below", 0), ("../model/below", DAMAGED)):
        change(shards / INDEX, weight_map={w: f"{place}/{f}" if f == first.name else f for w, f in placed.items()})
        assert command("plan", shards, "--json").status == status


def test_a_tokenizer_beyond_the_vocabulary(command, qwen: Path, tiny_llama: Path) -> None:
    """A byte of 255 for a model with 100 embeddings: on a GPU the process would die of it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, qwen / name)
    refused(command("verify", qwen, "--json"), DAMAGED, "BrokenCheckpoint", "tokenizer", "100 embeddings")


def test_a_prompt_in_another_encoding(command, tiny_llama: Path) -> None:
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")
    for name in ("generate", "verify", "bench"):
        refused(command(name, tiny_llama, "--prompt", prompt, "--json"), USAGE, "UnsupportedInput", "--prompt", "UTF-8")


@pytest.mark.parametrize(
    "words", [["--prompt", ""], ["--device", "tpu"], ["--compare", "nowhere"], ["--backend", "cuda"]]
)
def test_known_before_the_weights_are_read(command, tiny_llama: Path, monkeypatch, words: list[str]) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", never)
    named = "backend='cuda'" if "--backend" in words else words[0]
    words = ["--device", "cpu", *words]
    refused(command("verify", tiny_llama, *words, "--json"), USAGE, "UnsupportedInput", named)


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
