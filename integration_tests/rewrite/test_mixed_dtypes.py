"""Adds of two dtypes (an fp32 residual beside half precision layers): Triton serves them, says so, and is warmed up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from transformers import AutoConfig, AutoModelForCausalLM

import rmsnorm_patch
from rmsnorm_patch.ops import dispatch
from rmsnorm_patch.rewrite import handover, layer_calls, observe

SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "pad_token_id": 0}
IDS = torch.arange(1, 7)[None]


@pytest.fixture
def mamba(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """In bf16 with an fp32 residual stream, patched with interpreted Triton kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", residual_in_fp32=True, **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval().bfloat16()
    rmsnorm_patch.apply(model, backend="triton")
    return model


def events_of(model: nn.Module) -> list[observe.Event]:
    events: list[observe.Event] = []
    with torch.no_grad(), observe.observing(events.append):
        model(IDS)
    return events


def test_warmup_makes_every_kernel_that_a_forward_calls(mamba: nn.Module) -> None:
    ready = {(made.op, made.dtype, made.residual_dtype or made.dtype) for made in rmsnorm_patch.warmup(mamba)}
    name = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
    added = [event.operands for event in events_of(mamba) if event.kind in ("cross_layer", "in_layer")]
    assert added
    called = {("fused_add_rms_norm", name[a.dtype], name[b.dtype]) for a, b in added}
    assert any(left != right for _, left, right in called)
    assert called <= ready


def test_warmup_launches_what_it_names(mamba: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    warmup = dispatch.warmup
    monkeypatch.setattr(dispatch, "warmup", lambda *given: (launched.append((given[4], given[7])), warmup(*given)))
    rmsnorm_patch.warmup(mamba)
    assert [pair for pair in launched if pair[1] not in (None, pair[0])]


def test_a_model_of_one_dtype_is_given_no_more_kernels(
    small_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = small_model("llama", torch.bfloat16)
    rmsnorm_patch.apply(model, backend="triton")
    assert {made.residual_dtype for made in rmsnorm_patch.warmup(model)} == {None}


def test_the_taken_tensor_names_who_made_it(mamba: nn.Module) -> None:
    events = events_of(mamba)
    made = [event for event in events if event.kind == "cross_layer"]
    taken = [event for event in events if event.kind == "taken"]
    assert [event.backend for event in taken] == [event.backend for event in made] == ["triton"] * len(made)


@pytest.mark.parametrize(("backend", "told"), [("triton", "triton"), ("cuda", "cuda"), ("", "triton")])
def test_what_one_backend_made_is_not_called_anothers(
    mamba: nn.Module, monkeypatch: pytest.MonkeyPatch, backend: str, told: str
) -> None:
    """On a GPU launcher.c takes what rides on a sum, whoever made it; its own sums name nobody."""
    norm, total, normed = mamba.backbone.norm_f, torch.randn(2, 32), torch.randn(2, 32)
    kernel = layer_calls.kernel_of(norm)
    link = handover.Link(norm)
    handover.put(normed, total, norm, norm.weight, kernel.eps_of(norm), kernel, link, backend)
    monkeypatch.setattr(layer_calls.native, "take", lambda norm, x: x.__dict__.pop(handover.CARRIED).normed)
    events: list[observe.Event] = []
    with torch.no_grad(), observe.observing(events.append):
        assert layer_calls.entry(norm, total) is normed
    assert [(event.kind, event.backend) for event in events] == [("taken", told)]
