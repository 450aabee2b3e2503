"""Engines of vLLM on this GPU with an adapter, and with drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from vllm_engines import DATA, WIDE, Engines, Settings, check_same, started

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("vllm", reason="vLLM is not installed here")

DRAFTS = {
    "tiny-llama-found": {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "tiny-llama-drafted": {"method": "draft_model", "model": str(DATA / "tiny-llama")},
}


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Callable[..., Path], vllm_processes: Any
) -> Iterator[Engines]:
    work = tmp_path_factory.mktemp("beside")
    model = random_checkpoint(work / "wide-llama", "llama", std=0.02, num_hidden_layers=1, **WIDE)
    adapter = write_adapter(model, work / "adapter", std=0.05)
    settings = {
        "wide-llama-adapted": Settings({"enable_lora": True, "max_lora_rank": 8}, {"adapter": str(adapter)}),
        "wide-llama-plain": Settings({"enable_lora": True, "max_lora_rank": 8}),
        **{
            name: Settings({"speculative_config": {**drafts, "num_speculative_tokens": 3}})
            for name, drafts in DRAFTS.items()
        },
    }
    cases = [(name, route, False) for name in ("wide-llama-adapted", *DRAFTS) for route in ("off", "ir")]
    with started(work, [*cases, ("wide-llama-plain", "off", False)], settings, vllm_processes) as engines:
        yield engines


def test_an_adapter_adds_to_what_a_norm_reads(engines: Engines) -> None:
    plain = engines("wide-llama-plain", "off", False)
    stock, patched = (engines("wide-llama-adapted", route, False) for route in ("off", "ir"))
    assert stock["logprobs"] != plain["logprobs"]
    check_same(patched, stock, tokens=False)
    assert patched["kernels"] == {"rms_norm_rows": 3 * patched["forwards"]}  # a product that is written to stays whole


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_are_judged_as_before(name: str, engines: Engines) -> None:
    stock, patched = engines(name, "off", False), engines(name, "ir", False)
    check_same(patched, stock, tokens=False)
    assert stock["kernels"] == {}
    assert sum(patched["kernels"].values()) >= 9 * patched["forwards"]  # of four layers, and the draft's beside them
