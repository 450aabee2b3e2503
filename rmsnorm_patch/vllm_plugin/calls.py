"""The calls that both routes make: our op in a traced graph, the launcher itself in eager code."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .. import ops
from ..backends.bindings import kept
from ..numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE, RMS_NORM
from ..numerics.spec import NormSpec, WeightOffset
from ..ops import sources
from . import huggingface
from .decision import SPECS

VERSION = sources.digest()
"""Of what the routes and passes emit: a part of vLLM's compile-cache key, and of the key of Inductor's own cache."""

COMPILER_HEAD = 256
"""In compiled graphs the norm over heads of up to this length is left to the compiler, which fuses it with the split of
qkv before it and the rotary embedding behind it (measured: docs/decisions/vllm.md)."""

IN_PLACE = True
"""Whether the fused op writes into tensors that their caller gave up (measured: docs/decisions/vllm.md)."""


def called_ops() -> tuple[str, str]:
    """The plain and the fused op that serve RMSNorm: what is tried before they are trusted."""
    return RMS_NORM.name, FUSED_ADD_IN_PLACE.name if IN_PLACE else FUSED_ADD.name


@cache
def spec_of(provider: str, has_weight: bool, variance_size: int | None, offset: WeightOffset = "none") -> NormSpec:
    base = SPECS[provider]
    return NormSpec(0.0, base.round_before_weight, offset, has_weight, base.output, base.sum, variance_size)


def _spec_args(provider: str, variance_size: int | None, offset: WeightOffset) -> tuple[Any, ...]:
    """`ops.spec_args`, made of what Dynamo traces without a look-up in a cache."""
    spec = SPECS[provider]
    return spec.round_before_weight, offset, spec.output, spec.sum, variance_size, None, "auto"


@kept
def _eager(
    op: str, provider: str, has_weight: bool, variance_size: int | None, offset: WeightOffset = "none"
) -> ops.Bound:
    return ops.bind(op, spec_of(provider, has_weight, variance_size, offset))


def is_eager(x: torch.Tensor) -> bool:
    """False under Dynamo and while a graph pass traces the call with fake tensors."""
    return type(x) is torch.Tensor and not ops.is_traced()


def rms_norm(
    provider: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    variance_size: int | None,
    offset: WeightOffset = "none",
) -> torch.Tensor:
    """x: [..., N]; weight: [N] or None; offset: what is added to the weight, as in `NormSpec`; the result is
    contiguous."""
    if is_eager(x):
        bound = _eager(RMS_NORM.name, _on(provider, x, offset), weight is not None, variance_size, offset)
        return bound(x, weight, eps)
    spec = _spec_args(provider, variance_size, offset)
    return torch.ops.rmsnorm_patch.rms_norm.default(x, weight, eps, *spec)


def fused_add_rms_norm(
    provider: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    variance_size: int | None,
    offset: WeightOffset = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual); x, residual: [..., N]; both results are contiguous and new."""
    if is_eager(x):
        bound = _eager(FUSED_ADD.name, _on(provider, x, offset), weight is not None, variance_size, offset)
        return bound(x, residual, weight, eps)
    spec = _spec_args(provider, variance_size, offset)
    return torch.ops.rmsnorm_patch.fused_add_rms_norm.default(x, residual, weight, eps, *spec)


def fused_add_rms_norm_in_place(
    provider: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in x and residual, which the caller gives up: fewer lines of L2 to write back before the next weights
    fit in. (On the CPU eager code gets new tensors, which the in-place op would only copy.)"""
    if not IN_PLACE or (is_eager(x) and x.device.type == "cpu"):
        return fused_add_rms_norm(provider, x, residual, weight, eps, variance_size)
    if is_eager(x):
        _eager(FUSED_ADD_IN_PLACE.name, provider, weight is not None, variance_size)(x, residual, weight, eps)
        return x, residual
    spec = _spec_args(provider, variance_size, "none")
    torch.ops.rmsnorm_patch.fused_add_rms_norm_.default(x, residual, weight, eps, *spec)
    return x, residual


def _on(provider: str, x: torch.Tensor, offset: WeightOffset) -> str:
    """Eager CPU code replaces vLLM's PyTorch norm, also where the engine was configured to compile and did not. With
    an offset its weight is an fp32 one, before which nothing is rounded."""
    if provider == "rmsnorm_patch" and offset == "none" and x.device.type == "cpu":
        return "rmsnorm_patch_native"
    return provider


def belongs_to_the_compiler(provider: str, x: torch.Tensor) -> bool:
    """Whether a call on [..., heads, head length] stays in the graph as vLLM's own arithmetic."""
    return provider == "rmsnorm_patch" and x.dim() > 2 and x.shape[-1] <= COMPILER_HEAD


def keeps_op(provider: str, x: torch.Tensor) -> bool:
    """Whether a traced call becomes our op; else vLLM's own arithmetic is traced, for Inductor to fuse (CPU). Inductor
    drops roundings to the storage dtype, so transformers' numerics stand in an op everywhere."""
    if provider in huggingface.SPECS:
        return True
    return _FORMS[x.device.type] == "op" if x.device.type in _FORMS else False


_FORMS: dict[str, str] = {}


def read_forms() -> None:
    """Once per process, before anything is traced: Dynamo must not see an environment variable change."""
    _FORMS.update({device: ops.compile_form(device) for device in ("cpu", "cuda")})


def forms() -> dict[str, str]:
    return dict(_FORMS)
