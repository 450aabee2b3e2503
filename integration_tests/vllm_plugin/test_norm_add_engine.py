"""Real engines of sandwich layouts through vLLM's whole compile pipeline, on the CPU: which norms take the adds behind
them, and that no bit changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

LAYERS = 2
SHAPE = {"hidden_size": 384, "head_dim": 32, "pad_token_id": 0, "num_hidden_layers": LAYERS}
"""Wider than the norms that the compiler keeps in a model of transformers', whose rows have three dimensions."""
ADD, ADD_NORM = "rmsnorm_patch::rms_norm_add", "rmsnorm_patch::rms_norm_add_rms_norm"
PLAIN, FUSED, WRITTEN = (f"rmsnorm_patch::{name}" for name in ("rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_"))
SANDWICH = {PLAIN: 1, ADD_NORM: 2 * LAYERS}
BEHIND = {ADD: 2 * LAYERS - 1, ADD_NORM: 1}
HIDDEN = {"hide_ir": True}
CASES = [
    ("gemma3_text", "ir", {}, SANDWICH, {PLAIN: 1 + 2 * LAYERS, FUSED: 2 * LAYERS}),
    pytest.param("olmo2", "oot", HIDDEN, BEHIND, {PLAIN: 2 * LAYERS + 1}, marks=pytest.mark.long),
    pytest.param("olmo2", "ir", {}, BEHIND, {PLAIN: 2 * LAYERS + 1}, marks=pytest.mark.long),
    pytest.param("glm4", "oot", HIDDEN, SANDWICH, {PLAIN: 1 + 2 * LAYERS, WRITTEN: 2 * LAYERS}, marks=pytest.mark.long),
]
"""Type of the model, the route, what else its engine is asked for, and our ops of a forward: joined, and apart."""


@pytest.fixture(scope="session")
def sandwiches(work: Path, random_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        folder = work / f"sandwich-{kind}"
        with FileLock(f"{folder}.lock"):
            std = 0.03 if kind == "gemma3_text" else 0.1  # its embeddings are the head, and scaled
            return folder if folder.exists() else random_checkpoint(folder, kind, std=std, **SHAPE)

    return make


@pytest.mark.parametrize(("kind", "route", "more", "together", "alone"), CASES)
def test_norms_take_the_adds_behind_them_and_no_bit_changes(
    kind: str,
    route: str,
    more: dict[str, bool],
    together: dict[str, int],
    alone: dict[str, int],
    sandwiches: Callable[[str], Path],
    run_engine: Any,
) -> None:
    off = {"variables": {"RMSNORM_PATCH_VLLM_NORM_ADD": "off"}}
    joined, apart = (
        run_engine(sandwiches(kind), False, route, op_form=True, whole_compiler=True, **more, **variables)
        for variables in ({}, off)
    )
    for answer, calls in ((joined, together), (apart, alone)):
        ran = {op: count for op, count in answer["kernels"].items() if op.startswith("rmsnorm_patch::")}
        assert ran == {op: count * answer["forwards"] for op, count in calls.items()}
    assert (joined["tokens"], joined["logprobs"]) == (apart["tokens"], apart["logprobs"])
    assert "in its launch; so do others like it" in joined["log"]
    assert "in its launch" not in apart["log"]
    assert "RMSNORM_PATCH_VLLM_NORM_ADD=off leaves the adds behind norms apart" in apart["log"]
    traced = {line["op"] for line in joined["trace"]}
    assert {ADD_NORM.partition("::")[2]} <= traced
