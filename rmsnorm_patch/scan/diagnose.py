"""Why a norm that runs on the probes matches no NormSpec, in words for the plan's table.

Nothing here decides anything: the bitwise comparison has failed, and the reader wants to know what the module is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..numerics.spec import NormSpec
from .probe import (
    PROBE_EPS,
    ROWS,
    Probe,
    candidate_specs,
    check_behaviour,
    dtype_name,
    eps_attributes,
    expected,
    probe_cases,
    run,
    same_bits,
    working_columns,
)
from .subject import Subject

_PLAIN_ROWS = [ROWS.index(name) for name in ("shifted mean", "large values", "one spike", "energy in the last columns")]
_TINY_ROW = [ROWS.index("tiny values")]

Formula = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True).sqrt()


def _std(x: torch.Tensor, unbiased: bool) -> torch.Tensor:
    return x.std(-1, keepdim=True, unbiased=unbiased)


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


# (x, w, eps) in fp64; `w` is the weight, 1 + the weight, or 1. Rows whose mean square drowns eps.
_LOOK_ALIKES: tuple[tuple[str, Formula], ...] = (
    ("it subtracts the mean: a LayerNorm, not an RMSNorm", lambda x, w, _: _centred(x) / _std(x, False) * w),
    ("it subtracts the mean: a LayerNorm, not an RMSNorm", lambda x, w, _: _centred(x) / _std(x, True) * w),
    (
        "it divides by the square root of the sum of squares, not of their mean",
        lambda x, w, _: x / x.pow(2).sum(-1, keepdim=True).sqrt() * w,
    ),
    (
        "it divides by the standard deviation about the mean, not by the root mean square",
        lambda x, w, _: x / _std(x, True) * w,
    ),
    ("it returns the factor 1 / rms alone, not the scaled input", lambda x, w, _: 1 / _rms(x)),
)


def _weight_first(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * weight / _rms(x * weight)


def _eps_outside(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (_rms(x) + eps) * weight


# Rounding in half precision, in the order of a forward that never leaves x.dtype or leaves it too late.
_HALF_ROUNDINGS: tuple[tuple[str, Formula], ...] = (
    (
        "it rounds 1 / rms to the input's dtype before it multiplies",
        lambda x, w, e: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + e).to(x.dtype),
    ),
    (
        "it computes the mean square in the input's half precision",
        lambda x, w, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e),
    ),
)


def explain(subject: Subject) -> str:
    """One sentence on how the subject differs from every NormSpec; `Rejected` where its behaviour says it."""
    columns = working_columns(subject)
    check_behaviour(subject, columns)
    eps_attribute = next(iter(eps_attributes(subject)), None)
    case = next(c for c in probe_cases(columns) if _is_fp32(c) and c.eps == PROBE_EPS[1])
    got = run(subject, case, eps_attribute)
    if got.shape == case.x.shape:
        want = expected(case, _nearest(subject, case, got), case.eps)
        differing = _rows_where(got, want, same_bits)
        if not differing:
            return _half_precision_reason(subject, columns, eps_attribute)
        if not _rows_where(got, want, _within_last_bits):
            return (
                "it computes an RMSNorm in another order of operations (x / sqrt(v) for x * rsqrt(v), say):"
                f" {_count(got, want)} fp32 results differ in the last bits, and only arithmetic that is equal bit for"
                " bit is replaced"
            )
    for reason, formula in _LOOK_ALIKES:
        if _follows(formula, got, subject, case, _PLAIN_ROWS):
            return reason
    if got.shape != case.x.shape:
        return f"its result has the shape {list(got.shape)} for an input of {list(case.x.shape)}"
    if subject.weight_attribute and _follows(_weight_first, got, subject, case, _PLAIN_ROWS):
        return "it multiplies by the weight before the normalisation"
    if _follows(_eps_outside, got, subject, case, _TINY_ROW):
        return "it adds eps outside the square root"
    if set(ROWS) - set(differing) <= {"zeros", "NaN"}:  # which most functions map alike
        return "it computes something other than an RMSNorm on every kind of probe row"
    return f"it computes an RMSNorm on ordinary rows, but not on rows with: {', '.join(differing)}"


def _is_fp32(case: Probe) -> bool:
    return case.x.dtype == case.weight.dtype == torch.float32


def _follows(formula: Formula, got: torch.Tensor, subject: Subject, case: Probe, rows: list[int]) -> bool:
    x = case.x.flatten(0, 1)[rows].double()
    weight = case.weight.double()
    weights = [weight, 1.0 + weight] if subject.weight_attribute else []
    if formula is not _weight_first:
        weights.append(torch.ones_like(weight))
    wanted = (formula(x, weight, case.eps) for weight in weights)
    given = got.double().flatten(0, -2)[rows]
    return any(want.shape == given.shape and torch.allclose(given, want, rtol=1e-3, atol=1e-5) for want in wanted)


def _nearest(subject: Subject, case: Probe, got: torch.Tensor) -> NormSpec:
    def distance(spec: NormSpec) -> tuple[int, int]:
        want = expected(case, spec, case.eps)
        return len(_rows_where(got, want, _within_last_bits)), len(_rows_where(got, want, same_bits))

    return min(candidate_specs(subject), key=distance)


def _rows_where(
    got: torch.Tensor, want: torch.Tensor, agree: Callable[[torch.Tensor, torch.Tensor], bool]
) -> list[str]:
    """Names of the probe rows on which `agree` is false."""
    rows = zip(ROWS, got.flatten(0, -2), want.flatten(0, -2), strict=True)
    return [name for name, a, b in rows if not agree(a, b)]


def _within_last_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=2e-6, atol=0.0, equal_nan=True)


def _count(got: torch.Tensor, want: torch.Tensor) -> str:
    differ = (got != want) & ~(got.isnan() & want.isnan())
    return f"{int(differ.sum())} of {want.numel()}"


def _half_precision_reason(subject: Subject, columns: int, eps_attribute: str | None) -> str:
    """fp32 agrees: name the first dtype pair that no spec explains."""
    for case in probe_cases(columns):
        pair = f"{dtype_name(case.x.dtype)} input"
        if subject.weight_attribute:
            pair += f" with {dtype_name(case.weight.dtype)} weight"
        try:
            got = run(subject, case, eps_attribute)
        except Exception as error:
            if case.x.dtype == case.weight.dtype:
                return f"its forward fails for a {pair} ({type(error).__name__})"
            continue
        if any(same_bits(got, expected(case, spec, case.eps)) for spec in candidate_specs(subject)):
            continue
        for reason, formula in _HALF_ROUNDINGS:
            normed = formula(case.x, case.weight, case.eps)
            products = (normed, normed * case.weight, normed * (1.0 + case.weight))
            if any(same_bits(got, product) for product in products):
                return f"{reason} (seen for a {pair})"
        return f"for a {pair} it rounds where no known RMSNorm does"
    return "it rounds like one RMSNorm for some dtype pairs and like another for others"
