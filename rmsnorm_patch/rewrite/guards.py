"""When a kernel may serve a call; anything else runs the original arithmetic.

`servable` is on the path of every eager decode step, so it is one expression of cheap reads; `reason` says afterwards
which of them failed. It reads no tensor's values, and no shapes while a tracer watches.

A launcher reads raw pointers. Whatever gives a tensor a meaning beyond its memory (a subclass such as DTensor, a
quantised or fake tensor, a tracer or mode that must see the ops, vmap and forward-mode differentiation,
autograd) therefore goes to the original arithmetic.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..numerics.spec import SUPPORTED_DTYPES

TRAINING = "the module is in training mode (reentrant checkpointing runs it with grad off); call model.eval()"

_PLAIN = frozenset((torch.Tensor, Parameter))
_DTYPES = frozenset(SUPPORTED_DTYPES)
_float32 = torch.float32
_strided = torch.strided

_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.maybe_current_level
_is_jit_tracing = torch._C._is_tracing


def servable(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether a kernel may compute the norm of `x` [..., N] with `weight` [N] or None in eager mode."""
    if type(x) not in _PLAIN or x.is_meta or x.layout is not _strided or not x.dim():
        return False
    dtype = x.dtype
    if dtype not in _DTYPES:
        return False
    if weight is None:
        return not ((_is_grad_enabled() and x.requires_grad) or ambient())
    return (
        type(weight) in _PLAIN
        and (weight.dtype is dtype or weight.dtype is _float32 or (dtype is _float32 and weight.dtype in _DTYPES))
        and weight.get_device() == x.get_device()
        and not weight.is_meta  # as a CPU tensor, it has device index -1
        and weight.dim() == 1
        and weight.numel() == x.shape[-1]  # comparing two torch.Size costs more than all of the rest
        and not (_is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not ambient()
    )


AMBIENT = (_is_grad_enabled, _dispatch_modes, _is_autocast_enabled, _is_jit_tracing)
"""Functions of no argument. Where all give False or 0, and there is no watching function mode, no function transform
and no forward-mode differentiation, nothing around a call must see the ops (`launcher_pair.h` asks them)."""


def gate_fits(x: torch.Tensor, gate: torch.Tensor) -> bool:
    """Whether a kernel that may norm `x` may read this gate beside it."""
    return (
        type(gate) in _PLAIN
        and gate.dtype in _DTYPES
        and gate.shape == x.shape
        and gate.device == x.device
        and gate.layout is _strided
        and not (gate.requires_grad and _is_grad_enabled())
    )


def gate_reason(x: torch.Tensor, gate: torch.Tensor) -> str:
    """Why `gate_fits(x, gate)` is False, in words; "" where it is True."""
    if gate_fits(x, gate):
        return ""
    if gate.requires_grad and _is_grad_enabled():
        return "a gradient is wanted"
    kind = f"gate is a {type(gate).__name__} {gate.dtype} {tuple(gate.shape)} on {gate.device}"
    return f"{kind}, input {x.dtype} {tuple(x.shape)} on {x.device}"


def ambient() -> bool:
    """Whether something around the call must see the ops: a dispatch or function mode, functorch, autocast, tracing."""
    return (
        _dispatch_modes() > 0
        or (function_modes() > 0 and function_mode_watches())
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _is_autocast_enabled()
        or _is_jit_tracing()
    )


def function_mode_watches() -> bool:
    """Whether a function mode is active other than the default device's, which only places new tensors."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def traceable(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """`servable` inside `torch.compile`: reads that dynamo turns into guards; it handles modes and autocast itself."""
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return False
    if torch.is_autocast_enabled(x.device.type) or type(x) is not torch.Tensor or x.dtype not in SUPPORTED_DTYPES:
        return False
    return weight is None or (
        type(weight) in (torch.Tensor, Parameter)
        and (x.dtype == torch.float32 or weight.dtype in (x.dtype, torch.float32))
        and weight.dtype in SUPPORTED_DTYPES
        and weight.device == x.device
        and weight.shape == x.shape[-1:]
    )


def reason(x: torch.Tensor, weight: torch.Tensor | None) -> str:
    """Why `servable(x, weight)` is False, in words; "" where it is True."""
    if _is_jit_tracing():
        return "torch.jit is tracing"
    if type(x) not in _PLAIN:
        return f"input is a {type(x).__name__}"
    if x.dtype not in _DTYPES:
        return f"input dtype {x.dtype}"
    if x.is_meta:
        return "input on meta"
    if x.layout is not torch.strided or x.dim() == 0:
        return f"input layout {x.layout}, {x.dim()} dimensions"
    if weight is not None:
        if type(weight) not in _PLAIN:
            return f"weight is a {type(weight).__name__}"
        halves = x.dtype is not _float32 and weight.dtype is not _float32
        if weight.dtype not in _DTYPES or (halves and weight.dtype is not x.dtype):
            return f"weight dtype {weight.dtype} for input dtype {x.dtype}"
        if weight.device != x.device:
            return f"weight on {weight.device}, input on {x.device}"
        if weight.shape != x.shape[-1:]:
            return f"weight of shape {tuple(weight.shape)} for rows of {x.shape[-1] if x.ndim else 1}"
    if _is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return "a gradient is wanted"
    if _dispatch_modes() > 0:
        return "a torch dispatch mode is active"
    if function_mode_watches():
        return "a torch function mode is active"
    if _functorch_level() is not None or forward_ad._current_level >= 0:
        return "a function transform is active"
    if _is_autocast_enabled():
        return "autocast is active"
    return ""


def eps_reason(eps: object) -> str:
    """Why `eps` is none that a kernel takes. A tensor is named and not read: that would wait for a GPU."""
    return "" if type(eps) is float else f"eps is a {type(eps).__name__}, no float"
