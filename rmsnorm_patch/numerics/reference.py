"""The norm in plain PyTorch, operation for operation as the libraries write it.

`rms_norm` is the definition that kernels, probes and proofs are held against; `rms_norm_fp64` is the exact value.
"""

from __future__ import annotations

import torch

from .spec import NormSpec


def mean_square(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """Of each row of x [..., N], in its dtype: [..., 1], or [..., N] with groups."""
    if spec.group is not None:
        grouped = x.unflatten(-1, (-1, spec.group))
        return grouped.pow(2).mean(-1, keepdim=True).expand_as(grouped).flatten(-2)
    counted = x if spec.width is None else x[..., : spec.width]
    return counted.pow(2).mean(-1, keepdim=True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float | None = None) -> torch.Tensor:
    """RMSNorm of `x` [..., N] with `weight` [N] or None; dtype as `spec.output_dtype`.

    eps: overrides `spec.eps` (a module's own value at the moment of the call).
    """
    eps = spec.resolve_eps(x.dtype) if eps is None else eps
    return scale(divide_by_rms(x.to(torch.float32), spec, eps), x.dtype, weight, spec)


def divide_by_rms(row: torch.Tensor, spec: NormSpec, eps: float) -> torch.Tensor:
    """row * rstd of an fp32 row [..., N]."""
    return row * torch.rsqrt(mean_square(row, spec) + eps)


def scale(
    h: torch.Tensor, x_dtype: torch.dtype, weight: torch.Tensor | None, spec: NormSpec, rounded: bool = True
) -> torch.Tensor:
    """Round `h` = x * rstd (fp32) and multiply by the weight, as `spec` says. rounded=False: the product in fp32, of
    factors that are rounded as ever."""
    weight_dtype = None if weight is None else weight.dtype
    out_dtype = spec.output_dtype(x_dtype, weight_dtype) if rounded else torch.float32
    h = h.to(spec.rounded_dtype(x_dtype, weight_dtype))
    if not spec.has_weight or weight is None:
        return h.to(out_dtype)
    if spec.weight_offset == "fp32":
        weight = 1.0 + weight.to(torch.float32)
    elif spec.weight_offset == "weight_dtype":
        weight = 1.0 + weight
    if not rounded:
        weight, h = weight.to(torch.float32), h.to(torch.float32)
    return (weight * h).to(out_dtype)


def row_and_sum(x: torch.Tensor, residual: torch.Tensor, spec: NormSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(the fp32 row that the norm reads, x + residual) of x and residual [..., N]: `spec.sum` says whether the row is
    the sum as it is stored."""
    total = x + residual
    if spec.sum == "rounded" or total.dtype == torch.float32:
        return total.to(torch.float32), total
    return x.to(torch.float32) + residual.to(torch.float32), total


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    spec: NormSpec,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual); the sum is rounded to the dtype that PyTorch gives it (x's, or fp32 where the
    two differ), the norm reads it as `spec.sum` says."""
    row, total = row_and_sum(x, residual, spec)
    eps = spec.resolve_eps(total.dtype) if eps is None else eps
    return scale(divide_by_rms(row, spec, eps), total.dtype, weight, spec), total


def norm_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float | None = None
) -> torch.Tensor:
    """norm(x) + residual, the norm's result rounded before it is added."""
    return rms_norm(x, weight, spec, eps) + residual


def norm_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    spec: NormSpec,
    eps: float | None = None,
    next_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm of `norm_add` with the next weight and eps, `norm_add`)."""
    return fused_add_rms_norm(rms_norm(x, weight, spec, eps), residual, next_weight, spec, next_eps)


def rms_norm_fp64(
    x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float | None = None
) -> torch.Tensor:
    """The exact value in fp64, without any intermediate rounding; the yardstick for errors of differing specs."""
    eps = spec.resolve_eps(x.dtype) if eps is None else eps
    h = x.to(torch.float64)
    h = h * torch.rsqrt(mean_square(h, spec) + eps)
    if not spec.has_weight or weight is None:
        return h
    return h * (weight.to(torch.float64) + (0.0 if spec.weight_offset == "none" else 1.0))
