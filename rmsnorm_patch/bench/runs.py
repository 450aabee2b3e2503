"""Runs of cases: every provider is checked against fp64, then timed; what comes out are the rows of a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import cases, providers
from .cases import VARIANTS, Case
from .quantised import QUANTISED
from .rows import FUSED, OURS, PAIR, PLAIN, Row, gain, geometric_mean
from .suites import DTYPE_NAMES, DTYPES, SUITES, Todo

OPS = (FUSED, PLAIN, PAIR, *QUANTISED)
MODES = ("cold", "hot", "chain", "host")
GLANCE_N = (1024, 2048, 4096, 8192, 16384)
"""Row lengths of a run that names neither suites nor shapes."""


@dataclass(frozen=True)
class Shapes:
    """Cases of one op: m rows (tokens, for rms_norm_pair) of n columns each (of one head)."""

    op: str = FUSED
    mode: str = "cold"
    dtype: str = "bf16"
    variant: str = ""
    m: Sequence[int] = (4096,)
    n: Sequence[int] = GLANCE_N


def chosen(suites: Iterable[str], shapes: Shapes, only: Iterable[str] = ()) -> list[Todo]:
    """The cases of `suites`, or of `shapes` where no suite is named. only: names of providers; empty: the case's own.

    Raises ValueError, with what is allowed, for a name that nothing here has.
    """
    suites, only = tuple(suites), tuple(only)
    for name in suites:
        _known("suite", name, SUITES)
    if suites:
        return [Todo(item.case, only or item.only) for name in suites for item in SUITES[name]]
    _known("op", shapes.op, OPS)
    _known("mode", shapes.mode, MODES)
    _known("dtype", shapes.dtype, DTYPES)
    _known("variant", shapes.variant, VARIANTS)
    if shapes.mode == "chain" and shapes.op == PAIR:
        raise ValueError(f"mode 'chain' of {PAIR}: its results are not its operands; use cold, hot or host")
    dtype = DTYPES[shapes.dtype]
    return [Todo(Case(shapes.op, shapes.mode, dtype, m, n, shapes.variant), only) for n in shapes.n for m in shapes.m]


def _known(what: str, name: str, allowed: Iterable[str]) -> None:
    if name not in allowed:
        raise ValueError(f"{what} {name!r}: not one of {', '.join(filter(None, allowed))}")


def rows_of(
    todo: Sequence[Todo],
    extra: Sequence[str] = (),
    replays: int = 20,
    seconds: float = math.inf,
    told: Callable[[str], object] = print,
) -> Iterator[Row]:
    """Rows of `todo`, one after the other; records/README.md says what one holds.

    extra: "[name=]module:function" of further providers. seconds: no case begins after them. told: hears which
    providers are not here, and how many cases were not run.
    """
    loaded: dict[tuple[str, str], list[providers.Provider]] = {}
    begun = time.monotonic()
    for number, item in enumerate(todo):
        if time.monotonic() - begun > seconds:
            told(f"{len(todo) - number} of {len(todo)} cases not run: {seconds:.0f} s are over")
            return
        key = (item.case.op, item.case.variant)
        if key not in loaded:
            ours_alone = bool(item.case.variant)
            loaded[key], missing = providers.load(item.case.op, item.case.spec, only_ours=ours_alone, extra=extra)
            for name, why in missing.items():
                told(f"{item.case.op}: {name} is not here: {why}")
        yield _row(item, loaded[key], replays)
        torch.cuda.empty_cache()


def _row(item: Todo, present: list[providers.Provider], replays: int) -> Row:
    case = item.case
    us, spread, failed = {}, {}, {}
    for provider in present:
        if item.only and provider.name not in item.only:
            continue
        try:
            wrong = cases.check(provider, case)
            if wrong:
                failed[provider.name] = wrong
                continue
            taken = cases.measure(provider, case, replays)
        except Exception as error:  # one peer's limit at one shape must not end the run
            failed[provider.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            torch.cuda.synchronize()
            continue
        us[provider.name] = round(taken.us, 4)
        spread[provider.name] = [round(taken.low, 4), round(taken.high, 4)]
    alone = bool(item.only) and set(item.only) <= set(OURS)
    bound = None if alone else cases.measure_roofline(case, replays)
    shape = {"op": case.op, "mode": case.mode, "dtype": DTYPE_NAMES[case.dtype], "m": case.m, "n": case.n}
    row = {**shape, "variant": case.variant, "bytes": case.bytes, "us": us, "spread": spread, "failed": failed}
    return {**row, "roofline_us": None if bound is None else round(bound, 4)}


def checked(rows: Iterable[Row]) -> str:
    """A line that counts results: those that were right and are timed, and those without a figure."""
    rows = list(rows)
    right, missing = (sum(len(row[key]) for row in rows) for key in ("us", "failed"))
    return f"held against fp64 before they were timed: {right} results right, {missing} without a figure"


def summary(rows: Iterable[Row]) -> list[str]:
    """A line for each op, mode and dtype: the best peer's time over ours."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        ratio = gain(row)
        if ratio:
            groups.setdefault((row["op"], row["mode"], row["dtype"]), []).append(ratio)
    return [
        f"{' '.join(key)}: best peer / ours, geometric mean {geometric_mean(ratios):.3f}, worst {min(ratios):.3f}, "
        f"n={len(ratios)}"
        for key, ratios in groups.items()
    ]
