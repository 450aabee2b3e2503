"""Which gated norm a module computes: a forward of two tensors, run on the probes of plain norms with a gate beside.

Gated norms differ in the activation, in what comes first, in the groups that share an rstd, and in where they round.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn as nn

from ..numerics.gating import ACTIVATIONS, ORDERS, GateSpec, gated_rms_norm
from ..numerics.spec import SUPPORTED_DTYPES, NormSpec
from .probe import (
    WEIGHTED_SPECS,
    Found,
    Probe,
    check_behaviour,
    eps_attributes,
    group_sizes,
    probe_cases,
    same_bits,
)
from .subject import Rejected, Subject, uncompiled_forward

UNKNOWN = "no gated RMSNorm that is known computes what its forward does"


@dataclass(frozen=True)
class _Candidate:
    gating: GateSpec
    spec: NormSpec

    def of(self, case: Probe, gate: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        return gated_rms_norm(case.x, gate, case.weight, self.spec, self.gating, eps)


def find_gated(subject: Subject, module: nn.Module) -> Found | None:
    """The norm and the gating that a subject of two tensors computes bit for bit, in every dtype that x, the weight
    and the gate may have; None where none does. Raises `Rejected` for bad behaviour.

    module: read for its own eps only.
    """
    if subject.weight_attribute is None:
        raise Rejected("a gated norm has one weight")
    for eps_attribute in eps_attributes(subject):
        agreed = _agreeing(subject, eps_attribute)
        if agreed is not None:
            candidate, triples = agreed
            own = getattr(module, eps_attribute)
            spec = replace(candidate.spec, eps=own)
            _check_own_eps(subject, eps_attribute, replace(candidate, spec=spec))
            case = probe_cases(subject.columns[0])[0]
            check_behaviour(subject, subject.columns[0], _gate(case, case.x.dtype))
            return Found(spec, eps_attribute, triples, candidate.gating)
    return None


def takes_gate(cls: type[nn.Module]) -> bool:
    """Whether forward takes two tensors and nothing else; the second may have a default."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return plain and len(parameters) == 2 and parameters[0].default is parameters[0].empty


def _gate(case: Probe, dtype: torch.dtype) -> torch.Tensor:
    return (case.x.float().roll(1, dims=-1).nan_to_num(1.5, 2.5, -2.5) * 0.25).to(dtype)


def _run(subject: Subject, case: Probe, gate: torch.Tensor, eps_attribute: str, eps: object) -> torch.Tensor:
    twin = subject.twin(case.weight.clone())
    twin.__dict__[eps_attribute] = eps
    given = gate.clone()
    result: torch.Tensor = uncompiled_forward(subject.cls)(twin, case.x.clone(), given)
    if not same_bits(given, gate):
        raise Rejected("its forward writes to its gate")
    return result


def _cases(subject: Subject) -> Iterator[tuple[Probe, torch.Tensor]]:
    for case in probe_cases(subject.columns[0]):
        for dtype in SUPPORTED_DTYPES:
            yield case, _gate(case, dtype)


def _agreeing(subject: Subject, eps_attribute: str) -> tuple[_Candidate, int] | None:
    """What explains every probe with this attribute as eps, and how many dtype triples it was seen in."""
    candidates: list[_Candidate] | None = None
    triples: set[tuple[torch.dtype, ...]] = set()
    for case, gate in _cases(subject):
        try:
            got = _run(subject, case, gate, eps_attribute, case.eps)
        except Rejected:
            raise
        except Exception:
            if case.x.dtype == case.weight.dtype == gate.dtype:
                raise
            continue  # a forward that refuses mixed dtypes is judged by those that it takes
        if candidates is None:
            candidates = _plausible(subject, case, gate, got)
        candidates = [each for each in candidates if same_bits(got, each.of(case, gate, case.eps))]
        if not candidates:
            return None
        triples.add((case.x.dtype, case.weight.dtype, gate.dtype))
    return (candidates[0], len(triples)) if candidates else None


def _plausible(subject: Subject, case: Probe, gate: torch.Tensor, got: torch.Tensor) -> list[_Candidate]:
    """Candidates over the whole row, or over groups where no whole row explains the first probe."""
    whole = list(_candidates(None))
    if any(same_bits(got, each.of(case, gate, case.eps)) for each in whole):
        return whole
    return [each for group in group_sizes(subject, subject.columns[0]) for each in _candidates(group)]


def _candidates(group: int | None) -> Iterator[_Candidate]:
    for order, activation, spec in product(ORDERS, ACTIVATIONS, WEIGHTED_SPECS):
        # A product that comes last ends in the input's dtype: what the norm itself would round to is not seen.
        if order == "gate_first" or spec.output == "promote":
            yield _Candidate(GateSpec(activation, order), replace(spec, group=group))  # type: ignore[arg-type]


def _check_own_eps(subject: Subject, eps_attribute: str, candidate: _Candidate) -> None:
    """The module's own eps must mean what other values mean."""
    own = candidate.spec.eps
    if type(own) is not float:
        raise Rejected(f"its {eps_attribute} is {own!r}, not a number that a gated norm can add")
    case = probe_cases(subject.columns[0])[0]
    gate = _gate(case, case.x.dtype)
    if not same_bits(_run(subject, case, gate, eps_attribute, own), candidate.of(case, gate)):
        raise Rejected(f"its own {eps_attribute}={own!r} does not enter as other values of {eps_attribute} do")
