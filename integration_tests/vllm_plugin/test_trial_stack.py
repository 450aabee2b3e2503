"""Trials are asked for in the midst of a compilation: they must not depend on how deep that is, nor on its modes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rmsnorm_patch.vllm_plugin import trial

CALLS = 200
"""Of a kernel that is built, and more."""


def deep(left: int) -> str:
    return deep(left - 1) if left else ""


def at_the_limit(run, left: int) -> str:
    """What `run` returns, called where fewer than CALLS calls are left."""
    return at_the_limit(run, left - 1) if left else run()


def room() -> int:
    """Calls that are left here, but for half of CALLS."""
    depth, frame = 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return sys.getrecursionlimit() - depth - CALLS // 2


def test_a_trial_has_all_calls_of_the_interpreter() -> None:
    with pytest.raises(RecursionError):
        at_the_limit(lambda: deep(CALLS), room())
    assert at_the_limit(lambda: trial.on_a_fresh_stack("rms_norm", deep, CALLS), room()) == ""


def test_a_trial_computes_with_real_tensors() -> None:
    def kind() -> str:
        return type(torch.ones(1)).__name__

    with FakeTensorMode():
        assert kind() == FakeTensor.__name__
        assert trial.on_a_fresh_stack("rms_norm", kind) == "Tensor"


def test_a_trial_is_known_as_one_and_ends_with_its_error() -> None:
    def ask() -> str:
        return str(trial.is_trial())

    def fail() -> str:
        raise ValueError("of the trial")

    assert trial.on_a_fresh_stack("rms_norm", ask) == "True"
    with pytest.raises(ValueError, match="of the trial"):
        trial.on_a_fresh_stack("rms_norm", fail)
    assert not trial.is_trial()
