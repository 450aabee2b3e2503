"""Engines that do more than generate from one model: adapters, drafts, chunks of prompts that were seen before.

Compiled ones with vLLM's whole pipeline, where products and norms are joined: what reads a product beside a norm, and
a second model of the process, must find what it finds in vLLM's own engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter
from answers import check_same_or_near

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

LAYERS = 2
FUSED, JOINED = "fused_add_rms_norm", "rmsnorm_patch::linear_fused_add_rms_norm_"


@pytest.fixture(scope="module")
def adapter(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(checkpoints("shallow-llama"), tmp_path_factory.mktemp("adapter"), std=0.2)


COMPILED = pytest.param(False, id="compiled", marks=pytest.mark.long)
EAGER = pytest.param(True, id="eager")
LOGPROB_TOLERANCE = 0.05
"""As in test_engine.py, where a compiler reorders sums. Eager, on the CPU, the plugin computes what vLLM computes,
operation for operation."""


def _norms(answer: dict[str, Any]) -> Counter[str]:
    return Counter(line["op"] for line in answer["trace"])


@pytest.mark.parametrize("eager", [EAGER, COMPILED])
def test_an_adapter_adds_to_what_a_norm_reads(
    eager: bool, adapter: Path, run_engine: Callable[..., Any], checkpoints: Callable[[str], Path]
) -> None:
    model = checkpoints("shallow-llama")
    asked = {"engine": {"enable_lora": True, "max_lora_rank": 8}, "op_form": True, "whole_compiler": not eager}
    plain = run_engine(model, eager, "off", **asked)
    stock, patched = (run_engine(model, eager, route, adapter=str(adapter), **asked) for route in ("off", "ir"))
    assert stock["tokens"] != plain["tokens"]
    check_same_or_near(patched, stock, eager, LOGPROB_TOLERANCE)
    assert _norms(patched) == {"rms_norm": patched["forwards"], FUSED: 2 * LAYERS * patched["forwards"]}
    assert JOINED not in patched["kernels"]  # the adapter writes into each product before its norm reads it


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
@pytest.mark.parametrize("eager", [EAGER, COMPILED])
def test_drafts_are_judged_as_before(
    eager: bool, method: str, run_engine: Callable[..., Any], checkpoints: Callable[[str], Path]
) -> None:
    """The model drafts for itself: then all of a draft stands, and as many norms run beside its own."""
    model, found = checkpoints("shallow-llama"), {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    drafts = {"method": method, "num_speculative_tokens": 3, **({"model": str(model)} if "model" in method else found)}
    asked = {"engine": {"speculative_config": drafts}, "max_tokens": 16, "op_form": True, "whole_compiler": not eager}
    stock, patched = (run_engine(model, eager, route, **asked) for route in ("off", "ir"))
    check_same_or_near(patched, stock, eager, LOGPROB_TOLERANCE)
    assert patched["forwards"] == stock["forwards"] < asked["max_tokens"]
    passes = patched["forwards"] * (1 + (3 if "model" in method else 0))
    assert _norms(patched) == {"rms_norm": passes, FUSED: 2 * LAYERS * passes}
    if not eager:
        assert patched["kernels"][JOINED] == 2 * LAYERS * passes


def test_chunks_of_prompts_that_were_seen_before(
    run_engine: Callable[..., Any], checkpoints: Callable[[str], Path]
) -> None:
    model, prompt = checkpoints("shallow-llama"), [40, 98, 105, 32, 97, 32, 110] * 8
    chunked = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 16}
    asked = {"engine": chunked, "prompts": [prompt, prompt[:40]], "batches": [[prompt + prompt[:9]]]}
    stock, patched = (run_engine(model, True, route, **asked) for route in ("off", "ir"))
    for ours, theirs in ((patched, stock), (patched["batches"][0], stock["batches"][0])):
        assert (ours["tokens"], ours["logprobs"]) == (theirs["tokens"], theirs["logprobs"])
    assert patched["forwards"] > 8
