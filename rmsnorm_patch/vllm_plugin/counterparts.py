"""Each norm of an engine's model beside its counterpart in transformers: the eps, and what no provider can make equal.

Runs once a worker, when the model is built and before anything of it is traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .decision import decision_for
from .huggingface import Numerics, numerics_of
from .log import logger, warn_once


def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of vLLM's model loader."""

    def load_model(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, vllm_config, *args, **kwargs)
        if decision_for(vllm_config).numerics:
            align(model, numerics_of(vllm_config.model_config.hf_config))
        return model

    return load_model


def align(model: torch.nn.Module, numerics: Numerics) -> None:
    """Give each norm the eps of its counterpart; one line says how many have one, a warning which have none."""
    served, corrected, others = 0, 0, []
    for path, norm in _norms(model):
        why = _why_not(path, norm, numerics)
        if why:
            others.append(f"{path} ({type(norm).__name__}: {why})")
            continue
        served += 1
        eps = _counterpart(path, norm, numerics).eps
        if norm.variance_epsilon != eps:
            corrected += 1
            norm.variance_epsilon = eps
    text = f"{served} of {served + len(others)} norms compute what transformers' do"
    if corrected:
        text += f", {corrected} of them with its eps in place of vLLM's"
    logger.info("rmsnorm_patch: worker %d: %s", os.getpid(), text)
    if others:
        listed = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        warn_once(f"{len(others)} norms keep the engine's numerics: {listed}")


def _norms(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if "RMSNorm" in type(module).__name__ and not list(module.children()):
            yield path, module


def _counterpart(path: str, norm: Any, numerics: Numerics) -> Any:
    has_weight = getattr(norm, "has_weight", True)
    return numerics.of(path, norm.weight.shape[-1], has_weight)


def _why_not(path: str, norm: Any, numerics: Numerics) -> str:
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    if not isinstance(norm, (RMSNorm, GemmaRMSNorm)):
        return "a class with arithmetic of its own"
    found = _counterpart(path, norm, numerics)
    if found is None:
        return "no norm of that path, or of that length, in transformers' model"
    if found.adds_one != isinstance(norm, GemmaRMSNorm):
        return f"transformers' {found.class_name} computes " + ("1 + w" if found.adds_one else "no 1 + w")
    return ""
