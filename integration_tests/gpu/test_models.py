"""Whole models on a GPU: patched, proved, generated from, captured in a graph, undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

pytestmark = pytest.mark.gpu

PROMPT = torch.tensor([list(b"Return the value of the named attribute of ")])


def ran(model: PreTrainedModel, tokens: torch.Tensor) -> Counter[str]:
    events: list[observe.Event] = []
    with torch.no_grad(), observe.observing(events.append):
        model(tokens, use_cache=False)
    return Counter(f"{event.kind}/{event.backend}" for event in events)


def test_trained_checkpoints_are_proved(checkpoint: Path, backend: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True).cuda().eval()
    layers = model.config.num_hidden_layers
    tokens = PROMPT.cuda()
    before = model.generate(tokens, max_new_tokens=32, do_sample=False)
    rmsnorm_patch.apply(model, backend=backend)
    proof = rmsnorm_patch.verify(model, tokens, greedy_tokens=32)
    assert proof.passed, proof.explain()
    calls = ran(model, tokens)
    assert calls == {
        f"norm/{backend}": 1,
        f"in_layer/{backend}": layers,
        f"cross_layer/{backend}": layers,
        f"taken/{backend}": layers,
    }
    after = model.generate(tokens, max_new_tokens=32, do_sample=False)
    rmsnorm_patch.revert(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=32, do_sample=False), before)
    assert after.shape == before.shape


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "mixtral", "gpt_oss", "glm4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_families_are_proved(
    small_model: Callable[..., PreTrainedModel], model_type: str, dtype: torch.dtype, backend: str
) -> None:
    model = small_model(model_type, dtype).cuda()
    rmsnorm_patch.apply(model, backend=backend)
    proof = rmsnorm_patch.verify(model, torch.arange(1, 40, device="cuda")[None])
    assert proof.passed, proof.explain()


def test_auto_is_the_cuda_kernels(small_model: Callable[..., PreTrainedModel]) -> None:
    model = small_model("llama", torch.bfloat16).cuda()
    rmsnorm_patch.apply(model)
    assert {name.partition("/")[2] for name in ran(model, torch.arange(1, 9, device="cuda")[None])} == {"cuda"}


def test_attempted_calls_give_the_bits_of_the_guarded_ones(small_model: Callable[..., PreTrainedModel]) -> None:
    """An observer sends every call past the attempt: both ways run the same kernels."""
    model = small_model("llama", torch.bfloat16, num_hidden_layers=4).cuda()
    rmsnorm_patch.apply(model, backend="cuda")
    tokens = torch.arange(1, 40, device="cuda")[None]
    with torch.no_grad():
        model(tokens, use_cache=False)
        attempted = model(tokens, use_cache=False).logits
        with observe.observing(lambda event: None):
            guarded = model(tokens, use_cache=False).logits
    assert torch.equal(attempted, guarded)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_decode_step_is_captured_and_replayed(small_model: Callable[..., PreTrainedModel], model_type: str) -> None:
    model = small_model(model_type, torch.bfloat16).cuda()
    rmsnorm_patch.apply(model)
    rmsnorm_patch.warmup(model)
    tokens = torch.arange(1, 9, device="cuda")[None]
    with torch.no_grad():
        for _ in range(2):
            model(tokens, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(tokens, use_cache=False).logits
        tokens.add_(3)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("form", ["op", "decomposed"])
def test_compiled_whole(
    small_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("RMSNORM_PATCH_COMPILE", form)
    torch._dynamo.reset()
    model = small_model("llama", torch.float32).cuda()
    tokens = torch.arange(1, 40, device="cuda")[None]
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        rmsnorm_patch.apply(model)
        compiled = torch.compile(model.forward, fullgraph=True)
        got = compiled(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_adds_of_two_dtypes_are_tritons_and_are_warmed_up() -> None:
    """Mamba in bf16 keeps its residual stream in fp32. What is taken names who made it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8, "pad_token_id": 0}
    config = AutoConfig.for_model("mamba", residual_in_fp32=True, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval().bfloat16().cuda()
    rmsnorm_patch.apply(model)
    ready = {(made.op, made.dtype, made.residual_dtype) for made in rmsnorm_patch.warmup(model)}
    events: list[observe.Event] = []
    with torch.no_grad(), observe.observing(events.append):
        model(torch.arange(1, 9, device="cuda")[None], use_cache=False)
    mixed = [
        event for event in events if len(event.operands) == 2 and event.operands[0].dtype != event.operands[1].dtype
    ]
    assert mixed
    for event in mixed:
        names = (str(operand.dtype).removeprefix("torch.") for operand in event.operands)
        assert ("fused_add_rms_norm", *names) in ready
        assert event.backend == "triton"
    made = [event.backend for event in events if event.kind == "cross_layer"]
    assert [event.backend for event in events if event.kind == "taken"] == made
