"""Batch-invariant engines: a row, and a request, has the same bits alone and in any batch, eager and captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE, RMS_NORM
from rmsnorm_patch.numerics.spec import NormSpec
from rmsnorm_patch.vllm_plugin.decision import SPECS

pytestmark = pytest.mark.gpu

DATA = Path(__file__).resolve().parent.parent / "data"
BATCHES = (2, 8, 64, 256, 1024, 16384)
EPS = 1e-6


def _results(bound: tuple[ops.Bound, ...], x: torch.Tensor, residual: torch.Tensor, weight: Any) -> tuple[Any, ...]:
    norm, fused, in_place = bound
    found = (norm(x, weight, EPS), *fused(x, residual, weight, EPS))
    written, total = x.clone(), residual.clone()
    in_place(written, total, weight, EPS)
    return (*found, written, total)


@pytest.mark.parametrize("n", [128, 2048, 2880, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("spec", dict.fromkeys(spec.variant for spec in SPECS.values()), ids=str)
def test_a_row_alone_and_in_batches(spec: NormSpec, n: int) -> None:
    bound = tuple(ops.bind(op.name, spec, "cuda") for op in (RMS_NORM, FUSED_ADD, FUSED_ADD_IN_PLACE))
    generator = torch.Generator("cuda").manual_seed(n)
    x, residual = torch.randn(2, max(BATCHES), n, generator=generator, device="cuda").to(torch.bfloat16)
    weight = torch.randn(n, generator=generator, device="cuda").to(torch.bfloat16)
    rows = (0, 1)
    alone = [_results(bound, x[row : row + 1], residual[row : row + 1], weight) for row in rows]
    for size in BATCHES:
        order = torch.randperm(size, generator=generator, device="cuda")
        together = _results(bound, x[order], residual[order], weight)
        for row, expected in zip(rows, alone, strict=True):
            at = int((order == row).nonzero())
            for whole, one in zip(together, expected, strict=True):
                assert torch.equal(whole[at], one[0]), f"row {row} in a batch of {size}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _results(bound, x[:1], residual[:1], weight)
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, alone[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_a_request_alone_and_in_batches(eager: bool, tmp_path: Path, vllm_processes: Any) -> None:
    """Of an engine of VLLM_BATCH_INVARIANT: tokens and logprobs are equal to the bit, and the norms are ours."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    mine = [5, 70, 101, 108, 111, 40, 98]
    others = [[3 + (7 * i + j) % 250 for j in range(4 + i % 23)] for i in range(63)]
    batches = [[*others[: (size - 1) // 2], mine, *others[(size - 1) // 2 : size - 1]] for size in (2, 8, 64)]
    request = {
        "model": str(DATA / "tiny-llama"),
        "enforce_eager": eager,
        "prompts": [mine],
        "batches": [*batches, batches[-1][::-1]],
        "max_tokens": 16,
        "engine": {"gpu_memory_utilization": 0.05, "max_num_seqs": 64, "max_num_batched_tokens": 1024},
    }
    answer = vllm_processes.run_engine(request, tmp_path / "run", tmp_path / "cache", VLLM_BATCH_INVARIANT="1")
    said = [line for line in answer["log"].splitlines() if "rmsnorm_patch" in line or "GRAPH" in line]
    assert "batch-invariant: a row's bits follow from it" in answer["log"]
    alone = answer["tokens"][0], answer["logprobs"][0]
    for prompts, batch in zip(request["batches"], answer["batches"], strict=True):
        at = prompts.index(mine)
        assert (batch["tokens"][at], batch["logprobs"][at]) == alone, f"in a batch of {len(prompts)}"
    for kernels in (answer["kernels"], *(batch["kernels"] for batch in answer["batches"])):
        assert sum(kernels.values()) > 0, (answer["trace_at_start"][:2], said)
        assert "rms_norm_partials" not in kernels
