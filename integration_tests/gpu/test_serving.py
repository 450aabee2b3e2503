"""A proof on a GPU beside requests: eager, generated and from captured graphs, of two models."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import rmsnorm_patch

pytestmark = pytest.mark.gpu


def eager(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(tokens, use_cache=False).logits


def generated(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


def captured(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Replays with new tokens each time, and back."""
    given, graph = tokens.clone(), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        model(given, use_cache=False)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            logits = model(given, use_cache=False).logits

    def replay() -> torch.Tensor:
        found = []
        for shift in (3, 0):
            given.copy_(tokens + shift)
            graph.replay()
            found.append(logits.clone())
        return torch.stack(found)

    return replay


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_proofs_beside_eight_threads(small_model: Callable[..., PreTrainedModel], backend: str) -> None:
    models = [small_model("llama", torch.bfloat16).cuda(), small_model("qwen3", torch.bfloat16).cuda()]
    for model in models:
        rmsnorm_patch.apply(model, backend=backend)
        rmsnorm_patch.warmup(model)
    kinds = (eager, generated, captured, eager)
    tokens = [torch.arange(1 + n, 9 + 2 * n, device="cuda")[None] for n in range(8)]
    requests = [kinds[n % 4](models[n // 4], tokens[n]) for n in range(8)]
    with torch.inference_mode():
        wanted = [request() for request in requests]
    torch.cuda.synchronize()
    ended, wrong, answers = threading.Event(), [], [0] * 8

    def serve(number: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            while not ended.is_set() or not answers[number]:
                if not torch.equal(requests[number](), wanted[number]):
                    wrong.append(f"request {number}, answer {answers[number]}")
                answers[number] += 1

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        proofs = [
            rmsnorm_patch.verify(model, tokens[3], greedy_tokens=4, raise_on_failure=False)
            for model in (*models, *models)
        ]
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert all(answers)
    for proof in proofs:
        assert proof.passed, proof.explain()
        assert proof.fired.pairs_fused == proof.fired.pairs_expected
