"""Attentions on a GPU whose queries and keys are normed in one launch: the bits of a launch each, proved, captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.patch_state import original_class, role_of
from rmsnorm_patch.rewrite import native, observe

pytestmark = pytest.mark.gpu

LAYERS = 2
FORMS = {
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 64},  # a transposed view: rows of two levels
    "olmo2": {"num_key_value_heads": 4},  # the whole width
    "hunyuan_v1_dense": {"head_dim": 128},  # after the rotation
}


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model(request.param, torch.bfloat16, num_hidden_layers=LAYERS, **FORMS[request.param]).cuda()


def apart(model: PreTrainedModel) -> None:
    """Give the attentions their own forwards back: a launch for each norm."""
    for module in model.modules():
        if role_of(module) == "attention":
            module.__class__ = original_class(type(module))


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of a prompt of one sequence and of three, and what follows it."""
    tokens = torch.arange(3, 33, device="cuda").view(3, 10)
    made = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return [model(tokens[:1], use_cache=False).logits, model(tokens, use_cache=False).logits, made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_one_launch_gives_the_bits_of_two(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.to(dtype)
    rmsnorm_patch.apply(model, backend="cuda")
    together = outputs(model)
    status = rmsnorm_patch.status(model)
    assert status.counts()["together"] > 0
    assert status.why_single() == {}
    apart(model)
    for one, two in zip(together, outputs(model), strict=True):
        assert torch.equal(one, two)
    rmsnorm_patch.revert(model)


def test_they_are_proved(model: PreTrainedModel) -> None:
    rmsnorm_patch.apply(model)
    proof = rmsnorm_patch.verify(model, torch.arange(1, 40, device="cuda")[None])
    assert proof.passed, proof.explain()
    assert proof.fired.together == proof.fired.together_expected == 2 * LAYERS


def test_launcher_c_serves_them_after_the_first_call(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_patch.rewrite import query_key

    rmsnorm_patch.apply(model)
    outputs(model)
    if native.query_key is native._declined:
        pytest.skip("launcher.c is not in use")
    monkeypatch.setattr(query_key, "_query_key", lambda *operands: pytest.fail("launcher.c declined"))
    token, events = torch.full((1, 1), 5, device="cuda"), Counter()
    with torch.no_grad(), observe.observing(lambda event: events.update([f"{event.kind}/{event.backend}"])):
        model(token, use_cache=False)
    assert events["together/cuda"] == 2 * LAYERS


def test_a_step_is_captured_and_replayed(model: PreTrainedModel) -> None:
    rmsnorm_patch.apply(model)
    assert "rms_norm_pair" in {made.op for made in rmsnorm_patch.warmup(model)}
    tokens = torch.arange(1, 9, device="cuda")[None]
    with torch.no_grad():
        model(tokens, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(tokens, use_cache=False).logits
        tokens.add_(3)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, model(tokens, use_cache=False).logits)
