"""In-layer pairs inside `torch.compile`: one opaque op where a norm alone would be one, else the original arithmetic.

Where `ops.compile_form` chooses the op, an add before an opaque norm would be a kernel and a pass over memory of its
own. Cross-layer pairs stay as they are in graphs: a tensor's attribute is nothing that a graph could carry.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from .. import ops
from . import guards


def in_layer(norm: nn.Module, kernel: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(a + b), a + b). kernel: the norm's NormKernel, or None. Everything here is traced by dynamo."""
    if (
        kernel is not None
        and kernel.fused is not None
        and (kernel.on_cpu or a.device.type == "cuda")
        and ops.compile_form(a.device.type) == "op"
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm.training)
    ):
        weight = kernel.weight_of(norm)
        if (
            (weight is None) is (kernel.weight_attribute is None)
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
