"""Patched modules inside `torch.compile`: the original arithmetic, or, where `keeps_op`, opaque ops.

An add before an opaque norm would be a kernel and a pass over memory of its own, so in-layer pairs are one op there.
Cross-layer pairs stay as they are in graphs: a tensor's attribute is nothing that a graph could carry. Of a model whose
norms a pass of Inductor's joins (`inductor.py`), every add and norm stand apart in the graph, and the pass sees both.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from . import guards


def keeps_op(device_type: str) -> bool:
    """Whether the graph of a patched model gets our ops: only where RMSNORM_PATCH_COMPILE asks for them.

    `torch.compile` with default settings runs its graph from Python, and an op costs more there than the kernels that
    Inductor makes of the original arithmetic.
    """
    return bool(os.environ.get(ops.COMPILE_VARIABLE)) and ops.compile_form(device_type) == "op"


def in_layer(norm: nn.Module, kernel: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(a + b), a + b). kernel: the norm's NormKernel, or None. Everything here is traced by dynamo."""
    if (
        kernel is not None
        and kernel.fused is not None
        and not kernel.joined
        and type(a) is torch.Tensor
        and (kernel.on_cpu or a.device.type == "cuda")
        and keeps_op(a.device.type)
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm.training)
    ):
        weight = kernel.weight_of(norm)
        if (
            kernel.attributes.fits(weight)
            and type(b) is torch.Tensor
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.device == b.device
            and guards.traceable(a, weight)
            and guards.traceable(b, weight)
        ):
            return kernel.fused(a, b, weight, kernel.eps_of(norm))  # type: ignore[no-any-return]
    total = a + b
    return norm(total), total
