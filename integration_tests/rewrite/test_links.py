"""Exactly when a link rests, what a taken tensor resets, and what tells the loop's call from another's."""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE
from rmsnorm_patch.rewrite import handover, layer_calls, observe
from rmsnorm_patch.rewrite.counts import CALLS

MOST = handover.MAX_UNTAKEN
ONE, OTHER = torch.Size([1, 64]), torch.Size([2, 64])


def link_of(untaken: int) -> handover.Link:
    link = handover.Link()
    link.untaken = untaken
    return link


def test_a_new_link_has_given_nothing_and_is_in_vain_of_nothing() -> None:
    link = handover.Link()
    assert (link.given, link.untaken, link.skipped, link.shape) == (0, 0, 0, None)
    assert (link.depth, link.caller) == (0, 0), "no stack was walked"


def test_a_link_rests_after_so_many_in_vain_and_not_before() -> None:
    assert not link_of(MOST - 1).rests(ONE)
    assert link_of(MOST).rests(ONE)


def test_every_so_many_calls_a_resting_link_tries_again() -> None:
    link = link_of(MOST)
    assert [link.rests(ONE) for _ in range(2 * MOST)] == [*[True] * (MOST - 1), False] * 2


def test_another_shape_ends_the_rest_until_as_many_trials_were_in_vain() -> None:
    link = link_of(MOST)
    assert link.rests(ONE)
    assert not link.rests(OTHER)
    assert link.rests(OTHER)
    for in_vain, rests in ((MOST - 1, False), (MOST, True)):
        link = link_of(MOST + in_vain)
        link.shape, link.skipped = ONE, 1
        assert link.rests(OTHER) is rests


def ready(small_model: Callable[..., nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    model = small_model("llama", num_hidden_layers=3)
    rmsnorm_patch.apply(model, backend="reference")
    return model, torch.arange(3, 9)[None]


def test_what_is_taken_was_not_in_vain(small_model: Callable[..., nn.Module]) -> None:
    model, tokens = ready(small_model)
    link = model.model.layers[0].__dict__[STATE][handover.LINK]
    link.untaken = MOST - 1
    with torch.no_grad():
        model(tokens)
    assert (link.untaken, link.given) == (0, 1)


def test_a_link_that_rests_keeps_its_sum_and_is_tried_again(small_model: Callable[..., nn.Module]) -> None:
    model, tokens = ready(small_model)
    layer, reader = model.model.layers[:2]
    link, counts = layer.__dict__[STATE][handover.LINK], reader.input_layernorm.__dict__[STATE][CALLS]
    link.untaken = MOST
    with torch.no_grad():
        model(tokens)
        assert (link.untaken, link.given, link.skipped) == (MOST, 0, 1)
        why = f"the last {MOST} hand-overs were not taken; it is tried again from time to time"
        assert counts.apart.counts() == {why: 1}
        link.skipped = MOST - 1
        model(tokens)
    assert (link.untaken, link.given, link.skipped) == (0, 1, 0)
    assert counts.apart.counts() == {why: 1}


def test_the_stack_is_walked_once_for_a_link(
    small_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = ready(small_model)
    links = [layer.__dict__[STATE][handover.LINK] for layer in model.model.layers]
    with torch.no_grad():
        model(tokens)
        monkeypatch.setattr(layer_calls, "_PASSING", None)  # another walk would stumble over it
        model(tokens)
    assert [link.given for link in links] == [2, 2, 2]


def test_a_wrapper_as_deep_as_torchs_own_calls_is_no_call_by_the_loop(
    small_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may edit the sum, and stands where torch's module call stood when the stack was walked."""
    model, tokens = ready(small_model)
    link = model.model.layers[0].__dict__[STATE][handover.LINK]
    kinds: list[str] = []
    with torch.no_grad(), observe.observing(lambda event: kinds.append(event.kind)):
        model(tokens)
        assert kinds.count("cross_layer") == 3
        frames = link.depth - link.caller

        def call(layer: nn.Module, *given: object, **named: object) -> object:
            def deeper(left: int) -> object:
                return deeper(left - 1) if left else type(layer).forward(layer, *given, **named)

            return deeper(frames - 2)

        monkeypatch.setattr(type(model.model.layers[0]), "__call__", call)
        kinds.clear()
        model(tokens)
    assert kinds.count("cross_layer") == 0
    assert kinds.count("kept") == 3


def test_a_layer_at_the_bottom_of_a_threads_stack_is_called_by_no_loop(small_model: Callable[..., nn.Module]) -> None:
    model, tokens = ready(small_model)
    layer, reader = model.model.layers[:2]
    link, counts = layer.__dict__[STATE][handover.LINK], reader.input_layernorm.__dict__[STATE][CALLS]

    def without_gradients(*given: object) -> None:
        torch.set_grad_enabled(False)  # of the new thread

    layer.register_forward_pre_hook(without_gradients)
    with torch.no_grad():
        x = model.model.embed_tokens(tokens)
        rotary = model.model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    _thread.start_new_thread(layer, (x,), {"position_embeddings": rotary})
    limit = time.monotonic() + 60
    while not (link.given or counts.apart.counts()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert link.given == 0
    assert counts.apart.counts() == {"the layer was not called by the loop that was read": 1}


def test_a_layer_whose_norm_is_gone_adds() -> None:
    layer, a, b = nn.Identity(), torch.randn(3, 8), torch.randn(3, 8)
    for state in ({}, {handover.LINK: handover.Link()}):
        layer.__dict__[STATE] = state
        with torch.no_grad():
            total = layer_calls.tail(layer, a, b)
        assert torch.equal(total, a + b)
        assert handover.CARRIED not in total.__dict__


def test_nothing_is_handed_over_while_gradients_are_on(small_model: Callable[..., nn.Module]) -> None:
    """Even where no tensor asks for one: the norm would not take it."""
    model, tokens = ready(small_model)
    model.requires_grad_(False)
    layer, reader = model.model.layers[:2]
    link, counts = layer.__dict__[STATE][handover.LINK], reader.input_layernorm.__dict__[STATE][CALLS]
    assert torch.is_grad_enabled()
    model(tokens)
    assert link.given == 0
    assert counts.apart.counts() == {"a gradient may be wanted": 1}
    reader.input_layernorm.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(tokens)
    hooked = "the norm has hooks or a forward of its own: it is called as a module"
    assert counts.apart.counts() == {"a gradient may be wanted": 1, hooked: 1}
