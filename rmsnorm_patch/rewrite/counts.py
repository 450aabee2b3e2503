"""What each patched norm's calls came to, counted in every thread whether or not anybody observes.

A count is one addition to an attribute of an object in the norm's own state. Under the GIL none is lost, since nothing
between reading and writing lets another thread run; without it, some may be.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from ..patch_state import STATE

CALLS = "calls"
"""Key in the state of a patched norm; holds its Calls."""
MAX_REASONS = 16
"""Reasons that a norm keeps apart; some name shapes, and a server sees ever new ones."""
OTHER = "other reasons"


class _Tally:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Reasons:
    """How often each reason was given."""

    __slots__ = ("_tallies",)

    def __init__(self) -> None:
        self._tallies: dict[str, _Tally] = {}

    def add(self, reason: str) -> None:
        """Count it once more; under OTHER where there are too many reasons."""
        tally = self._tallies.get(reason)
        if tally is None:
            known = reason if reason and len(self._tallies) < MAX_REASONS else OTHER
            tally = self._tallies.setdefault(known, _Tally())
        tally.n += 1

    def counts(self) -> dict[str, int]:
        return {reason: tally.n for reason, tally in list(self._tallies.items())}


class Calls:
    """Of one norm, since `apply`. Copies and pickles start at zero.

    fused: computed with their add. added: computed with the add behind them. handed_over: taken from the layer before.
    alone: computed by a kernel without an add. reference: by the model's own operations, since no kernel is for that
    device or backend. fallen_back: by the original arithmetic, since a guard said so. apart: adds that were to be
    computed with this norm and were not. together: by a kernel that computes the query's and the key's norm in one
    launch; rotated: and their rotation. single: calls that were to be computed so and were not; unrotated: calls that
    were to be rotated so and were not; each of these is counted among the others, too.
    """

    __slots__ = (
        *("added", "alone", "apart", "fallen_back", "fused", "handed_over", "reference", "rotated", "single"),
        *("together", "unrotated"),
    )

    def __init__(self) -> None:
        self.fused = 0
        self.added = 0
        self.handed_over = 0
        self.alone = 0
        self.reference = 0
        self.fallen_back = Reasons()
        self.apart = Reasons()
        self.together = 0
        self.rotated = 0
        self.unrotated = Reasons()
        self.single = Reasons()

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()


def calls_of(norm: nn.Module) -> Calls:
    """The norm's Calls; one that nobody reads where a revert in another thread has taken them away."""
    try:
        calls: Calls = norm.__dict__[STATE][CALLS]
    except KeyError:
        return Calls()
    return calls
