"""What a layer handed over in launcher.c is taken once, and only while nothing has changed since."""

from __future__ import annotations

import pytest
import torch
from native_model import TOKENS, settle
from torch import nn

from rmsnorm_patch.rewrite import handover, layer_calls, native


@pytest.fixture
def carried(patched):
    """(norm, x, what rides on x): a sum that the model's own first layer handed over."""
    model, _ = patched
    with torch.no_grad():
        settle(model)
        kept: list[torch.Tensor] = []
        monkey = native.take

        def keep(norm, hidden_states):
            kept.append(hidden_states)
            return monkey(norm, hidden_states)

        native.take = keep
        try:
            model(TOKENS)
        finally:
            native.take = monkey
        norm = model.model.layers[1].input_layernorm
        link = model.model.layers[0].__dict__["_rmsnorm_patch"][handover.LINK]
        x = kept[1].clone()
        kernel = layer_calls.kernel_of(norm)
        normed = kernel.original(norm, x)
        handover.put(normed, x, norm, norm.weight, norm.variance_epsilon, kernel, link)
        yield norm, x, normed


def test_each_hand_over_in_c_is_counted_once(patched) -> None:
    model, _ = patched
    link = model.model.layers[0].__dict__["_rmsnorm_patch"][handover.LINK]
    with torch.no_grad():
        settle(model)
        for given in (2, 3):
            model(TOKENS)
            assert link.given == given


def test_take_gives_what_rides_there_once(carried) -> None:
    norm, x, normed = carried
    link = x.__dict__[handover.CARRIED].link
    assert link.untaken == 1
    assert native.take(norm, x) is normed
    assert link.untaken == 0
    assert handover.CARRIED not in x.__dict__
    assert native.take(norm, x) is None


def _write(norm, x):
    x.mul_(2)


def _write_weight(norm, x):
    norm.weight.mul_(2)


def _replace_weight(norm, x):
    made = nn.Parameter(norm.weight.clone())
    while made._version < norm.weight._version:  # only its identity tells it from the other
        made.mul_(1.0)
    assert made._version == norm.weight._version
    norm.weight = made


def _change_eps(norm, x):
    norm.variance_epsilon = 0.25


@pytest.mark.parametrize(
    "change", [_write, _write_weight, _replace_weight, _change_eps], ids=lambda change: change.__name__.strip("_")
)
def test_take_refuses_what_is_no_longer_so(carried, change) -> None:
    norm, x, _ = carried
    change(norm, x)
    assert native.take(norm, x) is None
    assert handover.CARRIED not in x.__dict__
    assert handover.take(norm, x) is None


def test_take_refuses_another_tensor_and_another_norm(patched, carried) -> None:
    model, _ = patched
    norm, x, _ = carried
    copy = x.clone()
    copy.__dict__.update(x.__dict__)
    assert native.take(norm, copy) is None
    assert native.take(model.model.layers[2].input_layernorm, x) is None


def test_take_leaves_it_under_grad(carried) -> None:
    norm, x, normed = carried
    with torch.enable_grad():
        assert native.take(norm, x) is None
    assert native.take(norm, x) is normed


def test_take_leaves_a_hooked_norm_to_its_module(carried) -> None:
    norm, x, normed = carried
    norm.register_forward_hook(lambda module, args, output: None)
    assert native.take(norm, x) is None
    assert handover.CARRIED in x.__dict__
    assert norm(x) is normed
