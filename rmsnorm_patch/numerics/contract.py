"""The plain ops, a row each: registration, binding, both backends, the plugin's trial and the benchmark loop over them.

An op whose host side decides something is no row but a folder of `fused`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import operands, reference
from .spec import NormSpec

SPEC_ARGUMENTS = (
    "float? eps, str round_before_weight='input', str weight_offset='none', str output='promote', "
    "str sum='rounded', int? width=None, int? group=None, str backend='auto', "
    "bool enable_pdl=True"
)
"""What every schema ends with: a NormSpec travels as primitive arguments."""
IMPLIED_EPS = NormSpec(eps=None).resolve_eps(torch.float32)
"""What a call of an op with eps=None adds."""


@dataclass(frozen=True)
class PlainOp:
    """One row. Its functions take the op's tensors, the weight (or None) and a NormSpec.

    code: launcher.c's number of the op. operands: tensors in front of the weight, x [..., N] and for fused_add the
    residual [..., N]. check(..., spec, name) raises UnsupportedInput; reference(..., spec, eps) gives what the op
    does, results contiguous; fake(..., spec) gives its results without values.
    """

    name: str
    code: int
    schema: str
    operands: int
    in_place: bool
    check: Callable[..., None]
    reference: Callable[..., Any]
    fake: Callable[..., Any]

    @property
    def fused_add(self) -> bool:
        return self.operands == 2

    def results(self, returned: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """(normed,) or (normed, sum) of a call that was given these operands, wherever the op leaves them."""
        if self.in_place:
            return given
        return (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float) -> torch.Tensor:
    return reference.rms_norm(x, weight, spec, eps).contiguous()


def _fused_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, eps)
    return normed.contiguous(), total.contiguous()


def _in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float) -> None:
    normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, eps)
    residual.copy_(total)
    x.copy_(normed)


def _fake_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=spec.output_dtype(x.dtype, None if weight is None else weight.dtype))


def _fake_fused_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.new_empty(x.shape, dtype=operands.sum_dtype(x, residual))
    return _fake_rms_norm(total, weight, spec), total


def _fake_in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> None:
    return None


RMS_NORM = PlainOp(
    name="rms_norm",
    code=0,
    schema=f"(Tensor x, Tensor? weight, {SPEC_ARGUMENTS}) -> Tensor",
    operands=1,
    in_place=False,
    check=operands.check_rms_norm,
    reference=_rms_norm,
    fake=_fake_rms_norm,
)
FUSED_ADD = PlainOp(
    name="fused_add_rms_norm",
    code=1,
    schema=f"(Tensor x, Tensor residual, Tensor? weight, {SPEC_ARGUMENTS}) -> (Tensor, Tensor)",
    operands=2,
    in_place=False,
    check=operands.check_mixed_add,
    reference=_fused_add,
    fake=_fake_fused_add,
)
FUSED_ADD_IN_PLACE = PlainOp(
    name="fused_add_rms_norm_",
    code=2,
    schema=f"(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, {SPEC_ARGUMENTS}) -> ()",
    operands=2,
    in_place=True,
    check=operands.check_in_place,
    reference=_in_place,
    fake=_fake_in_place,
)
PLAIN_OPS = {op.name: op for op in (RMS_NORM, FUSED_ADD, FUSED_ADD_IN_PLACE)}
FUNCTIONAL = tuple(op.name for op in PLAIN_OPS.values() if not op.in_place)
"""Ops that leave their operands alone."""
