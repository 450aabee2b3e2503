"""Out-of-tree classes that vLLM instantiates in place of its own: of RMSNorm, which is route "oot", and on both routes
of GemmaRMSNorm, whose weight is `1 + w` in fp32.

vLLM computes that weight before its norm, so a provider of the IR op would get a tensor of another dtype than its
input, and a launch or two in front of it. The class has the weight itself: the kernels add the 1 (`weight_offset`).

Classes derived from these two are served with them, those of vLLM's Transformers backend above all: an instance of one
gets a class of its own, where ours stands behind the derived class and in front of vLLM's.

The forward is replaced as a whole: which of forward_native, forward_cuda or forward_cpu vLLM would call depends on
the compile mode and on `custom_ops`, and overriding only one of them is a silent no-op in the other modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..numerics.contract import FUNCTIONAL
from ..numerics.spec import NormSpec, WeightOffset
from . import calls, hooks, huggingface, trial
from .decision import Decision, decision_for
from .log import warn_once
from .passes import block_products
from .wrapping import wrap_once


def register() -> None:
    """Register our class for the name "RMSNorm", unless somebody already did."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    if foreign := _register(RMSNorm, _Norm):
        raise RuntimeError(foreign)


def register_offset() -> None:
    """Register our class for the name "GemmaRMSNorm", unless somebody already did."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    if foreign := _register(GemmaRMSNorm, _OffsetNorm):
        warn_once(f"{foreign}, and serves those norms")


def _register(norm: Any, ours: type) -> str:
    """Who holds the class's name, or ""."""
    from vllm.model_executor import custom_op

    name = norm.__name__
    standing: Any = custom_op.op_registry_oot.get(name)
    if standing is not None:
        is_ours = getattr(standing, "is_rmsnorm_patch", False)
        return "" if is_ours else f"{standing.__module__}.{standing.__qualname__} is registered for {name} already"
    made = type(f"Patched{name}", (ours, norm), {"__doc__": f"vLLM's {name} with our kernels."})
    custom_op.CustomOp.register_oot(made, name=name)
    # register_oot writes the class name over the op's name, which `custom_ops=["+rms_norm"]` refers to.
    custom_op.op_registry_oot[name].name = norm.name
    wrap_once(custom_op.CustomOp, "__new__", _serve_derived)
    return ""


def _serve_derived(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of vLLM's `CustomOp.__new__`, which asks the registry for a class's own name alone."""

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _register_derived(cls)
        return original(cls, *args, **kwargs)

    return __new__


def _register_derived(cls: Any) -> None:
    """Of a class below one that ours stands for, when its first instance is made: plugins are loaded before its module.
    One with arithmetic of its own (`forward_native` and others) keeps it."""
    from vllm.model_executor.custom_op import op_registry_oot

    if cls.__name__ in op_registry_oot or getattr(cls, "is_rmsnorm_patch", False):
        return
    bases = cls.__mro__[1:]
    for at, base in enumerate(bases):
        ours: Any = op_registry_oot.get(base.__name__)
        if getattr(ours, "is_rmsnorm_patch", False) and ours.__bases__[-1] is base:
            derived = (cls, *bases[:at])
            if not any(name.startswith("forward_") for each in derived for name in vars(each)):
                doc = {"__doc__": f"vLLM's {cls.__name__} with our kernels.", "name": cls.name}
                op_registry_oot[cls.__name__] = type(f"Patched{cls.__name__}", (cls, ours), doc)
            return


class _Norm:
    """In front of vLLM's RMSNorm among the bases of a class. What our kernels do not serve takes vLLM's own forward.

    Each call reads the weight of that moment: it may be written or replaced while the engine runs.
    """

    is_rmsnorm_patch = True
    rmsnorm_patch_offset: WeightOffset = "none"
    weight: torch.Tensor
    variance_epsilon: float
    has_weight: bool = True
    variance_size_override: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._provider = self._choose()

    def _provider_of(self, decision: Decision) -> str:
        return decision.provider if decision.route == "oot" else ""

    def _called_ops(self) -> tuple[str, ...]:
        return calls.called_ops()

    def _choose(self) -> str:
        from vllm.config import get_current_vllm_config

        decision = decision_for(get_current_vllm_config())
        provider = self._provider_of(decision)
        if decision.route == "oot":
            hooks.install_passes()  # a worker is what builds a model
            hooks.log(get_current_vllm_config())
        if not provider:
            return ""
        spec = calls.spec_of(provider, self.has_weight, self.variance_size_override, self.rmsnorm_patch_offset)
        if decision.needs_blocks and self._writes_plain_rows(spec):
            return ""
        return "" if trial.any_declined(self.weight, self.weight.dtype, spec, self._called_ops()) else provider

    def _writes_plain_rows(self, spec: NormSpec) -> bool:
        """With an add or without one: a class serves both."""
        x, weight = self.weight.new_empty(0, self.weight.shape[-1]), self.weight if spec.has_weight else None
        return any(block_products.plain_rows(x, weight, spec, adds) for adds in (False, True))

    def _is_served(self, x: torch.Tensor) -> bool:
        if self._provider == "" or (self.has_weight and x.dtype != self.weight.dtype):
            return False
        if calls.is_eager(x):
            return True
        return calls.keeps_op(self._provider, x) and not calls.belongs_to_the_compiler(self._provider, x)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if not self._is_served(x):
            return super().forward(x, residual)  # type: ignore[misc, no-any-return]
        eps, width = self.variance_epsilon, self.variance_size_override
        if residual is None:
            weight = self.weight.data if getattr(self, "pass_weight", self.has_weight) else None
            return calls.rms_norm(self._provider, x, weight, eps, width, self.rmsnorm_patch_offset)
        weight = self.weight.data if getattr(self, "pass_weight_add", self.has_weight) else None
        return self._add_and_norm(x, residual, weight)

    def _add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps, width = self.variance_epsilon, self.variance_size_override
        return calls.fused_add_rms_norm_in_place(self._provider, x, residual, weight, eps, width)


class _OffsetNorm(_Norm):
    """In front of vLLM's GemmaRMSNorm, which rounds once, at the end, eager and compiled, and keeps its operands.
    transformers' norms of that kind read the sum as it is stored, and are the same otherwise."""

    rmsnorm_patch_offset = "fp32"

    def _provider_of(self, decision: Decision) -> str:
        if decision.numerics and huggingface.computes_offset(decision.provider):
            return decision.provider
        return "rmsnorm_patch" if decision.offset else ""

    def _called_ops(self) -> tuple[str, ...]:
        return FUNCTIONAL

    def _add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps, width = self.variance_epsilon, self.variance_size_override
        return calls.fused_add_rms_norm(self._provider, x, residual, weight, eps, width, self.rmsnorm_patch_offset)
