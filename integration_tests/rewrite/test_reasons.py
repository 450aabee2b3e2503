"""Which operands an add and its norm take as one, and why others are taken apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.rewrite import layer_calls


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Model(nn.Module):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6, elementwise_affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def patched(backend: str, affine: bool = True) -> tuple[nn.Module, layer_calls.NormKernel]:
    model = Model(affine).eval().requires_grad_(False)
    rmsnorm_patch.apply(model, backend=backend)
    kernel = layer_calls.kernel_of(model.norm)
    assert kernel is not None
    return model.norm, kernel


def test_a_pair_has_a_weight_exactly_where_its_norm_has_one() -> None:
    a, b, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    for affine in (True, False):
        _, kernel = patched("triton", affine)
        assert layer_calls.pair_servable(kernel, a, b, None) is not affine
    assert layer_calls.pair_servable(patched("triton")[1], a, b, weight)


@pytest.mark.parametrize(
    "b",
    [torch.randn(1, 8), torch.randn(3, 8).double(), torch.randn(3, 8, device="meta"), nn.Parameter(torch.ones(3, 8))],
)
def test_each_difference_of_the_operands_alone_is_named(b: torch.Tensor) -> None:
    norm, kernel = patched("triton")
    with torch.no_grad():
        why = layer_calls.why_not(norm, kernel, torch.randn(3, 8), b)
        assert not layer_calls.pair_servable(kernel, torch.randn(3, 8), b, norm.weight)
    assert why.startswith(("the operands differ: Tensor torch.float32 (3, 8) on cpu, ", "input dtype", "input on meta"))
    assert ("differ" in why) is (b.dtype == torch.float32 and not b.is_meta)


def test_two_dtypes_alone_are_named_where_the_backend_does_not_mix_them(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, kernel = patched("triton")
    a, b = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    assert layer_calls.why_not(norm, kernel, a, b) == ""
    monkeypatch.setattr(kernel, "mixes", False)  # as it is of the CUDA backend
    told = "the operands differ: Tensor torch.bfloat16 (3, 8) on cpu, Tensor torch.float32 (3, 8) on cpu"
    assert layer_calls.why_not(norm, kernel, a, b) == told


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_ops_of_a_class_are_bound_for_its_backend(backend: str) -> None:
    _, kernel = patched(backend)
    ops = (kernel.fused, kernel.norm_add, kernel.norm_add_norm)
    assert [op if op is None else (op.spec, op.backend) for op in ops] == (
        [None] * 3 if backend == "reference" else [(kernel.spec.variant, backend)] * 3
    )
    assert kernel.on_cpu is (backend == "triton")
