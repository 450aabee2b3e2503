"""The forward of a patched gated norm: one kernel call, else the original. Weight and eps are read at every call."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn

from ..fused.gated_norm import op
from ..patch_state import REPLACED, Read, is_as_read, outside, run_class_forward, running_now
from . import guards, observe
from .attributes import NormKey
from .counts import calls_of
from .guise import in_the_guise_of
from .traced import keeps_op

NO_GATE = "the norm is called without a gate"

_Tensor = torch.Tensor
_is_dynamo_tracing = torch.compiler.is_dynamo_compiling


def forward_of(
    original: type[nn.Module], key: NormKey, read: Read
) -> tuple[FunctionType, Callable[[type], None], op.Bound]:
    """The forward with the original's argument names and defaults, a function that tells it the class that it is made
    for, and what it calls. In one piece for the reason that `norms._forward_of` gives."""
    assert key.gating is not None
    assert key.eps_attribute is not None
    patched: type = original
    own = read.forward
    backend = key.backend
    run = op.bind(key.spec, key.gating, backend)
    attributes = key.attributes
    weight_of, eps_name = attributes.weight_of, key.eps_attribute
    reference_only, automatic = backend == "reference", backend == "auto"

    def belongs_to(cls: type) -> None:
        nonlocal patched
        patched = cls

    def forward(self, hidden_states, gate):  # type: ignore[no-untyped-def]
        if type(self) is not patched and not isinstance(self, patched):  # held by somebody beyond `revert`
            return running_now(self, original, own)(self, hidden_states, gate)
        if _is_dynamo_tracing():
            return traced(self, hidden_states, gate)
        if not is_as_read(original, read) and outside(self):
            calls_of(self).fallen_back.add(REPLACED)
            return run_class_forward(self, original, hidden_states, gate)
        if type(hidden_states) is not _Tensor or type(gate) is not _Tensor:
            why = NO_GATE if gate is None else f"operands are a {_name(hidden_states)} and a {_name(gate)}"
        elif reference_only or (automatic and not hidden_states.is_cuda):
            normed = own(self, hidden_states, gate)
            calls_of(self).reference += 1
            if observe.active:
                report(self, hidden_states, gate, normed, "reference")
            return normed
        else:
            weight, eps = weight_of(self), getattr(self, eps_name)
            why = why_not(self, hidden_states, gate, weight, eps)
            if not why:
                normed = run(hidden_states, gate, weight, eps)
                calls_of(self).alone += 1
                if observe.active:
                    report(self, hidden_states, gate, normed, run.backend_for(hidden_states, gate, weight))
                return normed
        calls_of(self).fallen_back.add(why)
        normed = own(self, hidden_states, gate)
        if observe.active:
            report(self, hidden_states, gate, normed, "original", why)
        return normed

    def why_not(self: nn.Module, x: torch.Tensor, gate: torch.Tensor, weight: Any, eps: Any) -> str:
        """Why no kernel may serve; "" where one may."""
        if self.training:
            return guards.TRAINING
        if type(eps) is float and weight is not None and guards.servable(x, weight) and guards.gate_fits(x, gate):
            return ""
        if weight is None:
            return attributes.missing()
        return guards.eps_reason(eps) or guards.reason(x, weight) or guards.gate_reason(x, gate)

    def traced(self, hidden_states, gate):  # type: ignore[no-untyped-def]
        """Inside `torch.compile`: the op where `keeps_op` and a kernel would run, else the original arithmetic."""
        if not is_as_read(original, read):
            return original.forward(self, hidden_states, gate)
        kind, weight = hidden_states.device.type, weight_of(self)
        if (
            reference_only
            or (automatic and kind != "cuda")
            or not keeps_op(kind)
            or gate is None
            or weight is None
            or self.training
            or gate.shape != hidden_states.shape
            or not (guards.traceable(hidden_states, weight) and guards.traceable(gate, None))
        ):
            return own(self, hidden_states, gate)
        return run.traced(hidden_states, gate, weight, getattr(self, eps_name))

    def report(self, hidden_states, gate, normed, backend, why=""):  # type: ignore[no-untyped-def]
        observe.report(observe.Event("norm", self, (hidden_states,), normed, None, backend, why, gate))

    return in_the_guise_of(original, forward), belongs_to, run


def _name(value: object) -> str:
    return type(value).__name__
