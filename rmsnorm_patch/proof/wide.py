"""The same weights in the next wider dtype: the run that both the original and the patched model are measured from."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn as nn

from . import memory
from .replica import replica
from .runs import Run, dtype_of


class Unavailable(Exception):
    """No wider run, and why."""


def wide_dtype(model: nn.Module) -> torch.dtype:
    """fp32 for half-precision weights, fp64 for fp32 (norms, rotary tables and softmax that a model computes in fp32
    stay in fp32 there; that part of the error is common to all runs)."""
    return torch.float64 if dtype_of(model) in (torch.float32, torch.float64) else torch.float32


def needed(model: nn.Module, beside: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """Bytes by device of a copy in `wide_dtype` and of what is taken `beside` it.

    Raises Unavailable: weights that are elsewhere or not floating-point, or too little memory.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise Unavailable(f"{name} is not on a device (offloaded)")
        if isinstance(tensor, nn.Parameter) and not _is_the_weight(tensor):
            raise Unavailable(f"{name} is a {type(tensor).__name__} of {tensor.dtype} (quantised or sharded)")
    dtype, total = wide_dtype(model), dict(beside)
    for device, size in memory.of_copy(model, dtype).items():
        total[device] = total.get(device, 0) + int(size * memory.HEADROOM)
        free = memory.free(device)
        if free is not None and total[device] > free:
            raise Unavailable(
                f"with a {dtype} copy it needs {memory.gib(total[device])} GiB on {device}, free {memory.gib(free)}"
            )
    return total


def _is_the_weight(parameter: nn.Parameter) -> bool:
    """Whether its numbers are the weight's own: those of a byte each wait to be multiplied by their scales."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1


def wide_outputs(model: nn.Module, runs: list[Run]) -> list[torch.Tensor]:
    """The logits of `runs` in `wide_dtype`, by a copy of `model`, its patch undone, that is gone afterwards.

    Raises Unavailable, also where a copy does not run in that dtype.
    """
    needed(model, {})
    dtype = wide_dtype(model)
    try:
        wider = _copy(model, dtype)
        return [Run(run.name, _cast(run, dtype))(wider)[0] for run in runs]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise Unavailable(f"a {dtype} copy does not run ({type(error).__name__}: {str(error)[:200]})") from error


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A replica over tensors that were made wide, with a configuration of its own."""
    tensors: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        value = parameter.detach()
        wide = value.to(dtype) if value.is_floating_point() else value
        tensors[id(parameter)] = nn.Parameter(wide, requires_grad=False)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float64:
            tensors[id(buffer)] = buffer.to(dtype)
    wider = replica(model, patched=False, tensors=tensors)
    if dtype == torch.float64 and hasattr(wider, "set_experts_implementation"):
        memo: dict[int, object] = {}  # of one configuration and its parts one copy each
        for module in wider.modules():
            if "config" in module.__dict__:
                module.__dict__["config"] = copy.deepcopy(module.__dict__["config"], memo)
        wider.set_experts_implementation("eager")  # type: ignore[operator]  # torch's grouped matrix product has no fp64
    return wider


def _cast(run: Run, dtype: torch.dtype) -> dict[str, object]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in run.inputs.items()
    }
