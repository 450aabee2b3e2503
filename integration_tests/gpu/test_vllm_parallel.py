"""Tensor-parallel engines of vLLM on two GPUs: every worker runs our kernels, or says why not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import Settings, started

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
pytest.importorskip("vllm", reason="vLLM is not installed here")

LAYERS = 4
ROUTES = [("tiny-llama-tp2", route, False) for route in ("off", "auto", "ir")]
# FlashInfer reduces in these engines. Its other backend needs NVLink multicast, which not every host has.
TWO = Settings({"tensor_parallel_size": 2}, variables={"VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm"})


def test_every_worker_of_a_parallel_engine_runs_our_kernels(tmp_path: Path, vllm_processes: Any) -> None:
    with started(tmp_path, ROUTES, {"tiny-llama-tp2": TWO}, vllm_processes) as engines:
        stock, left_alone, patched = (engines(*case) for case in ROUTES)
    assert patched["tokens"] == left_alone["tokens"] == stock["tokens"]
    assert len(patched["workers"]) == 2, patched["log"]
    for lines in patched["workers"].values():
        calls = Counter(line["op"] for line in lines)
        assert calls["fused_add_rms_norm"] == 2 * LAYERS * calls["rms_norm"] > 0
    assert stock["workers"] == left_alone["workers"] == {}
    for answer in (left_alone, patched):
        assert answer["log"].count("rmsnorm_patch: worker") == 2
    assert left_alone["log"].count("off, vLLM's own norms: tensor parallel") == 2
    assert patched["log"].count("fuse_allreduce_rms is off for them") == 2
