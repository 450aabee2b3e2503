"""What two engines answered to the same prompts, held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def first_other(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Index of the first token that differs; where none does, their number, which has to be one."""
    pairs = enumerate(zip(tokens, others, strict=True))
    return next((at for at, (token, other) in pairs if token != other), len(tokens))


def check_same_or_near(ours: dict[str, Any], theirs: dict[str, Any], exact: bool, tolerance: float) -> None:
    """exact: the same tokens and logprobs, to the bit; else `check_near`."""
    if exact:
        assert (ours["tokens"], ours["logprobs"]) == (theirs["tokens"], theirs["logprobs"])
    else:
        check_near(ours, theirs, tolerance)


def check_near(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Logprobs up to a token that is another: random weights have ties."""
    for tokens, others, got, want in zip(
        ours["tokens"], theirs["tokens"], ours["logprobs"], theirs["logprobs"], strict=True
    ):
        same = first_other(tokens, others)
        assert same > 0
        assert got[:same] == pytest.approx(want[:same], abs=tolerance)
