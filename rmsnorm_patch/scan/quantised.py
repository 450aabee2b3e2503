"""Products with quantised weights: what they read decides what a norm in front of them may write."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn as nn


def notes(model: nn.Module) -> tuple[str, ...]:
    """A line for a model with such products. No library's forward takes rows that are quantised already."""
    held = Counter(name for module in model.modules() if (name := _quantised(module)))
    if not held:
        return ()
    named = ", ".join(f"{count} x {name}" for name, count in held.most_common(3))
    return (f"products with quantised weights ({named}) quantise their own input or none: norms write plain rows",)


def _quantised(module: nn.Module) -> str:
    """What a product is, and of which weight; "" for any other module."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return ""
    kind = type(weight)
    if kind.__module__.partition(".")[0] == "torchao":
        return f"{type(module).__name__} of {kind.__name__}"
    return f"{type(module).__name__} of {weight.dtype}".replace("torch.", "") if weight.element_size() == 1 else ""
