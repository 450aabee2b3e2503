"""Every command on the shipped checkpoints: what it says, and that --json writes one document and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_bench_reports_both_sides(command, tiny_llama: Path) -> None:
    ended = command("bench", tiny_llama, "--rounds", 1, "--max-new-tokens", 4, "--batch-size", 2, "--json")
    found = ended.document
    assert [row["work"] for row in found["results"]] == ["decode", "prefill"]
    for row in found["results"]:
        assert row["ratio"] == pytest.approx(row["patched"]["median"] / row["stock"]["median"])
    if not torch.cuda.is_available():
        assert "no speed-up" in found["note"]


def test_dtype_option_changes_the_model(command, tiny_llama: Path) -> None:
    assert command("verify", tiny_llama, "--dtype", "float32", "--json").document["dtype"] == "float32"


def test_env_names_every_backend_with_a_reason(command) -> None:
    found = command("env", "--json").document
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert {b["name"] for b in cpu["backends"]} == {"reference", "triton", "cuda"}
    assert all(b["reason"] for b in cpu["backends"] if not b["available"])
    assert cpu["auto"] == "reference"
    assert found["versions"]["torch"] == torch.__version__
    assert command("env").status == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "dependent on NVIDIA sm_90 and newer"),
        ("off", "plain"),
        ("maybe", "RMSNORM_PATCH_PDL: got 'maybe'; supported: 'auto', 'off' or unset"),
    ],
)
def test_env_says_how_kernels_are_launched(
    command, monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    if value is None:
        monkeypatch.delenv("RMSNORM_PATCH_PDL", raising=False)
    else:
        monkeypatch.setenv("RMSNORM_PATCH_PDL", value)
    assert said in command("env", "--json").document["launches"]
    assert "kernel launches" in command("env").stdout


def test_env_asks_a_vllm_that_is_not_here(command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_patch import vllm_plugin

    monkeypatch.setattr(vllm_plugin, "installed", lambda: None)
    found = command("env", "--vllm-model", tiny_llama, "--vllm-arg=--enforce-eager", "--json").document["engine"]
    assert found["arguments"] == [str(tiny_llama), "--enforce-eager"]
    assert found["error"] == "vLLM is not installed"
    assert "vLLM is not installed" in command("env", "--vllm-model", tiny_llama).stdout
    assert command("env", "--vllm-arg=--enforce-eager").status == 2


def test_cache_commands(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged artefact is shown, found by `verify` with status 1, and gone after `clear`."""
    from rmsnorm_patch import cache

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


def test_help_is_quick_to_import(repository: Path) -> None:
    """`--help` needs no transformers."""
    code = "import sys, rmsnorm_patch.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0


def _copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _library_words() -> set[str]:
    from pydoc_data.topics import topics

    return {word.strip(".,()`'\":;*").lower() for text in topics.values() for word in text.split()}
