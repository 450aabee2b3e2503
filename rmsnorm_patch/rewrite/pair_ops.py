"""What a rewritten layer calls in place of `a + b`: the fused call where the guards hold, else the original arithmetic.

`in_layer` and `tail` are the hot path of an eager decode step: positional arguments only, one look-up of the norm's
class, no context managers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules import module as _module

from .. import observe, ops
from . import guards
from .classes import STATE, original_class, role_of
from .handover import CARRIED, LINK, MAX_UNTAKEN, Carry, Link

_is_tracing = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_servable = guards.servable
_getframe = sys._getframe
_MODULE_FILE = nn.Module._call_impl.__code__.co_filename
_CHECKPOINTING = "forward_with_checkpointing"
"""Frames of torch's module call and of `GradientCheckpointingLayer` lie between a layer and what called it."""
_OUTPUT_RECORDER = "transformers.utils.output_capturing"
"""Its forward hooks (`output_hidden_states=True`) stay on every layer once used; they keep outputs and edit nothing."""


class NormKernel:
    """What the pair helpers need to know of one patched norm class.

    original: the norm's own forward. fused: the bound op, or None for the reference backend, which is `a + b` and
    then `original`. on_cpu: whether CPU tensors go to `fused` too (a backend that was forced).
    """

    __slots__ = ("eps", "eps_attribute", "fused", "on_cpu", "original", "weight_attribute")

    def __init__(self, cls: type) -> None:
        key: Any = cls._rmsnorm_patch_key  # type: ignore[attr-defined]
        self.original: Callable[..., torch.Tensor] = original_class(cls).forward  # type: ignore[attr-defined]
        self.fused = None if key.backend == "reference" else ops.bind_fused_add_rms_norm(key.spec, key.backend)
        self.on_cpu = key.backend not in ("auto", "reference")
        self.eps_attribute: str | None = key.eps_attribute
        self.eps: float | None = key.spec.eps
        self.weight_attribute: str | None = key.weight_attribute

    def weight_of(self, norm: nn.Module) -> torch.Tensor | None:
        if self.weight_attribute is None:
            return None
        weight = norm._parameters.get(self.weight_attribute)
        return norm._buffers.get(self.weight_attribute) if weight is None else weight

    def eps_of(self, norm: nn.Module) -> Any:
        eps = self.eps if self.eps_attribute is None else getattr(norm, self.eps_attribute)
        return torch.finfo(torch.float32).eps if eps is None else eps  # see `NormSpec.eps`

    def backend(self, x: torch.Tensor, weight: torch.Tensor | None) -> str:
        if self.fused is None or not (x.is_cuda or self.on_cpu):
            return "reference"
        return self.fused.backend_for(x, weight)


_KERNELS: dict[type, NormKernel] = {}


def kernel_of(norm: nn.Module) -> NormKernel | None:
    """The kernel of a patched norm; None for any other module."""
    kernel = _KERNELS.get(norm.__class__)
    if kernel is None and role_of(norm) == "norm" and type(norm).__call__ is nn.Module.__call__:
        kernel = _KERNELS.setdefault(norm.__class__, NormKernel(norm.__class__))
    return kernel


def in_layer(norm: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a + b, norm(a + b)), in one call where the guards hold."""
    if not _is_tracing():
        kernel = _KERNELS.get(norm.__class__) or kernel_of(norm)
        if kernel is not None and _unhooked(norm):
            if kernel.fused is None or not (a.is_cuda or kernel.on_cpu):
                return _in_layer_reference(norm, kernel, a, b)
            weight = kernel.weight_of(norm)
            if _pair_servable(kernel, a, b, weight) and not norm.training:
                normed, total = kernel.fused(a, b, weight, kernel.eps_of(norm))
                if observe.active is not None:
                    backend = kernel.backend(a, weight)
                    observe.active(observe.Event("in_layer", norm, (a, b), normed, total, backend))
                return total, normed
        if observe.active is not None:
            return _in_layer_observed(norm, kernel, a, b)
    total = a + b
    return total, norm(total)


def _in_layer_observed(
    norm: nn.Module, kernel: NormKernel | None, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The original arithmetic, and why."""
    total = a + b
    normed = norm(total)
    if observe.active is not None:
        reason = why_not(norm, kernel, a, b)
        observe.active(observe.Event("in_layer", norm, (a, b), normed, total, "original", reason))
    return total, normed


def _in_layer_reference(
    norm: nn.Module, kernel: NormKernel, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = a + b
    normed = kernel.original(norm, total)
    if observe.active is not None:
        observe.active(observe.Event("in_layer", norm, (a, b), normed, total, "reference"))
    return total, normed


def tail(layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b; where the layer has a Link and the guards hold, with the next norm's result riding on it."""
    if _is_tracing() or _is_grad_enabled():
        return a + b
    state = layer.__dict__.get(STATE)
    link: Link | None = None if state is None else state.get(LINK)
    if link is None:
        return a + b
    norm = link.norm()
    if norm is None or link.untaken >= MAX_UNTAKEN:
        return a + b
    kernel = _KERNELS.get(norm.__class__) or kernel_of(norm)
    if kernel is None or not (_unhooked(norm) and _undisturbed(layer, link)):
        return a + b
    weight = kernel.weight_of(norm)
    if norm.training or not _pair_servable(kernel, a, b, weight):
        return a + b
    if not _called_by(link.loop) or (not link.passive and torch.is_inference_mode_enabled()):
        return a + b
    if kernel.fused is None or not (a.is_cuda or kernel.on_cpu):
        total = a + b
        normed = kernel.original(norm, total)
    else:
        normed, total = kernel.fused(a, b, weight, kernel.eps_of(norm))
    link.untaken += 1
    total.__dict__[CARRIED] = Carry(normed, total, norm, kernel, link)
    if observe.active is not None:
        backend = kernel.backend(a, weight)
        observe.active(observe.Event("cross_layer", norm, (a, b), normed, total, backend))
    return total


def _called_by(loop: CodeType | None) -> bool:
    """Whether the layer that is running now was called, as a module, by `loop`."""
    frame = _getframe(3)  # past this function, `tail` and the layer's own forward
    code = frame.f_code
    while code is not loop:
        if code.co_filename != _MODULE_FILE and code.co_name != _CHECKPOINTING:
            return False
        frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            return False
        code = frame.f_code
    return True


def _pair_servable(kernel: NormKernel, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether a kernel may add `a` and `b` and norm the sum."""
    return (
        _servable(a, weight)
        and type(b) is torch.Tensor
        and a.dtype is b.dtype
        and a.shape == b.shape
        and a.get_device() == b.get_device()
        and b.layout is torch.strided
        and (weight is not None or kernel.weight_attribute is None)
        and not (b.requires_grad and _is_grad_enabled())
    )


def why_not(norm: nn.Module, kernel: NormKernel | None, a: torch.Tensor, b: torch.Tensor) -> str:
    """Why an add and its norm are not one call here, in words."""
    if kernel is None:
        return f"the norm is a {type(norm).__name__} that is not patched"
    if not _unhooked(norm):
        return "the norm has hooks or a forward of its own: it is called as a module"
    if type(a) is not type(b) or a.dtype is not b.dtype or a.shape != b.shape or a.device != b.device:
        sides = (f"{type(x).__name__} {x.dtype} {tuple(x.shape)} on {x.device}" for x in (a, b))
        return f"the operands differ: {', '.join(sides)}"
    weight = kernel.weight_of(norm)
    if weight is None and kernel.weight_attribute is not None:
        return f"the norm's {kernel.weight_attribute} is not a parameter or buffer of its own"
    return guards.reason(a, weight) or guards.reason(b, weight) or (guards.TRAINING if norm.training else "")


def _unhooked(norm: nn.Module) -> bool:
    """False where somebody watches or wraps the norm: it is then called as a module."""
    return not (
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or "forward" in norm.__dict__
    )


def _undisturbed(layer: nn.Module, link: Link) -> bool:
    """True where no foreign code can see the sum between the add and the norm that reads it."""
    for hook in layer._forward_hooks.values():
        if getattr(hook, "__module__", "") != _OUTPUT_RECORDER:
            return False
    if "forward" in layer.__dict__:
        return False
    if link.receiver is None:
        return True
    receiver = link.receiver()
    return receiver is not None and not receiver._forward_pre_hooks and "forward" not in receiver.__dict__
