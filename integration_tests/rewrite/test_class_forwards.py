"""A model's own class gets another forward after `apply`: its patched modules run that one as long as it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from native_model import TOKENS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.patch_state import original_class

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
KINDS = ("llama", "qwen3", "gemma2", "olmo2")
PARTS = {
    "norm": lambda model: model.model.norm,
    "layer": lambda model: model.model.layers[0],
    "attention": lambda model: model.model.layers[0].self_attn,
}
CASES = [(kind, part) for kind in KINDS for part in PARTS]


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **heads, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.to(torch.bfloat16)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module]], None]:
    """`replaced(cls)`: from now on what its forward gives is shifted."""

    def replace(cls: type[nn.Module]) -> None:
        before = cls.forward

        def shifted(self: nn.Module, *args: Any, **named: Any) -> Any:
            output = before(self, *args, **named)
            return output + 0.5 if isinstance(output, torch.Tensor) else (output[0] + 0.5, *output[1:])

        monkeypatch.setattr(cls, "forward", shifted)

    return replace


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("kind", "part"), CASES)
def test_patched_modules_run_the_forward_that_their_class_got(
    kind: str, part: str, grad: bool, replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = model_of(kind)
    model = copy.deepcopy(stock)
    rmsnorm_patch.apply(model)
    with torch.set_grad_enabled(grad):
        before = model(TOKENS).logits
        replaced(original_class(type(PARTS[part](model))))
        wanted, got = stock(TOKENS).logits, model(TOKENS).logits
        assert not torch.equal(wanted, before)
        assert torch.equal(got, wanted)
        assert torch.equal(model(TOKENS).logits, wanted)
        monkeypatch.undo()
        assert torch.equal(model(TOKENS).logits, before)


def test_a_helper_that_the_class_of_norms_got_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = model_of("gemma2")
    model = copy.deepcopy(stock)
    rmsnorm_patch.apply(model)
    with torch.no_grad():
        before = model(TOKENS).logits
        cls: Any = original_class(type(model.model.norm))
        helper = cls._norm
        monkeypatch.setattr(cls, "_norm", lambda self, x: helper(self, x) + 0.5)
        wanted = stock(TOKENS).logits
        assert not torch.equal(wanted, before)
        assert torch.equal(model(TOKENS).logits, wanted)
        assert any("got since apply" in note for note in rmsnorm_patch.status(model).notes)
        monkeypatch.undo()
        assert torch.equal(model(TOKENS).logits, before)


def test_speed_comes_back_with_the_forward_and_the_status_says_what_runs(
    replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    rmsnorm_patch.apply(model)

    def handed_over() -> int:
        before = rmsnorm_patch.status(model).counts()["handed_over"]
        with torch.no_grad():
            model(TOKENS)
        return rmsnorm_patch.status(model).counts()["handed_over"] - before

    assert handed_over() == SIZES["num_hidden_layers"]
    replaced(original_class(type(model.model.norm)))
    assert handed_over() == 0
    status = rmsnorm_patch.status(model)
    assert status.why()["its class's code, or what that reads, has changed since apply"]
    (note,) = [note for note in status.notes if note.startswith("model.norm ")]
    assert note == "model.norm runs what LlamaRMSNorm got since apply; after revert, apply reads that"
    monkeypatch.undo()
    assert handed_over() == SIZES["num_hidden_layers"]
    assert not rmsnorm_patch.status(model).notes


def test_a_model_patched_later_has_classes_for_the_forward_of_that_day(replaced: Any) -> None:
    one, other = model_of("llama"), model_of("llama")
    rmsnorm_patch.apply(one)
    cls = original_class(type(one.model.layers[0]))
    replaced(cls)
    wanted = other(TOKENS).logits
    rmsnorm_patch.apply(other)
    assert torch.equal(other(TOKENS).logits, wanted)
    assert torch.equal(one(TOKENS).logits, wanted)


@pytest.mark.parametrize("part", ["norm", "layer"])
def test_what_replaces_a_forward_may_call_that_of_the_patched_class(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    rmsnorm_patch.apply(model)
    with torch.no_grad():
        before = model(TOKENS).logits
        patched = type(PARTS[part](model))
        calls: list[nn.Module] = []

        def counted(self: nn.Module, *args: Any, **named: Any) -> Any:
            calls.append(self)
            return patched.forward(self, *args, **named)

        monkeypatch.setattr(original_class(patched), "forward", counted)
        assert torch.equal(model(TOKENS).logits, before)
    assert calls
