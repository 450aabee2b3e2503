"""The table that providers are entered in, by two decorators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...numerics.spec import NormSpec

ProviderCall = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    """Who computes one op in a benchmark, by name. in_place: results are written over its operands."""

    name: str
    op: str
    call: ProviderCall
    in_place: bool = False


MAKERS: dict[tuple[str, str], tuple[Callable[[NormSpec], ProviderCall], bool]] = {}
OURS_BY_OP: set[tuple[str, str]] = set()


def provider(name: str, op: str, in_place: bool = False):
    """Register `make()` -> callable. A peer computes one rounding at the end, whatever variant is asked for."""

    def register(make: Callable[[], ProviderCall]) -> Callable[[], ProviderCall]:
        MAKERS[name, op] = (lambda _: make(), in_place)
        return make

    return register


def ours(name: str, op: str, in_place: bool = False):
    """Register `make(spec)` -> callable: one of our kernels, which come in every variant."""

    def register(make: Callable[[NormSpec], ProviderCall]) -> Callable[[NormSpec], ProviderCall]:
        MAKERS[name, op] = (make, in_place)
        OURS_BY_OP.add((name, op))
        return make

    return register
