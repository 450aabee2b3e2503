"""The same weights in the next wider dtype: the run that both the original and the patched model are measured from."""

from __future__ import annotations

import copy
import os

import torch
import torch.nn as nn

from .runs import Run, dtype_of

_HEADROOM = 1.25
"""Memory asked for, over the bytes of the copy: activations and the allocator's rounding."""


class Unavailable(Exception):
    """No wider run, and why."""


def wide_dtype(model: nn.Module) -> torch.dtype:
    """fp32 for half-precision weights, fp64 for fp32 (norms, rotary tables and softmax that a model computes in fp32
    stay in fp32 there; that part of the error is common to all runs)."""
    return torch.float64 if dtype_of(model) in (torch.float32, torch.float64) else torch.float32


def wide_outputs(model: nn.Module, runs: list[Run]) -> list[torch.Tensor]:
    """The logits of `runs` in `wide_dtype`, by a copy of the (unpatched) model that is gone afterwards.

    Raises Unavailable: weights that are elsewhere or not floating-point, too little memory, a model that cannot be
    copied or does not run in that dtype.
    """
    dtype = wide_dtype(model)
    _check_weights(model)
    _check_memory(model, dtype)
    try:
        made = _copy(model, dtype)
        return [Run(run.name, _cast(run, dtype))(made)[0] for run in runs]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise Unavailable(f"a {dtype} copy does not run ({type(error).__name__}: {str(error)[:200]})") from error


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deepcopy whose tensors are made wide as they are copied: no second copy in the narrow dtype."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        value = parameter.detach()
        wide = value.to(dtype) if value.is_floating_point() else value
        memo[id(parameter)] = nn.Parameter(wide, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() and buffer.dtype != torch.float64 else buffer
    made = copy.deepcopy(model, memo)
    if dtype == torch.float64 and hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")  # type: ignore[operator]  # torch's grouped matrix product has no fp64
    return made


def _cast(run: Run, dtype: torch.dtype) -> dict[str, object]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in run.inputs.items()
    }


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise Unavailable(f"{name} is not on a device (offloaded)")
        if isinstance(tensor, nn.Parameter) and (type(tensor) is not nn.Parameter or not tensor.is_floating_point()):
            raise Unavailable(f"{name} is a {type(tensor).__name__} of {tensor.dtype} (quantised or sharded)")


def _check_memory(model: nn.Module, dtype: torch.dtype) -> None:
    needed: dict[torch.device, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        needed[tensor.device] = needed.get(tensor.device, 0) + tensor.numel() * dtype.itemsize
    for device, size in needed.items():
        free = _free_memory(device)
        if free is not None and size * _HEADROOM > free:
            needs = size * _HEADROOM / 2**30
            raise Unavailable(f"a {dtype} copy needs {needs:.1f} GiB on {device}, free {free / 2**30:.1f}")


def _free_memory(device: torch.device) -> int | None:
    """Bytes; None where nothing is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo", encoding="ascii") as lines:
        found = dict(line.split(":", 1) for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in found else None
