"""A proof beside served requests: every answer is the one without a proof, to the bit, and the proof is green."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
from proof_models import apply_as_kernel, as_kernel, build, honest, prompts

from rmsnorm_patch import UnsupportedInput, VerificationFailed, apply, verify
from rmsnorm_patch.patch_state import is_patched
from rmsnorm_patch.proof.replica import replica
from rmsnorm_patch.rewrite import observe

THREADS, PAUSE = 8, 0.02


def forward(model: nn.Module, number: int) -> Callable[[], torch.Tensor]:
    inputs = prompts(1, 5 + number, seed=number)
    return lambda: model(**inputs).logits


def generation(model: nn.Module, number: int) -> Callable[[], torch.Tensor]:
    inputs = prompts(1, 3 + number, seed=number)
    return lambda: model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


@contextmanager
def served(requests: list[Callable[[], torch.Tensor]]) -> Iterator[list[str]]:
    """Each request again and again in a thread of its own; yields what went wrong. At least one answer of each. Between
    two answers a thread rests: without it a proof waits for the threads most of its time."""
    with torch.inference_mode():
        wanted = [request() for request in requests]
    wrong: list[str] = []
    ended, answers = threading.Event(), [0] * len(requests)

    def serve(number: int) -> None:
        try:
            with torch.inference_mode():
                while not ended.is_set() or not answers[number]:
                    if not torch.equal(requests[number](), wanted[number]):
                        wrong.append(f"request {number}, answer {answers[number]}")
                    answers[number] += 1
                    time.sleep(PAUSE)
        except Exception as error:
            wrong.append(f"request {number}: {type(error).__name__} {error}")

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    try:
        while not all(answers) and not wrong:
            time.sleep(0.01)
        yield wrong
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def two_models() -> tuple[nn.Module, nn.Module]:
    models = build("llama", torch.bfloat16), build("qwen3", torch.bfloat16, seed=1)
    for model in models:
        apply(model)
    return models


@pytest.mark.parametrize("request_kind", [forward, generation])
def test_proofs_beside_eight_threads_of_two_models(request_kind: Callable) -> None:
    """Both models serve, and both are proved at once."""
    models = two_models()
    requests = [request_kind(models[number % 2], number) for number in range(THREADS)]
    proofs: list[object] = []
    with served(requests) as wrong:
        provers = [
            threading.Thread(target=lambda m=model: proofs.append(verify(m, prompts(), greedy_tokens=3)))
            for model in models
        ]
        for prover in provers:
            prover.start()
        for prover in provers:
            prover.join()
    assert wrong == []
    assert len(proofs) == 2
    assert all(proof.passed and proof.flow.reproducible for proof in proofs)
    assert [proof.fired.pairs_fused for proof in proofs] == [proof.fired.pairs_expected for proof in proofs]
    assert not observe.active


def test_a_proof_beside_kernels(kernel: Callable) -> None:
    """The patched arithmetic, which is not the original's, is served throughout."""
    kernel(as_kernel(honest))
    model = build("gemma2", torch.bfloat16)
    apply_as_kernel(model)
    with served([forward(model, number) for number in range(4)]) as wrong:
        assert verify(model, prompts()).passed
    assert wrong == []


def test_a_red_proof_and_an_exception_half_way_leave_the_answers_alone(kernel: Callable) -> None:
    bad = build("llama", torch.bfloat16)
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, 1e-2 if w is bad.model.norm.weight else e)))
    apply_as_kernel(bad)
    with served([forward(bad, number) for number in range(4)]) as wrong:
        with pytest.raises(VerificationFailed):
            verify(bad, prompts())
        with pytest.raises(UnsupportedInput, match="the unpatched model raises"):
            verify(bad, {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 1, 1, 1, 2)})

        def stop(step: str) -> None:
            if "driven" in step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            verify(bad, prompts(), progress=stop)
        assert not observe.active
    assert wrong == []


def test_apply_and_its_proof_beside_requests() -> None:
    """With the reference backend the answers before, during and after are the same bits."""
    model, other = build("llama", torch.bfloat16), build("mixtral", torch.bfloat16)
    apply(other)
    requests = [forward(model, number) for number in range(4)] + [generation(other, number) for number in range(2)]
    with served(requests) as wrong:
        assert apply(model, verify=prompts(), backend="reference").proof.passed
    assert wrong == []
    assert is_patched(type(model.model.norm))


def test_another_model_can_be_patched_while_one_is_proved() -> None:
    """No lock is held while a proof runs."""
    model, other = build("llama", torch.float32), build("qwen3", torch.float32)
    apply(model)
    patched = threading.Event()

    def patch() -> None:
        apply(other)
        patched.set()

    def wait(step: str) -> None:
        if "patched: forward" in step:
            threading.Thread(target=patch).start()
            assert patched.wait(20)

    assert verify(model, prompts(), progress=wait).passed


def test_what_another_thread_does_to_the_model_does_not_reach_the_proof() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    hook = []

    def disturb(step: str) -> None:
        if "patched: forward" in step:
            model.train()
            hook.append(model.model.layers[1].register_forward_hook(lambda module, args, output: output * 2))

    assert verify(model, prompts(), progress=disturb).passed
    assert model.training
    assert len(hook) == 1


def test_a_compiled_model_serves_its_compiled_code_throughout() -> None:
    model = build("llama", torch.float32)
    apply(model)
    served_graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: object) -> Callable:
        def run(*args: object) -> object:
            served_graphs.append(threading.get_ident())
            return graph.forward(*args)

        return run

    compiled = torch.compile(model, backend=backend)
    inputs = prompts(1, 5)

    def request() -> torch.Tensor:
        before = len(served_graphs)
        logits = compiled(**inputs).logits
        assert len(served_graphs) > before, "answered by eager code"
        return logits

    with served([request]) as wrong:
        proof = verify(compiled, prompts(), greedy_tokens=0)
    assert wrong == []
    assert proof.fired.fused == proof.fired.expected == 7


def test_the_model_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    own = {id(module) for module in model.modules()}
    called = []
    real = nn.Module._call_impl

    def call(self: nn.Module, *args: object, **named: object) -> object:
        if id(self) in own:
            called.append(type(self).__name__)
        return real(self, *args, **named)

    monkeypatch.setattr(nn.Module, "__call__", call)
    assert verify(model, prompts()).passed
    assert called == []
    assert {id(p) for p in replica(model).parameters()} == {id(p) for p in model.parameters()}
