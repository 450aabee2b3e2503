"""Route "ir": providers for vLLM's IR ops, which its compiler passes see and may still fuse before they are lowered.

vLLM's compile-cache key holds the source of this file (IrOpImpl.uuid) and, through `hooks`, `calls.VERSION`.
No `from __future__ import annotations` here: vLLM infers each provider's schema from the annotations themselves.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import calls, trial
from .decision import SPECS
from .passes import block_products


def register() -> None:
    """Add our providers to vLLM's IR ops; nothing uses them until a priority list names them."""
    from vllm import ir

    for provider in SPECS:
        if provider not in ir.ops.rms_norm.impls:
            _register(ir.ops.rms_norm, provider, _rms_norm, _rms_norm_serves, inplace=False)
        if provider not in ir.ops.fused_add_rms_norm.impls:
            _register(ir.ops.fused_add_rms_norm, provider, _fused_add, _fused_add_serves, inplace=True)


def _register(op: Any, provider: str, make: Callable[..., Any], serves: Callable[..., Any], inplace: bool) -> None:
    """inplace: vLLM hands over tensors that the caller gave up, and clones those that it did not."""
    native = op.impls["native"].impl_fn
    op.register_impl(provider, supports_args=serves(provider), inplace=inplace)(make(provider, native))


def _rms_norm(provider: str, native: Callable[..., Any]) -> Callable[..., Any]:
    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        if not calls.is_eager(x) and not calls.keeps_op(provider, x):
            return native(x, weight, epsilon, variance_size)
        return calls.rms_norm(provider, x, weight, epsilon, variance_size)

    return rms_norm


def _fused_add(provider: str, native: Callable[..., Any]) -> Callable[..., Any]:
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if not calls.is_eager(x) and not calls.keeps_op(provider, x):
            return native(x, x_residual, weight, epsilon, variance_size)
        return calls.fused_add_rms_norm_in_place(provider, x, x_residual, weight, epsilon, variance_size)

    return fused_add_rms_norm


def _rms_norm_serves(provider: str) -> Callable[..., bool]:
    def serves(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        if calls.belongs_to_the_compiler(provider, x):
            return False
        if _is_left(provider, x, weight, variance_size, adds=False):
            return False
        if x.device.type == "cpu":  # Dynamo traces through this on the CPU: no caches, no logging
            return weight is None or weight.dtype == x.dtype
        spec = calls.spec_of(provider, weight is not None, variance_size)
        return not trial.declined(x, weight, spec, calls.called_ops()[0])

    return serves


def _fused_add_serves(provider: str) -> Callable[..., bool]:
    def serves(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> bool:
        if x_residual.dtype != x.dtype or x_residual.shape != x.shape:
            return False
        if _is_left(provider, x, weight, variance_size, adds=True):
            return False
        if x.device.type == "cpu":
            return weight is None or weight.dtype == x.dtype
        spec = calls.spec_of(provider, weight is not None, variance_size)
        return not trial.declined(x, weight, spec, calls.called_ops()[1])

    return serves


def _is_left(provider: str, x: Tensor, weight: Tensor | None, variance_size: int | None, adds: bool) -> bool:
    """Whether the norm's rows would be plain in an engine that gains from quantised ones alone."""
    if not block_products.is_needed():
        return False
    spec = calls.spec_of(provider, weight is not None, variance_size)
    return bool(block_products.plain_rows(x, weight, spec, adds))
