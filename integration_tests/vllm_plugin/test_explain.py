"""`rmsnorm-patch env --vllm-model`: what a real vLLM, configured as for serving, would do with each norm of a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parent.parent / "data"


Explained = Callable[..., dict[str, Any]]


def explain(run: Callable[..., Any], env: dict[str, str], model: Path, *arguments: str) -> dict[str, Any]:
    """As `rmsnorm-patch env` tells it, which asks an interpreter of its own."""
    options = [f"--vllm-arg={argument}" for argument in ("--dtype=bfloat16", *arguments)]
    done = run(["-m", "rmsnorm_patch", "env", "--json", "--vllm-model", str(model), *options], env)
    assert done.returncode == 0, done.stderr[-3000:]
    engine: dict[str, Any] = json.loads(done.stdout)["engine"]
    return engine


@pytest.fixture
def explained(environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]) -> Explained:
    """What that interpreter answers, from a fork of one that has imported vLLM."""

    def ask(model: Path, *arguments: str, **variables: str) -> dict[str, Any]:
        words = ["-m", "rmsnorm_patch.vllm_plugin.explain", str(model), "--dtype=bfloat16", *arguments]
        done = run_program(words, environment(**variables))
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout)
        norms = [[norm[key] for key in ("path", "class", "columns", "served_by")] for norm in answer.pop("norms", ())]
        return {"arguments": words[2:], "norms": norms, "error": "", **answer}

    return ask


def _served(engine: dict[str, Any]) -> Counter[str]:
    return Counter(served for *_, served in engine["norms"])


def test_a_llama(explained: Explained, environment: Any, vllm_processes: Any) -> None:
    compiled = explain(vllm_processes.run_program, environment(), DATA / "tiny-llama")  # as a user's shell starts it
    assert explained(DATA / "tiny-llama") == compiled
    assert (compiled["route"], compiled["provider"], compiled["error"]) == ("ir", "rmsnorm_patch", "")
    assert _served(compiled) == {"rmsnorm_patch (rmsnorm_patch)": 9}
    assert ["model.layers.3.input_layernorm", "RMSNorm", 192, "rmsnorm_patch (rmsnorm_patch)"] in compiled["norms"]
    eager = explained(DATA / "tiny-llama", "--enforce-eager")
    assert eager["compile_mode"] == "NONE"
    assert _served(eager) == {"rmsnorm_patch (rmsnorm_patch_native)": 9}
    off = explained(DATA / "tiny-llama", RMSNORM_PATCH_VLLM="off")
    assert _served(off) == {"vLLM's own norm": 9}
    assert off["reason"] == "RMSNORM_PATCH_VLLM=off"


def test_a_plugin_that_does_not_come_first(explained: Explained) -> None:
    kept_out = explained(DATA / "tiny-llama", VLLM_PLUGINS="other")
    assert "VLLM_PLUGINS" in kept_out["reason"]
    assert (kept_out["route"], _served(kept_out)) == ("none", {"vLLM's own norm": 9})
    native = json.dumps({"rms_norm": ["native"], "fused_add_rms_norm": ["native"]})
    asked = explained(DATA / "tiny-llama", f"--ir-op-priority={native}")
    assert _served(asked) == {"vLLM's own norm: the IR priority was set to begin with 'native'": 9}


def test_norms_over_heads_are_the_compilers(explained: Explained, checkpoints: Any) -> None:
    heads = "the compiler: a norm over heads is fused with its neighbours"
    assert _served(explained(checkpoints("qwen3"))) == {"rmsnorm_patch (rmsnorm_patch)": 5, heads: 4}
    oot = explained(checkpoints("qwen3"), RMSNORM_PATCH_VLLM="oot")
    assert _served(oot) == {"rmsnorm_patch (rmsnorm_patch)": 5, heads: 4}


def test_norms_with_1_plus_w_are_served_by_their_class(explained: Explained, checkpoints: Any) -> None:
    engine = explained(checkpoints("gemma"))
    assert _served(engine) == {"rmsnorm_patch (rmsnorm_patch)": 5}
    assert {name for _, name, *_ in engine["norms"]} == {"PatchedGemmaRMSNorm"}
    engine = explained(checkpoints("gemma"), RMSNORM_PATCH_VLLM_NUMERICS="huggingface")
    assert _served(engine) == {"rmsnorm_patch (rmsnorm_patch_hf_olmo)": 5}


def test_what_vllm_refuses_is_told(environment: Any, run_program: Any, tmp_path: Path) -> None:
    engine = explain(run_program, environment(), tmp_path, "--enforce-eager")
    assert engine["arguments"] == [str(tmp_path), "--dtype=bfloat16", "--enforce-eager"]
    assert engine["norms"] == []
    assert engine["error"]
