"""What the tests of bad input on a device share: seeded rows, the ops of a backend, and what is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from made_rows import rand

from rmsnorm_patch import ops
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec
from rmsnorm_patch.numerics.tolerances import SITE
from rmsnorm_patch.proof.difference import compare

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
WEIGHTLESS = NormSpec(has_weight=False)
case = pytest.mark.case
sanitized = pytest.mark.sanitized


def parameter(n: int, dtype: torch.dtype = BF16) -> nn.Parameter:
    return nn.Parameter((1 + rand(n, dtype=FP32, seed=9, scale=0.2)).to(dtype), requires_grad=False)


def norm(spec: NormSpec, backend: str):
    return ops.bind_rms_norm(spec, backend)  # type: ignore[arg-type]


def fused(spec: NormSpec, backend: str):
    return ops.bind_fused_add_rms_norm(spec, backend)  # type: ignore[arg-type]


def in_place(spec: NormSpec, backend: str):
    return ops.bind_fused_add_rms_norm_(spec, backend)  # type: ignore[arg-type]


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the proof's own tolerance of the original arithmetic."""
    assert actual.dtype == expected.dtype
    assert compare(actual, expected).violations(SITE[expected.dtype], expected.dtype) == ()


def check(x, residual, weight, backend: str, spec: NormSpec = LLAMA, eps: float = EPS) -> None:
    """Both ops against the original arithmetic, and its error against fp64 against the original's own."""
    normed = norm(spec, backend)(x, weight, eps)
    same(normed, reference.rms_norm(x, weight, spec, eps))
    both, total = fused(spec, backend)(x, residual, weight, eps)
    want, want_total = reference.fused_add_rms_norm(x, residual, weight, spec, eps)
    assert torch.equal(total, want_total)
    same(both, want)
    if x.dtype != FP32:  # there a row moves as one with its rstd, and `same` has held it to 8 ulp
        exact = reference.rms_norm_fp64(want_total, weight, spec, eps)
        error, own = ((y.double() - exact).square().mean().sqrt().item() for y in (both, want))
        assert error <= 1.05 * own + 1e-30


def plain_case(m: int, n: int, backend: str, spec: NormSpec = LLAMA, dtype: torch.dtype = BF16) -> None:
    check(rand(m, n, dtype=dtype), rand(m, n, dtype=dtype, seed=1), parameter(n, dtype), backend, spec)


def shifted(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins `offset` elements into its storage."""
    return torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)[offset:].view(x.shape).copy_(x)
