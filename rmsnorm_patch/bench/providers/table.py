"""The table that providers are entered in, by two decorators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...numerics.spec import NormSpec

Call = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    """Who computes one op in a benchmark, by name. in_place: results are written over its operands."""

    name: str
    op: str
    call: Call
    in_place: bool = False


MAKERS: dict[tuple[str, str], tuple[Callable[[NormSpec], Call], bool]] = {}
OURS_BY_OP: set[tuple[str, str]] = set()


def provider(name: str, op: str, in_place: bool = False):
    """Register `make()` -> callable. A peer computes one rounding at the end, whatever variant is asked for."""

    def register(make: Callable[[], Call]) -> Callable[[], Call]:
        MAKERS[name, op] = (lambda _: make(), in_place)
        return make

    return register


def ours(name: str, op: str, in_place: bool = False):
    """Register `make(spec)` -> callable: one of our kernels, which come in every variant."""

    def register(make: Callable[[NormSpec], Call]) -> Callable[[NormSpec], Call]:
        MAKERS[name, op] = (make, in_place)
        OURS_BY_OP.add((name, op))
        return make

    return register
