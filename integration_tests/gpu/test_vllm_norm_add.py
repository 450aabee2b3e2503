"""Engines of sandwich layouts on this GPU, whose norms take the adds behind them, and the same with these apart.

The engines are child processes and start together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("vllm", reason="vLLM is not installed here")

LAYERS = 3
TOKENS = 24
PROMPTS = [[5, 70, 101, 108, 111], [40, 98, 105, 32, 97, 32, 110], [72, 105]]
SHAPE = {"hidden_size": 2304, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "head_dim": 64, "pad_token_id": 0}
STD = {"gemma3_text": 0.005, "glm4": 0.02, "olmo2": 0.02}
"""Of weights. With larger ones Gemma's tied embeddings give the last token again, for certain, whatever norms do."""
KINDS = tuple(STD)
SUMS = 2 * LAYERS
"""Residual-adds of a forward. Each takes a norm's result."""
APART = {"gemma3_text": 4 * LAYERS + 1, "glm4": 4 * LAYERS + 1, "olmo2": 2 * LAYERS + 1}
"""Norms of a forward but those of queries and keys, which the compiler keeps at these lengths."""
LEFT = {"gemma3_text": 1, "glm4": 1, "olmo2": 0}
"""Of them those that no add is in front of: the first one of a forward."""
UNTIMED = {"triton.autotune_pointwise": False, "combo_kernels": True, "benchmark_combo_kernel": False}
"""Inductor would time ways to add up a row, and two engines of one graph could then choose differently."""
Answers = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Callable[..., Path], vllm_processes: Any
) -> Iterator[Answers]:
    """`engines("glm4", "auto")`: the answer of integration_tests/vllm_plugin/engine.py."""
    work = tmp_path_factory.mktemp("sandwiches")
    for kind in KINDS:
        random_checkpoint(work / kind, kind, std=STD[kind], **SHAPE)

    def run(kind: str, norm_add: str) -> dict[str, Any]:
        request = {
            "model": str(work / kind),
            "enforce_eager": False,
            "prompts": PROMPTS,
            "max_tokens": TOKENS,
            "engine": {"gpu_memory_utilization": 0.05, "compilation_config": {"inductor_compile_config": UNTIMED}},
        }
        folder = work / f"{kind}-{norm_add}"
        variables = {"RMSNORM_PATCH_VLLM": "auto", "RMSNORM_PATCH_VLLM_NORM_ADD": norm_add}
        answer: dict[str, Any] = vllm_processes.run_engine(request, folder, folder / "cache", **variables)
        return answer

    cases = [(kind, norm_add) for kind in KINDS for norm_add in ("auto", "off")]
    futures: dict[tuple[str, str], Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(max_workers=len(cases)) as pool:
        for case in cases:
            futures[case] = pool.submit(run, *case)
        yield lambda *case: futures[case].result()


@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_for_a_norm_the_add_behind_it_and_the_norm_of_the_sum(kind: str, engines: Answers) -> None:
    joined, apart = engines(kind, "auto"), engines(kind, "off")
    forwards = joined["forwards"]
    assert forwards == apart["forwards"] >= TOKENS
    assert apart["kernels"] == {"rms_norm_rows": APART[kind] * forwards}
    left = {"rms_norm_rows": LEFT[kind] * forwards} if LEFT[kind] else {}
    assert joined["kernels"] == {"rms_norm_add": SUMS * forwards, **left}
    assert apart["launches"] - joined["launches"] >= SUMS * forwards
    assert "in its launch; so do others like it" in joined["log"]
    assert "RMSNORM_PATCH_VLLM_NORM_ADD=off leaves the adds behind norms apart" in apart["log"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_changes(kind: str, engines: Answers) -> None:
    joined, apart = engines(kind, "auto"), engines(kind, "off")
    assert joined["tokens"] == apart["tokens"]
    assert joined["logprobs"] == apart["logprobs"]
    assert max(map(max, joined["logprobs"])) < -0.5  # no token is certain
