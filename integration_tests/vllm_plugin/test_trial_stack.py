"""Trials are asked for in the midst of a compilation: they must not depend on how deep that is, nor on its modes."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rmsnorm_patch import ops
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.spec import NormSpec
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


def test_a_trial_is_none_of_the_other_threads_business() -> None:
    """They serve forwards meanwhile, which a trace must hold."""
    begun, asked = threading.Event(), threading.Event()

    def wait() -> str:
        begun.set()
        return str(asked.wait(60))

    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(trial.on_a_fresh_stack("rms_norm", wait)))
    other.start()
    assert begun.wait(60)
    during = trial.is_trial()
    asked.set()
    other.join()
    assert found == ["True"]
    assert not during


def test_what_is_bound_anew_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend may serve it."""
    tried: list[str] = []

    def run(op: str, *_: object) -> str:
        tried.append(op)
        return ""

    monkeypatch.setattr(trial, "on_a_fresh_stack", run)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    x = FakeTensor(fake, torch.empty(1, 96, dtype=torch.bfloat16, device="meta"), torch.device("cuda:0"))
    spec = NormSpec(has_weight=False)

    def ask() -> None:
        assert trial.declined(x, None, spec, "rms_norm") == ""
        assert trial.declined_norm_add(x, None, spec, following=False) == ""
        quant = QuantSpec("fp8_token")
        assert trial.declined_quantised(x, None, spec, quant, adds=False, bounded=False) == ""

    ops.forget()
    try:
        ask()
        ask()
        assert len(tried) == 3
        ops.forget()
        ask()
        assert len(tried) == 6
    finally:
        ops.forget()
