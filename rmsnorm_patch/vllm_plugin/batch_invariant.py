"""VLLM_BATCH_INVARIANT: a request's bits must not depend on what else is in its batch. Our kernels have that anyhow.

A row's sum of squares is added in an order that follows from its length alone (`backends/cuda/schedules.py`,
`backends/triton/schedules.py`). vLLM's own norm passes by the IR ops in such an engine, and with them by our providers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .decision import SPECS, Decision

_OURS = [[provider] for provider in SPECS]


def passes_by_ir(decision: Decision) -> bool:
    """Whether vLLM's norm would pass by the IR ops that serve an engine."""
    return decision.invariant and decision.route == "ir"


def wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of vLLM's `RMSNorm.forward_cuda`: it calls the IR ops again where our providers come first in both."""

    def forward_cuda(self: Any, x: Any, residual: Any = None) -> Any:
        return self.forward_native(x, residual) if _come_first() else original(self, x, residual)

    return forward_cuda


def _come_first() -> bool:
    from vllm import ir

    return all(op.get_priority()[:1] in _OURS for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm))
