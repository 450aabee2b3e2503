"""What the tests of the CUDA launch path share: seeded rows, and each op against PyTorch's arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from made_rows import rand

from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec
from rmsnorm_patch.numerics.tolerances import SITE
from rmsnorm_patch.proof.difference import compare

EPS = 1e-6
BF16 = torch.bfloat16
second_device = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def parameter(n: int, dtype: torch.dtype = BF16, device: str = "cuda") -> nn.Parameter:
    return nn.Parameter(rand(n, dtype=dtype, seed=9, device=device), requires_grad=False)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    assert compare(actual, expected).violations(SITE[expected.dtype], expected.dtype) == ()


def check_norm(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec = LLAMA, calls: int = 3) -> None:
    norm = cuda_backend.bind("rms_norm", spec)
    expected = reference.rms_norm(x, weight, spec, EPS)
    for _ in range(calls):  # the first call builds and takes the slow path, later ones do not
        check(norm(x, weight, EPS), expected)


def check_fused(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec = LLAMA) -> None:
    fused = cuda_backend.bind("fused_add_rms_norm", spec)
    normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, EPS)
    kept = x.clone(), residual.clone()
    for _ in range(3):
        actual, actual_total = fused(x, residual, weight, EPS)
        check(actual, normed)
        assert torch.equal(actual_total, total)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
