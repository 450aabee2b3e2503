"""Which gated RMSNorm a module computes, `norm(x) * activation(gate)`, found by running its own forward on probes.

The plan of a patched model leaves gated norms alone. A hub layer of that name must say which of them it stands for:
they differ in the activation, and in whether the normed row is rounded before the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..numerics import reference
from ..numerics.spec import NormSpec
from ..scan.probe import WEIGHTED_SPECS, Case, eps_attributes, probe_cases, same_bits, short, undisturbed
from ..scan.subject import Rejected, Subject, class_forward, own_class, reachable_codes

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
_SPECS = tuple(spec for spec in WEIGHTED_SPECS if spec.output == "promote")
"""The gate's product ends in the input's dtype, so what the norm itself would round to at the end is not seen."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Gated:
    """spec: of the norm in front of the gate, with the module's own eps. activation: a key of ACTIVATIONS."""

    spec: NormSpec
    activation: str
    weight_attribute: str
    eps_attribute: str


def infer_gated(module: nn.Module) -> tuple[Gated | None, str]:
    """(what `module` computes, how it was found), or (None, why nothing fits). The module is neither called nor
    changed."""
    try:
        subject = _subject(module)
        with undisturbed():
            for eps_attribute in eps_attributes(subject):
                for activation in ACTIVATIONS:
                    spec = _agreeing(subject, eps_attribute, activation)
                    if spec is not None:
                        found = replace(spec, eps=getattr(module, eps_attribute))
                        assert subject.weight_attribute is not None
                        gated = Gated(found, activation, subject.weight_attribute, eps_attribute)
                        return gated, f"computes a norm times {activation}(gate), bit for bit"
    except Rejected as rejection:
        return None, str(rejection)
    except Exception as error:  # foreign code, which may fail in any way
        return None, f"its forward fails on a probe ({short(error)})"
    return None, "no gated norm that is known computes what its forward does"


def _subject(module: nn.Module) -> Subject:
    tensors = {name: t for store in (module._parameters, module._buffers) for name, t in store.items() if t is not None}
    if len(tensors) != 1 or any(child is not None for child in module._modules.values()):
        raise Rejected("a gated norm has one weight and no sub-module")
    [(name, weight)] = tensors.items()
    if weight.dim() != 1 or not weight.numel():
        raise Rejected(f"its {name} has the shape {tuple(weight.shape)}")
    internals = nn.Module().__dict__
    attributes = {n: v for n, v in module.__dict__.items() if n not in internals and isinstance(v, _PLAIN)}
    cls = own_class(module)
    codes = reachable_codes(cls)
    return Subject(cls, name, name in module._parameters, (weight.numel(),), attributes, codes, "")


def _agreeing(subject: Subject, eps_attribute: str, activation: str) -> NormSpec | None:
    """The norm that explains every probe, with this attribute as eps and this activation."""
    candidates = list(_SPECS)
    for case in probe_cases(subject.columns[0]):
        if case.x.dtype != case.weight.dtype and case.weight.dtype != torch.float32:
            continue  # what a kernel may serve: a weight of the input's dtype, or in fp32
        gate = case.x.roll(1, dims=-1).nan_to_num(1.5, 2.5, -2.5) * 0.25
        twin = subject.twin(case.weight.clone())
        twin.__dict__[eps_attribute] = case.eps
        got = class_forward(subject.cls)(twin, case.x.clone(), gate.clone())
        candidates = [spec for spec in candidates if same_bits(got, _expected(case, gate, spec, activation))]
        if not candidates:
            return None
    return candidates[0]


def _expected(case: Case, gate: torch.Tensor, spec: NormSpec, activation: str) -> torch.Tensor:
    normed = reference.rms_norm(case.x, case.weight, spec, case.eps)
    return (normed * ACTIVATIONS[activation](gate.to(torch.float32))).to(case.x.dtype)
