"""An engine of SGLang with our plugin and without it: who serves its norms, and what it answers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"),
]

PROMPTS = [[84, 104, 101, 32, 114, 105, 118, 101, 114], [79, 110, 99, 101], [65, 110, 100, 32, 116, 104, 101, 110]]
NEW_TOKENS = 24
LOGPROB = 0.06
"""Largest difference of a log-probability before tokens part: the kernels add a row's squares in another order."""
SERVED = re.compile(r"rmsnorm_patch: (\w+) of (\d+) columns is served")
FIELDS = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
Engine = Callable[[str, bool, bool], tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def engine(
    repository: Path, random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """`engine(model type, graphs, patched)`: (what it answered, its log). Each is started once."""
    sys.path.insert(0, str(repository / "scripts"))
    program = importlib.import_module("benchlib.sglang_engine")
    sys.path.pop(0)

    @functools.cache
    def start(model_type: str, graphs: bool, patched: bool) -> tuple[dict[str, Any], str]:
        folder = tmp_path_factory.mktemp("sglang")
        model = random_checkpoint(folder / "model", model_type, std=0.08, head_dim=128, **FIELDS)
        captured = {"cuda_graph_bs_decode": [1, 4]} if graphs else {"disable_cuda_graph": True}
        arguments = {"model_path": str(model), "mem_fraction_static": 0.2, **captured}
        job = {"engine": arguments, "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "steps": {}, "rounds": 0}
        return program.answer(job, patched, folder)

    return start


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    ("model_type", "functions"),
    [("llama", {"rmsnorm", "fused_add_rmsnorm"}), ("gemma2", {"gemma_rmsnorm", "gemma_fused_add_rmsnorm"})],
)
def test_an_engine_answers_the_same_with_our_kernels(
    engine: Engine, model_type: str, functions: set[str], graphs: bool
) -> None:
    stock, stock_log = engine(model_type, graphs, False)
    ours, log = engine(model_type, graphs, True)
    assert {name for name, _ in SERVED.findall(log)} == functions
    assert "stays SGLang's own" not in log
    assert not SERVED.search(stock_log)
    if graphs:
        assert re.search(r"[Cc]aptur\w* .*cuda graph", log, flags=re.IGNORECASE)
    for mine, theirs, got, want in zip(
        ours["logprobs"], stock["logprobs"], ours["tokens"], stock["tokens"], strict=True
    ):
        assert len(got) == len(want) == NEW_TOKENS
        same = next((i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), NEW_TOKENS)
        assert same > 0
        assert mine[:same] == pytest.approx(theirs[:same], abs=LOGPROB)
