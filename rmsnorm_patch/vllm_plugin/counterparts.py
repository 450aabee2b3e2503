"""Each norm of an engine's model beside its counterpart in transformers: the eps, and what no provider can make equal.

Runs once a worker, when the model is built and before anything of it is traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..numerics.contract import FUNCTIONAL
from . import calls, settings, trial
from .decision import Decision, decision_for
from .huggingface import Counterpart, Numerics, numerics_of
from .log import logger, warn_once


def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of vLLM's model loaders. A draft model has a configuration of its own, and the providers of its engine."""

    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        decision = decision_for(vllm_config)
        if decision.refused:
            asked = f"{settings.NUMERICS_VARIABLE}=huggingface is not served, norms have the engine's numerics"
            warn_once(f"{asked}: {decision.refused}")
        model = original(self, vllm_config, model_config, *args, **kwargs)
        if decision.numerics:
            align(model, numerics_of(model_config.hf_config), decision, vllm_config)
        return model

    return load_model


def align(model: torch.nn.Module, numerics: Numerics, decision: Decision, vllm_config: Any) -> None:
    """Give each norm the eps of its counterpart; one line says how many have one, a warning which have none."""
    served, corrected, others = 0, 0, []
    for path, norm in _norms(model):
        counterpart, why = _counterpart(path, norm, numerics, decision)
        why = why or _vllms_own(norm, decision, vllm_config)
        if counterpart is None or why:
            others.append(f"{path} ({type(norm).__name__}: {why})")
            continue
        served += 1
        if norm.variance_epsilon != counterpart.eps:
            corrected += 1
            norm.variance_epsilon = counterpart.eps
    text = f"{served} of {served + len(others)} norms compute what transformers' do"
    if corrected:
        text += f", {corrected} of them with its eps in place of vLLM's"
    logger.info("rmsnorm_patch: worker %d: %s", os.getpid(), text)
    if others:
        listed = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        warn_once(f"{len(others)} norms keep other numerics: {listed}")


def _norms(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """vLLM's classes, those registered in their place, and what a name says to be one."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    for path, module in model.named_modules():
        is_norm = isinstance(module, (RMSNorm, GemmaRMSNorm)) or "RMSNorm" in type(module).__name__
        if is_norm and not list(module.children()):
            yield path, module


def _counterpart(path: str, norm: Any, numerics: Numerics, decision: Decision) -> tuple[Counterpart | None, str]:
    """(transformers' norm, "") or (None, why the engine's provider does not compute what that does)."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    if not isinstance(norm, (RMSNorm, GemmaRMSNorm)):
        return None, "a class with arithmetic of its own"
    if numerics.provider != decision.provider:
        return None, f"the engine has {decision.provider}; {numerics.reason}"
    counterpart = numerics.of(path, norm.weight.shape[-1], getattr(norm, "has_weight", True))
    if counterpart is None:
        return None, "no norm of that path, or of that length, in transformers' model"
    if counterpart.adds_one != isinstance(norm, GemmaRMSNorm):
        return None, f"transformers' {counterpart.class_name} computes " + (
            "1 + w" if counterpart.adds_one else "no 1 + w"
        )
    return counterpart, ""


def _vllms_own(norm: Any, decision: Decision, vllm_config: Any) -> str:
    """Why vLLM's own arithmetic serves a norm all the same, or ""."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    dtype = vllm_config.model_config.dtype
    if norm.weight.dtype != dtype:
        return f"a weight of {norm.weight.dtype} for rows of {dtype}"
    if decision.route == "oot" or isinstance(norm, GemmaRMSNorm):
        if not getattr(norm, "is_rmsnorm_patch", False):
            return "somebody else's class is registered"
        return "" if norm._provider == decision.provider else "its kernel was declined"
    priority = vllm_config.kernel_config.ir_op_priority
    for first in (getattr(priority, op)[0] for op in FUNCTIONAL):
        if first != decision.provider:
            return f"the IR priority was set to begin with {first!r}"
    spec = calls.spec_of(decision.provider, norm.has_weight, norm.variance_size_override)
    return "its kernel was declined" if trial.any_declined(norm.weight, dtype, spec, calls.called_ops()) else ""
