"""Which NormSpec a module computes: run its own forward on probes and keep the specs that agree bit for bit.

Every row of a probe is there to tell one look-alike from an RMSNorm (`ROWS`); dtype pairs tell the rounding axes
apart; two or more values of eps and of the weight tell which attribute is which.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn as nn

from ..numerics import reference
from ..numerics.gating import GateSpec
from ..numerics.spec import (
    FP32_WEIGHT_MULTIPLY,
    GEMMA,
    LLAMA,
    OUTPUT_DTYPES,
    ROUNDINGS,
    SUPPORTED_DTYPES,
    T5,
    WEIGHT_OFFSETS,
    NormSpec,
)
from .subject import Rejected, Subject, uncompiled_forward

WEIGHTLESS = NormSpec(round_before_weight="none", has_weight=False, output="input")
"""Without a weight the rounding axes collapse: one rounding, to x.dtype."""
_COMMON = (LLAMA, FP32_WEIGHT_MULTIPLY, GEMMA, T5)
_OTHERS = tuple(
    NormSpec(round_before_weight=rounding, weight_offset=offset, output=output)
    for rounding, offset, output in product(ROUNDINGS, WEIGHT_OFFSETS, OUTPUT_DTYPES)
)
WEIGHTED_SPECS = tuple(dict.fromkeys((*_COMMON, *_OTHERS)))
WEIGHTLESS_SPECS = (WEIGHTLESS, replace(WEIGHTLESS, output="promote"))
"""Candidates in order of preference: where several agree on every probe, the first is the answer."""

ROWS = ("shifted mean", "tiny values", "large values", "zeros", "one spike", "energy in the last columns", "Inf", "NaN")
PROBE_EPS = (0.0131, 3.7e-6)
"""A large and a usual eps, neither of them a value that a module would have by itself."""


@dataclass(frozen=True)
class Probe:
    """One probe: x [2, rows / 2, columns] and weight [columns], of one dtype pair."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Found:
    """spec: with the module's own eps. eps_attribute: None where eps is a constant in the code. combinations: of
    dtypes, in how many it agrees. gating: of a norm whose forward takes a gate."""

    spec: NormSpec
    eps_attribute: str | None
    combinations: int
    gating: GateSpec | None = None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run foreign code on the CPU without leaving a trace: no grad, no autocast, every RNG put back."""
    python_state = random.getstate()
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    torch_state = torch.random.get_rng_state()
    try:
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would also seed the GPUs
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.random.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


@lru_cache(maxsize=2)  # a wide norm's probes are megabytes
def probe_cases(columns: int) -> tuple[Probe, ...]:
    """Every dtype pair, with at least two draws; narrow norms get more, since a narrow row tells less."""
    generator = torch.Generator().manual_seed(20260301 + columns)
    cases = []
    for draw in range(min(8, max(2, 128 // columns))):
        x = torch.randn(len(ROWS), columns, generator=generator)
        x[0] += 3.0
        x[1] *= 2e-3
        x[2] *= 3e3
        x[3] = 0.0
        x[4, draw % columns] = 300.0
        x[5, columns - max(1, columns // 16) :] *= 50.0
        x[6, draw % columns] = torch.inf
        x[7, draw % columns] = torch.nan
        weight = 0.9 * torch.randn(columns, generator=generator) + 0.3
        for x_dtype, weight_dtype in product(SUPPORTED_DTYPES, SUPPORTED_DTYPES):
            x_cast = x.to(x_dtype).view(2, len(ROWS) // 2, columns)
            cases.append(Probe(x_cast, weight.to(weight_dtype), PROBE_EPS[draw % 2]))
    return tuple(cases)


def same_bits(a: object, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; any NaN equals any NaN (its payload depends on the order of operands)."""
    if not isinstance(a, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[b.element_size()]
    differ = a.contiguous().view(integers) != b.contiguous().view(integers)
    return not bool((differ & ~(a.isnan() & b.isnan())).any())


def run(subject: Subject, case: Probe, eps_attribute: str | None, eps: Any = ..., **state: Any) -> torch.Tensor:
    """The module's own forward on a twin, with eps and other attributes set; whatever forward raises goes through."""
    twin = subject.twin(case.weight.clone())
    if eps_attribute is not None:
        twin.__dict__[eps_attribute] = case.eps if eps is ... else eps
    twin.__dict__.update(state)
    return uncompiled_forward(subject.cls)(twin, case.x.clone())


def expected(case: Probe, spec: NormSpec, eps: float | None = None) -> torch.Tensor:
    return reference.rms_norm(case.x, case.weight if spec.has_weight else None, spec, eps)


def find_spec(subject: Subject, module: object) -> Found | None:
    """The spec that a subject computes bit for bit; None where no spec does. Raises `Rejected` for bad behaviour.

    module: read for its own eps only.
    """
    columns = working_columns(subject)
    for eps_attribute in eps_attributes(subject):
        agreed = _agreeing(subject, columns, eps_attribute, None)
        if agreed is not None:
            own = getattr(module, eps_attribute)
            spec = replace(agreed.spec, eps=own)
            _check_own_eps(subject, columns, eps_attribute, spec)
            check_behaviour(subject, columns)
            return replace(agreed, spec=spec)
    for constant in eps_constants(subject):
        agreed = _agreeing(subject, columns, None, constant)
        if agreed is not None:
            check_behaviour(subject, columns)
            return replace(agreed, spec=replace(agreed.spec, eps=constant))
    return None


def working_columns(subject: Subject) -> int:
    """The first width that forward accepts in fp32; a failure at all of them is the subject's own."""
    for columns in subject.columns:
        try:
            run(subject, probe_cases(columns)[0], None)
        except Rejected:
            raise
        except Exception as error:
            failure = error
        else:
            return columns
    raise Rejected(f"its forward cannot be run on one tensor [2, 4, N] on the CPU ({short(failure)})") from failure


def _agreeing(subject: Subject, columns: int, eps_attribute: str | None, constant: float | None) -> Found | None:
    candidates: list[NormSpec] | None = None
    combinations: set[tuple[torch.dtype, torch.dtype | None]] = set()
    for case in probe_cases(columns):
        eps = case.eps if constant is None else constant
        try:
            got = run(subject, case, eps_attribute)
        except Exception:
            if case.x.dtype == case.weight.dtype:
                return None
            continue  # a forward that refuses mixed dtypes is judged by the pairs that it takes
        if candidates is None:
            candidates = _plausible(subject, case, eps, got)
        candidates = [spec for spec in candidates if same_bits(got, expected(case, spec, eps))]
        if not candidates:
            return None
        combinations.add((case.x.dtype, case.weight.dtype if subject.weight_attribute else None))
    return Found(candidates[0], eps_attribute, len(combinations)) if candidates else None


def candidate_specs(subject: Subject) -> list[NormSpec]:
    """Specs over the whole row, best guess first."""
    return [*(WEIGHTED_SPECS if subject.weight_attribute else ()), *WEIGHTLESS_SPECS]


def _plausible(subject: Subject, case: Probe, eps: float, got: torch.Tensor) -> list[NormSpec]:
    """Candidates over all axes; width and group only where the whole row does not explain the first probe."""
    specs = candidate_specs(subject)
    if any(same_bits(got, expected(case, spec, eps)) for spec in specs):
        return specs
    columns = case.x.shape[-1]
    widths = sorted(k for k in _sizes(subject) if 0 < k < columns)
    return [replace(spec, width=k) for k in widths for spec in specs] + [
        replace(spec, group=g) for g in group_sizes(subject, columns) for spec in specs
    ]


def _sizes(subject: Subject) -> set[int]:
    """Integers among the subject's attributes."""
    sizes: set[int] = set()
    for value in subject.attributes.values():
        sizes.update(size for size in (value if isinstance(value, tuple) else (value,)) if type(size) is int)
    return sizes


def group_sizes(subject: Subject, columns: int) -> list[int]:
    """Columns of a group, which an attribute may name, or their number in a row."""
    sizes = _sizes(subject)
    return sorted({g for k in sizes if k > 0 and columns % k == 0 for g in (k, columns // k) if g < columns})


def _check_own_eps(subject: Subject, columns: int, eps_attribute: str, spec: NormSpec) -> None:
    """`self.eps or 1e-6`, `max(self.eps, ...)`: the module's own eps must mean what other values mean."""
    if spec.eps is not None and not (isinstance(spec.eps, (int, float)) and spec.eps >= 0.0):
        raise Rejected(f"its {eps_attribute} is {spec.eps!r}, not a number that an RMSNorm can add")
    for case in probe_cases(columns):
        try:
            got = run(subject, case, eps_attribute, spec.eps)
        except Exception as error:
            if case.x.dtype == case.weight.dtype:
                raise Rejected(f"it fails with its own {eps_attribute}={spec.eps!r}: {short(error)}") from error
            continue
        if not same_bits(got, expected(case, spec)):
            raise Rejected(f"its own {eps_attribute}={spec.eps!r} does not enter as other values of {eps_attribute} do")


def check_behaviour(subject: Subject, columns: int, gate: torch.Tensor | None = None) -> None:
    """Raises `Rejected` for a forward that is more than a function of its input's rows. gate: of a gated norm's."""
    case = probe_cases(columns)[0]
    forward = uncompiled_forward(subject.cls)
    if gate is not None:
        gated = forward

        def forward(twin: nn.Module, x: torch.Tensor) -> Any:
            return gated(twin, x, gate.reshape(x.shape).clone())

    twin = subject.twin(case.weight.clone())
    x = case.x.clone()
    before = {name: copy.copy(value) for name, value in twin.__dict__.items() if name in subject.attributes}
    attributes = set(twin.__dict__)
    first = forward(twin, x)
    if not isinstance(first, torch.Tensor):
        raise Rejected(f"its forward returns a {type(first).__name__}, not one tensor")
    first = first.clone()
    if not same_bits(x, case.x):
        raise Rejected("its forward writes to its input")
    if not same_bits(forward(twin, x), first):
        raise Rejected("its output changes from call to call (noise, or state kept between calls)")
    weight = getattr(twin, subject.weight_attribute) if subject.weight_attribute else case.weight
    if set(twin.__dict__) != attributes or not same_bits(weight, case.weight) or _changed(twin, before):
        raise Rejected("its forward writes to the module's own attributes")
    trained = subject.twin(case.weight.clone()).train()
    if not all(same_bits(forward(trained, case.x.clone()), first) for _ in range(2)):
        raise Rejected("it computes something else in training mode (dropout or noise)")
    for shape in ((len(ROWS), columns), (2, 2, 2, columns)) if first.shape == case.x.shape else ():
        try:
            got = forward(subject.twin(case.weight.clone()), case.x.reshape(shape))
        except Exception:
            continue  # it refuses this rank, so the model never asks for it
        if not same_bits(got, first.reshape(shape)):
            raise Rejected(f"its result for a {len(shape)}-D input is not the row by row result for a 3-D input")


def _changed(twin: nn.Module, before: dict[str, object]) -> bool:
    for name, value in before.items():
        now = twin.__dict__[name]
        if isinstance(value, (list, dict, set)):
            if type(now) is not type(value) or len(now) != len(value):
                return True
        elif now is not value and type(value).__eq__ is not object.__eq__ and (now == value) is not True:
            return True
    return False


def eps_attributes(subject: Subject) -> list[str]:
    """Attributes that may be eps, the likely ones first; which one it is, the probes tell."""
    values = dict(subject.attributes)
    for code in subject.codes:
        for name in code.co_names:
            value = getattr(subject.cls, name, None)
            if name not in values and type(value) is float:
                values[name] = value
    names = [
        name
        for name, value in values.items()
        if value is None or isinstance(value, float) or (type(value) is int and value == 0)
    ]
    return sorted(names, key=lambda name: ("eps" not in name.lower(), values[name] is None))


def eps_constants(subject: Subject) -> list[float]:
    constants = {c for code in subject.codes for c in code.co_consts if type(c) is float and 0.0 < c < 0.1}
    return [*sorted(constants), 0.0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def short(error: BaseException) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line[:120]}"
