"""The eps that a patched norm's kernel is given: the module's own at each call, or the one that its code names."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch.rewrite.attributes import Attributes


class ConstantRMSNorm(nn.Module):
    """Names its eps in its code alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64) + 0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 2.5e-6)
        return self.weight * wide.to(hidden_states.dtype)


class Layer(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first_norm, self.second_norm, self.mlp = first, second, nn.Linear(64, 64, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.mlp(self.first_norm(hidden_states)) * 1e-3
        hidden_states = residual + hidden_states
        return self.second_norm(hidden_states)


@pytest.mark.parametrize(
    "make", [ConstantRMSNorm, lambda: LlamaRMSNorm(64, eps=2.5e-6)], ids=["in the code", "attribute"]
)
def test_kernels_get_it(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At values of a thousandth each other eps gives another result, alone and behind an add."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    model = Layer(make(), make()).eval()
    x = torch.randn(5, 64) * 1e-3
    with torch.no_grad():
        expected = model(x)
        plan = rmsnorm_patch.apply(model, backend="triton").plan
        assert len(list(plan.fused_norms())) == 2
        assert len(list(plan.fused_pairs())) == 1
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_modules_that_differ_in_its_value_share_a_class() -> None:
    model = Layer(LlamaRMSNorm(64, eps=1e-6), LlamaRMSNorm(64, eps=0.25)).eval()
    rmsnorm_patch.apply(model)
    assert type(model.first_norm) is type(model.second_norm)


@pytest.mark.parametrize("eps", ["eps", None])
@pytest.mark.parametrize("constant", [0.0, 2.5e-6, None])
def test_none_is_the_epsilon_of_fp32(eps: str | None, constant: float | None) -> None:
    """In an attribute, whatever the class was read with, or in the code; a number there is that of the code."""
    attributes, norm = Attributes("weight", eps, constant), LlamaRMSNorm(64)
    norm.eps = None
    of_none = torch.finfo(torch.float32).eps
    assert attributes.eps_of(norm) == (constant if eps is None and constant is not None else of_none)
    norm.eps = 0.25
    assert (attributes.eps_of(norm) == 0.25) is (eps is not None)
