"""A proof that could not have failed is called "nothing proved", never "proved"."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from proof_models import apply_as_kernel, as_kernel, build, honest, prompts

from rmsnorm_patch import NothingProved, VerificationFailed, apply, verify
from rmsnorm_patch.patch_state import is_patched
from rmsnorm_patch.proof import Proof, compare_logits, record_logits


def patched(kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = build(kind, dtype)
    apply(model)
    return model


def masked(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}


def nothing(model: nn.Module, inputs: object, **options: object) -> Proof:
    """The proof, after `verify` raised it and said it in JSON."""
    with pytest.raises(NothingProved) as caught:
        verify(model, inputs, greedy_tokens=2, **options)
    proof = verify(model, inputs, greedy_tokens=2, raise_on_failure=False, **options)
    assert proof.verdict == caught.value.proof.verdict == "nothing proved"
    assert not proof.passed
    assert "nothing proved" in proof.explain().splitlines()[0]
    assert json.loads(proof.to_json())["verdict"] == "nothing proved"
    assert not any(line.startswith("RED") for line in proof.verdicts())
    return proof


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    model = patched()
    with torch.no_grad():
        model.lm_head.weight[5] = value
    assert "NaN or Inf at 48 of 48 positions" in nothing(model, prompts()).explain()


def test_nan_from_the_weights_of_a_layer() -> None:
    model = patched()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    nothing(model, prompts())


def test_a_mask_of_zeros() -> None:
    assert "every one is masked" in nothing(patched(), masked(prompts())).proves_nothing


def test_no_site() -> None:
    proof = nothing(patched(), prompts(), sites=[])
    assert proof.proves_nothing == "no site was judged"
    assert proof.verdicts()[0].startswith("-- ")


def test_inputs_that_reach_no_patched_norm() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    proof = verify(Around(patched()), {"x": torch.randn(3, 4)}, raise_on_failure=False)
    assert proof.verdict == "nothing proved"
    assert "reach no norm" in proof.proves_nothing


@pytest.mark.parametrize("inputs", [torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)])
def test_no_position(inputs: torch.Tensor) -> None:
    with pytest.raises(NothingProved, match="one position or more"):
        verify(patched(), inputs)


def test_apply_restores_a_model_of_which_nothing_was_proved() -> None:
    model = build("llama", torch.bfloat16)
    with pytest.raises(NothingProved):
        apply(model, verify=masked(prompts()))
    assert not any(is_patched(type(module)) for module in model.modules())


def test_a_fault_beside_it_is_red(kernel: Callable) -> None:
    model = build("llama", torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, e) * 1.01))
    apply_as_kernel(model)
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts())
    assert caught.value.proof.verdict == "failed"


def test_nan_in_the_patched_model_alone_is_red(kernel: Callable) -> None:
    model = build("llama", torch.bfloat16)
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, e) * float("nan")))
    apply_as_kernel(model)
    assert verify(model, prompts(), raise_on_failure=False).verdict == "failed"


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "proved"), (1.02, "failed")])
def test_tokens_masked_by_minus_infinity_are_judged(factor: float, verdict: str, kernel: Callable) -> None:
    """As models mask a part of their vocabulary."""
    model = build("llama", torch.bfloat16)
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, e) * factor))
    apply_as_kernel(model)
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x).index_fill(-1, torch.tensor([0, 7]), float("-inf"))
    proof = verify(model, prompts(), raise_on_failure=False)
    assert proof.verdict == verdict
    assert proof.logits.passed is (verdict == "proved")
    assert proof.logits.undefined == 0
    assert proof.logits.own_error < 0.1


def test_logits_without_a_yardstick(kernel: Callable) -> None:
    """The wider run masks other tokens than the original: its distance from the original is no number."""
    model = build("llama", torch.bfloat16)
    kernel(as_kernel(honest))
    apply_as_kernel(model)
    head = model.lm_head.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return head(x).index_fill(-1, torch.tensor([x.element_size()]), float("-inf"))

    model.lm_head.forward = forward
    proof = verify(model, prompts(8, 64), raise_on_failure=False, greedy_tokens=0)
    assert not proof.logits.bit_identical
    assert proof.verdict == "nothing proved"
    assert "own error" in proof.proves_nothing


def test_recorded_logits_must_be_some(tmp_path) -> None:
    model = patched()
    with pytest.raises(NothingProved, match="0 positions"):
        record_logits(model, masked(prompts()), tmp_path / "masked.safetensors")
    record_logits(model, prompts(), tmp_path / "good.safetensors")
    assert compare_logits(model, tmp_path / "good.safetensors").passed
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NothingProved, match="NaN or Inf at 48"):
        record_logits(model, prompts(), tmp_path / "nan.safetensors")
    assert not (tmp_path / "nan.safetensors").exists()
