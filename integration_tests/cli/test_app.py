"""Every command on the shipped checkpoints: what it says, and that --json writes one document and nothing else."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForSequenceClassification, Qwen3ForTokenClassification

from rmsnorm_patch.rewrite import norms

LAYERS = 4


def test_plan_counts_every_norm_and_pair(command, checkpoint: Path) -> None:
    plan = command("plan", checkpoint, "--json").document
    assert plan["counts"] == {
        "norm/fuse": 2 * LAYERS + 1,
        "in_layer/fuse": LAYERS,
        "cross_layer/fuse": LAYERS - 1,
        "final/fuse": 1,
    }
    eps = json.loads((checkpoint / "config.json").read_text())["rms_norm_eps"]
    assert {site["spec"]["eps"] for site in plan["norms"]} == {eps}


def test_plan_table_folds_layers(command, tiny_llama: Path) -> None:
    ended = command("plan", tiny_llama)
    assert ended.status == 0
    assert "[0-3]" in ended.stdout
    assert "fuse" in ended.stdout


def test_include_and_exclude(command, tiny_llama: Path) -> None:
    filters = ("--include", "model.layers.*", "--exclude", "model.layers.1.*")
    plan = command("plan", tiny_llama, "--json", *filters).document
    fused = {site["path"] for site in plan["norms"] if site["action"] == "fuse"}
    names = ("input_layernorm", "post_attention_layernorm")
    assert fused == {f"model.layers.{i}.{name}" for i in (0, 2, 3) for name in names}


def test_verify_proves_and_counts(command, checkpoint: Path) -> None:
    proof = command("verify", checkpoint, "--json", "--device", "cpu").document
    assert proof["passed"] is True
    assert proof["logits"]["bit_identical"] is True
    assert proof["fired"]["fused"] == proof["fired"]["expected"] == 2 * LAYERS + 1
    assert proof["fired"]["pairs_fused"] == 2 * LAYERS


def test_verify_repeats_one_site(command, tiny_llama: Path) -> None:
    path = "model.layers.2.post_attention_layernorm"
    proof = command("verify", tiny_llama, "--json", "--site", path, "--seed", 3).document
    assert [site["path"] for site in proof["sites"] if site["measurements"]] == [path]
    assert proof["seed"] == 3


def test_recorded_logits_hold_and_other_weights_do_not(command, tiny_llama: Path, tmp_path: Path) -> None:
    """A recording is met by the same checkpoint; by a checkpoint with one changed norm weight it is not."""
    recording = tmp_path / "logits.safetensors"
    assert command("verify", tiny_llama, "--record", recording).status == 0
    assert command("verify", tiny_llama, "--compare", recording, "--json").document["passed"] is True
    changed = _copied(tiny_llama, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"] *= 1.25
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    ended = command("verify", changed, "--compare", recording, "--json")
    assert ended.status != 0
    assert "error" in ended.document


def test_a_recording_of_another_class_names_both(command, tmp_path: Path) -> None:
    """Whole names: those of one family have their first sixteen letters in common."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    for kind in (Qwen3ForSequenceClassification, Qwen3ForTokenClassification):
        config = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=100)
        kind(config).save_pretrained(tmp_path / kind.__name__)
    recording = tmp_path / "logits"
    assert command("verify", tmp_path / "Qwen3ForSequenceClassification", "--record", recording).status == 0
    ended = command("verify", tmp_path / "Qwen3ForTokenClassification", "--compare", recording, "--json")
    assert ended.status == 3
    assert "got model_class Qwen3ForTokenClassification; " in ended.stderr
    assert "model_class Qwen3ForSequenceClassification; " in ended.stderr


def test_a_full_disk_under_a_recording(command, tiny_llama: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        ended = command("verify", tiny_llama, "--record", tmp_path / "logits", "--max-new-tokens", 0, "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.status == 5, ended.stderr
    assert ended.document["error"]["got"].startswith("SafetensorError")
    assert "Traceback" not in ended.stderr


def test_generate_is_readable_and_equal_to_stock(command, checkpoint: Path) -> None:
    """Greedy text of the trained model is English-like: most of its words occur in the training text's docstrings."""
    found = command("generate", checkpoint, "--prompt", "Return the ", "--compare", "--json").document
    assert found["equal_to_stock"] is True
    assert found["patched"] is True
    assert len(found["tokens"]) == len("Return the ") + 64
    words = found["text"].removeprefix("Return the ").split()[:-1]
    known = set(_library_words())
    assert len(words) >= 5
    assert sum(word.strip(".,()`'\":;*").lower() in known for word in words) >= 0.7 * len(words), found["text"]


def test_generate_stock(command, tiny_llama: Path) -> None:
    arguments = ("generate", tiny_llama, "--json", "--max-new-tokens", 12)
    stock, patched = command(*arguments, "--stock").document, command(*arguments).document
    assert (stock["patched"], patched["patched"]) == (False, True)
    assert stock["tokens"] == patched["tokens"]


def test_stock_can_be_compared_too(command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--stock --compare shows the stock text and holds it against the patched model, not against itself."""
    arguments = ("generate", tiny_llama, "--json", "--max-new-tokens", 6, "--stock", "--compare")
    found = command(*arguments).document
    assert (found["patched"], found["equal_to_stock"]) == (False, True)
    real = norms.take

    def wrong(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        taken = real(norm, x)
        return None if taken is None else -taken

    monkeypatch.setattr(norms, "take", wrong)
    ended = command(*arguments)
    assert (ended.status, ended.document["equal_to_stock"]) == (1, False)
    assert ended.document["tokens"] == found["tokens"]


def test_bench_reports_both_sides(command, tiny_llama: Path) -> None:
    words = ("bench", tiny_llama, "--max-new-tokens", 2, "--batch-size", 2, "--device", "cpu", "--threads", 1)
    found = command(*words, "--rounds", 2, "--json").document
    assert [row["work"] for row in found["results"]] == ["decode", "prefill"]
    for row in found["results"]:
        assert row["ratio"] == pytest.approx(row["patched"]["median"] / row["stock"]["median"])
        assert row["verdict"] in ("faster", "slower", "equal", "too noisy")
    assert "no speed-up" in found["note"]
    assert found["threads"] == 1
    assert "(one round)" in command(*words, "--rounds", 1).stdout


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", "BFLOAT16", "fp32", "half", "float16"])
def test_dtypes_go_by_their_usual_names(command, tiny_llama: Path, name: str) -> None:
    wanted = {"fp32": "float32", "half": "float16", "float16": "float16"}.get(name, "bfloat16")
    words = ("bench", tiny_llama, "--dtype", name, "--device", "cpu:0", "--rounds", 1, "--max-new-tokens", 1)
    found = command(*words, "--json").document
    assert (found["dtype"], found["device"]) == (wanted, "cpu")


def test_a_demo_keeps_what_it_has_when_a_model_is_missing(command, tiny_llama: Path, tmp_path: Path) -> None:
    """Refused before the work on the others, whose documents are whole; the status is that of what went wrong."""
    bad = tmp_path / "nowhere"
    words = ("--device", "cpu", "--rounds", 1, "--max-new-tokens", 2, "--json")
    ended = command("demo", tiny_llama, bad, tiny_llama, *words)
    first, missing, last = ended.document["checkpoints"]
    assert (ended.status, ended.document["passed"]) == (2, False)
    assert (first["passed"], last["passed"]) == (True, True)
    assert (missing["checkpoint"], missing["error"]["type"]) == ("nowhere", "MissingCheckpoint")
    assert ended.stderr.count("no such folder") == 1
    assert ended.stderr.index("no such folder") < ended.stderr.index("applied: ")


def test_dtype_option_changes_the_model(command, tiny_llama: Path) -> None:
    assert command("verify", tiny_llama, "--dtype", "float32", "--json").document["dtype"] == "float32"


def test_cache_commands(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged artefact is shown, found by `verify` with status 1, and gone after `clear`."""
    from rmsnorm_patch.backends.cuda import cache

    monkeypatch.setenv("RMSNORM_PATCH_CACHE_DIR", str(tmp_path / "kernels"))
    for name in ("whole", "damaged"):
        cache.get_or_build(cache.key_of(test=name, at=str(tmp_path)), lambda: b"machine code", {"name": name})
    broken = next(e.path for e in cache.entries() if e.meta.get("name") == "damaged")
    broken.write_bytes(broken.read_bytes()[:-1] + b"!")
    states = [entry["state"] for entry in command("cache", "show", "--json").document["kernels"]]
    assert sorted(state == "ok" for state in states) == [False, True]
    ended = command("cache", "verify", "--json")
    assert ended.status == 1
    assert [entry["key"] for entry in ended.document["damaged"]] == [broken.stem]
    assert command("cache", "clear", "--json").document == {"removed": 1}
    assert command("cache", "show", "--json").document["kernels"] == []


def test_as_a_program(tiny_llama: Path, repository: Path) -> None:
    """`python -m rmsnorm_patch` in its own process: only JSON on stdout, bars and warnings on stderr."""
    words = [sys.executable, "-m", "rmsnorm_patch", "plan", str(tiny_llama), "--json"]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model_class"] == "LlamaForCausalLM"


def _copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _library_words() -> set[str]:
    from pydoc_data.topics import topics

    return {word.strip(".,()`'\":;*").lower() for text in topics.values() for word in text.split()}
