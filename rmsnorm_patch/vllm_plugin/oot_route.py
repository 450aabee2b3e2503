"""Route "oot": an out-of-tree class that vLLM instantiates in place of its RMSNorm.

The forward is replaced as a whole: which of forward_native, forward_cuda or forward_cpu vLLM would call depends on
the compile mode and on `custom_ops`, and overriding only one of them is a silent no-op in the other modes.
"""

from __future__ import annotations

from typing import Any

import torch

from ..numerics.contract import FUNCTIONAL
from . import calls, hooks, trial
from .decision import decision_for


def register() -> None:
    """Register our class for the name "RMSNorm", unless somebody already did."""
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers.layernorm import RMSNorm

    standing: Any = custom_op.op_registry_oot.get("RMSNorm")
    if standing is not None:
        if not getattr(standing, "is_rmsnorm_patch", False):
            raise RuntimeError(f"{standing.__module__}.{standing.__qualname__} is registered for RMSNorm already")
        return
    custom_op.CustomOp.register_oot(_make_class(RMSNorm), name="RMSNorm")
    # register_oot writes the class name over the op's name, which `custom_ops=["+rms_norm"]` refers to.
    custom_op.op_registry_oot["RMSNorm"].name = RMSNorm.name


def _make_class(rms_norm: type) -> type:
    class PatchedRMSNorm(rms_norm):  # type: ignore[misc, valid-type]
        """vLLM's RMSNorm with our kernels; what they do not serve takes vLLM's own forward."""

        is_rmsnorm_patch = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._provider = self._choose()

        def _choose(self) -> str:
            from vllm.config import get_current_vllm_config

            decision = decision_for(get_current_vllm_config())
            hooks.log(get_current_vllm_config())
            if decision.route != "oot":
                return ""
            x = torch.empty(0, self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device)
            spec = calls.spec_of(decision.provider, self.has_weight, self.variance_size_override)
            weight = self.weight if self.has_weight else None
            if any(trial.declined(x, weight, spec, op) for op in FUNCTIONAL):
                return ""
            return decision.provider

        def forward(
            self, x: torch.Tensor, residual: torch.Tensor | None = None
        ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
            served = self._provider != "" and (not self.has_weight or x.dtype == self.weight.dtype)
            if not served or calls.belongs_to_the_compiler(self._provider, x):
                return super().forward(x, residual)
            if not calls.is_eager(x) and not calls.keeps_op(self._provider, x):
                return super().forward(x, residual)
            weight = self.weight.data if self.has_weight else None
            if residual is None:
                return calls.rms_norm(self._provider, x, weight, self.variance_epsilon, self.variance_size_override)
            return calls.fused_add_rms_norm(
                self._provider, x, residual, weight, self.variance_epsilon, self.variance_size_override
            )

    PatchedRMSNorm.__name__ = PatchedRMSNorm.__qualname__ = "PatchedRMSNorm"
    return PatchedRMSNorm
