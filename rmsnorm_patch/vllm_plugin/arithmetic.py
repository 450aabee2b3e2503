"""The calls that both routes make: our op in a traced graph, the launcher itself in eager code."""

from __future__ import annotations

from functools import cache

import torch

from .. import ops
from ..semantics import NormSpec
from .decision import SPECS

VERSION = 1
"""Raise it when the graphs that the routes produce change: it is part of vLLM's compile-cache key."""


@cache
def spec_of(provider: str, has_weight: bool, variance_size: int | None) -> NormSpec:
    base = SPECS[provider]
    return NormSpec(0.0, base.round_before_weight, "none", has_weight, base.output, base.sum, variance_size)


@cache
def _eager(op: str, provider: str, has_weight: bool, variance_size: int | None) -> ops.Bound:
    spec = spec_of(provider, has_weight, variance_size)
    return ops.bind_rms_norm(spec) if op == "rms_norm" else ops.bind_fused_add_rms_norm(spec)


def is_eager(x: torch.Tensor) -> bool:
    """False under Dynamo and while a graph pass traces the call with fake tensors."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def rms_norm(
    provider: str, x: torch.Tensor, weight: torch.Tensor | None, eps: float, variance_size: int | None
) -> torch.Tensor:
    """x: [..., N]; weight: [N] or None; the result is contiguous."""
    if is_eager(x):
        return _eager("rms_norm", _on(provider, x), weight is not None, variance_size)(x, weight, eps)
    spec = SPECS[provider]
    return torch.ops.rmsnorm_patch.rms_norm.default(
        x, weight, eps, spec.round_before_weight, "none", spec.output, spec.sum, variance_size, None, "auto"
    )


def fused_add_rms_norm(
    provider: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual); x, residual: [..., N]; both results are contiguous and new."""
    if is_eager(x):
        bound = _eager("fused_add_rms_norm", _on(provider, x), weight is not None, variance_size)
        return bound(x, residual, weight, eps)
    spec = SPECS[provider]
    return torch.ops.rmsnorm_patch.fused_add_rms_norm.default(
        x, residual, weight, eps, spec.round_before_weight, "none", spec.output, spec.sum, variance_size, None, "auto"
    )


def _on(provider: str, x: torch.Tensor) -> str:
    """Eager CPU code replaces vLLM's PyTorch norm, also where the engine was configured to compile and did not."""
    return "rmsnorm_patch_native" if provider == "rmsnorm_patch" and x.device.type == "cpu" else provider


def keeps_op(x: torch.Tensor) -> bool:
    """Whether a traced call becomes our op; else vLLM's own arithmetic is traced, for Inductor to fuse (CPU)."""
    return _FORMS[x.device.type] == "op" if x.device.type in _FORMS else False


_FORMS: dict[str, str] = {}


def read_forms() -> None:
    """Once per process, before anything is traced: Dynamo must not see an environment variable change."""
    _FORMS.update({device: ops.compile_form(device) for device in ("cpu", "cuda")})


def forms() -> dict[str, str]:
    return dict(_FORMS)
