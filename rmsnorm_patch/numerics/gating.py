"""What a gated norm computes beside its `NormSpec`, and the arithmetic in plain PyTorch, operation for operation.

    norm_first:  y = round_x( norm(x) * act(gate) )     Qwen3-Next, Kimi Linear, OLMo hybrid
    gate_first:  y = norm( x * act(gate) )              Mamba 2, Bamba, Granite hybrid, Zamba 2, Nemotron-H

The activation and its product are fp32 in both. With the gate first the product is not rounded: the norm reads it in
fp32, and rounds before the weight to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ..errors import UnsupportedInput
from . import operands, reference
from .spec import SUPPORTED_DTYPES, NormSpec

Activation = Literal["silu", "sigmoid"]
Order = Literal["norm_first", "gate_first"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
ORDERS: tuple[Order, ...] = ("norm_first", "gate_first")


@dataclass(frozen=True)
class GateSpec:
    """How the gate enters. activation: a key of ACTIVATIONS, taken of the gate in fp32. order: what comes first."""

    activation: Activation
    order: Order

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("order", self.order, ORDERS),
        ):
            if value not in allowed:
                raise ValueError(f"GateSpec.{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")

    def __str__(self) -> str:
        product = f"{self.activation}(gate)"
        return f"times {product}" if self.order == "norm_first" else f"of x times {product}"

    def output_dtype(self, x: torch.dtype, weight: torch.dtype | None, spec: NormSpec) -> torch.dtype:
        """dtype of the result; a product that comes last ends in that of x."""
        return x if self.order == "norm_first" else spec.output_dtype(x, weight)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    spec: NormSpec,
    gating: GateSpec,
    eps: float | None = None,
) -> torch.Tensor:
    """The gated norm of `x` [..., N] with `gate` [..., N] and `weight` [N] or None, shaped as x.

    eps: overrides `spec.eps`. dtype: as `GateSpec.output_dtype`.
    """
    factor = ACTIVATIONS[gating.activation](gate.to(torch.float32))
    if gating.order == "norm_first":
        return (reference.rms_norm(x, weight, spec, eps) * factor).to(x.dtype)
    eps = spec.resolve_eps(x.dtype) if eps is None else eps
    h = reference.divide_by_rms(x.to(torch.float32) * factor, spec, eps)
    return reference.scale(h, x.dtype, weight, spec)


def gated_rms_norm_fp64(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    spec: NormSpec,
    gating: GateSpec,
    eps: float | None = None,
) -> torch.Tensor:
    """The exact value in fp64, without any intermediate rounding."""
    eps = spec.resolve_eps(x.dtype) if eps is None else eps
    factor = ACTIVATIONS[gating.activation](gate.to(torch.float64))
    if gating.order == "norm_first":
        return reference.rms_norm_fp64(x, weight, spec, eps) * factor
    return reference.rms_norm_fp64(x.to(torch.float64) * factor, weight, spec, eps)


def check_gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, op: str) -> None:
    """Raise UnsupportedInput unless the gated norm of these operands is defined for `spec`."""
    operands.check_rms_norm(x, weight, spec, op)
    if gate.shape != x.shape:
        got = f"gate of shape {tuple(gate.shape)} for x of shape {tuple(x.shape)}"
        raise UnsupportedInput(op, got, "equal shapes (no broadcasting)", "expand or reshape before the call")
    if gate.dtype not in SUPPORTED_DTYPES:
        named = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise UnsupportedInput(op, f"gate of dtype {gate.dtype}", f"a gate of dtype {named}", "cast the gate")
    if gate.device != x.device:
        got = f"gate on {gate.device} and x on {x.device}"
        raise UnsupportedInput(op, got, "both on one device", "move one with .to(device)")
