"""A norm's attributes beside weight and eps: what it computes was probed with the values that they had."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import rmsnorm_patch

WIDTH = 64


class FlaggedRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.eps = 1e-6
        self.zero_centered = False
        self.register_parameter("bias", None)
        self.register_buffer("scale", None)
        self.name = "norm"

    def _normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self._normed(hidden_states.float())
        weight = 1.0 + self.weight.float() if self.zero_centered else self.weight.float()
        normed = normed * weight
        if self.scale is not None:
            normed = normed * self.scale
        return (normed if self.bias is None else normed + self.bias).to(hidden_states.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2, self.mlp = FlaggedRMSNorm(), FlaggedRMSNorm(), nn.Linear(WIDTH, WIDTH)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm1(x))
        return self.norm2(x)


def set_flag(norm: nn.Module) -> None:
    norm.zero_centered = True


def set_bias(norm: nn.Module) -> None:
    norm.bias = nn.Parameter(torch.ones(WIDTH))


def register_bias(norm: nn.Module) -> None:
    norm.register_parameter("bias", nn.Parameter(torch.ones(WIDTH)))


def register_scale(norm: nn.Module) -> None:
    norm.register_buffer("scale", torch.full((WIDTH,), 3.0))


def set_helper(norm: nn.Module) -> None:
    norm._normed = lambda hidden_states: hidden_states


CHANGES = [set_flag, set_bias, register_bias, register_scale, set_helper]


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_norm_whose_code_reads_another_value_computes_with_it(interpreter, change: Callable) -> None:
    model, x = Layer(), torch.randn(3, WIDTH)
    changed = copy.deepcopy(model)
    for norm in (changed.norm1, changed.norm2):
        change(norm)
    with torch.no_grad():
        expected = changed(x)
        rmsnorm_patch.apply(model, backend="triton")
        before = model(x)
        for norm in (model.norm1, model.norm2):
            change(norm)
        assert type(model.norm1) is FlaggedRMSNorm
        assert not torch.allclose(before, expected, rtol=1e-2)
        assert torch.equal(model(x), expected)
    notes = rmsnorm_patch.status(model).notes
    assert "norm1 is a FlaggedRMSNorm that is not patched; it was patched by apply, which can be called again" in notes
    rmsnorm_patch.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_what_its_code_does_not_read_leaves_it_patched() -> None:
    model, x = Layer(), torch.randn(3, WIDTH)
    rmsnorm_patch.apply(model)
    patched = type(model.norm1)
    with torch.no_grad():
        model.norm1.name = "another"
        model.norm1.zero_centered = False
        model.norm1.note = "new"
        model.norm1.eps = 0.25
        model.norm1.weight = nn.Parameter(torch.ones(WIDTH))
        model.norm1.bias = None
        del model.norm1.note
        model.train().eval().double().float()
    assert type(model.norm1) is patched
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again.norm1) is patched
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


class Mode:
    """A value that is no number, flag or word: the same object is the same value, another is not."""


MODE = Mode()


@pytest.mark.parametrize(
    ("value", "again"), [(MODE, MODE), ((1, 2.5), tuple([1, 2.5]))], ids=["itself", "an equal one"]
)
def test_a_value_that_it_has_already_leaves_it_patched(value: object, again: object) -> None:
    model = Layer()
    model.norm2.zero_centered = value
    rmsnorm_patch.apply(model)
    patched = type(model.norm2)
    model.norm2.zero_centered = again
    model.norm2.register_buffer("another", torch.ones(1))
    model.norm2.register_parameter("third", nn.Parameter(torch.ones(1)))
    assert type(model.norm2) is patched is not FlaggedRMSNorm
    model.norm2.zero_centered = Mode()
    assert type(model.norm2) is FlaggedRMSNorm


def put_a_forward(norm: nn.Module) -> None:
    norm.forward = MethodType(FlaggedRMSNorm.forward, norm)


def hook(norm: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(norm, hooks.ModelHook())


@pytest.mark.parametrize("change", [put_a_forward, hook], ids=lambda change: change.__name__)
def test_a_norm_with_a_forward_of_its_own_has_it_again(interpreter, change: Callable) -> None:
    model, x = Layer(), torch.randn(3, WIDTH)
    norm, changed = model.norm1, copy.deepcopy(model)
    changed.norm1.zero_centered = True
    change(norm)
    held, keys = {name: norm.__dict__.get(name) for name in ("forward", "_old_forward")}, set(norm.__dict__)
    rmsnorm_patch.apply(model, backend="triton", include=["norm1"])
    assert type(norm) is not FlaggedRMSNorm
    assert {name: norm.__dict__.get(name) for name in held} != held
    norm.zero_centered = True
    assert type(norm) is FlaggedRMSNorm
    assert {name: norm.__dict__.get(name) for name in held} == held
    assert norm.__dict__.keys() == keys
    with torch.no_grad():
        assert torch.equal(model(x), changed(x))


def test_a_flag_whose_classs_value_shows_again(interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlaggedRMSNorm, "zero_centered", True, raising=False)
    model, x = Layer(), torch.randn(3, WIDTH)
    changed = copy.deepcopy(model)
    del changed.norm1.zero_centered
    rmsnorm_patch.apply(model, backend="triton")
    del model.norm1.zero_centered
    assert type(model.norm1) is FlaggedRMSNorm
    rmsnorm_patch.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x), changed(x))


def test_a_flag_of_a_norm_with_a_parametrised_weight() -> None:
    """Whose class somebody derived from the patched one."""

    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model, x = Layer(), torch.randn(3, WIDTH)
    other = copy.deepcopy(model)
    rmsnorm_patch.apply(model)
    for each in (model, other):
        parametrize.register_parametrization(each.norm1, "weight", Double())
        each.norm1.zero_centered = True
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
        rmsnorm_patch.revert(model)
        assert torch.equal(model(x), other(x))


def test_a_norm_that_gets_its_helper_back_is_patched_by_the_next_apply(interpreter) -> None:
    model, x = Layer(), torch.randn(3, WIDTH)
    rmsnorm_patch.apply(model, backend="triton")
    with torch.no_grad():
        expected = model(x)
        set_helper(model.norm1)
        del model.norm1._normed
        assert type(model.norm1) is FlaggedRMSNorm
        rmsnorm_patch.apply(model, backend="triton")
        assert type(model.norm1) is not FlaggedRMSNorm
        assert torch.equal(model(x), expected)
