"""What rides on a sum, and each single difference for which it is not taken; what of a hand-over is left of a copy."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE
from rmsnorm_patch.rewrite import handover, layer_calls, observe
from rmsnorm_patch.rewrite.counts import CALLS
from rmsnorm_patch.rewrite.places import Passage, Place


class Twice(nn.Module):
    """Two norms of one class, one without weights, and what their numbers go through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
        self.bare = nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(self.second(self.first(x)))


class Carried:
    """`normed` riding on `total` for `norm`."""

    def __init__(self, name: str = "first", backend: str = "", inference: bool = False) -> None:
        self.model = Twice().eval().requires_grad_(False)
        rmsnorm_patch.apply(self.model, backend="reference")
        self.norm: Any = getattr(self.model, name)
        self.kernel: Any = layer_calls.kernel_of(self.norm)
        self.link = handover.Link(self.norm)
        with torch.inference_mode(inference):
            self.total, self.normed = torch.randn(3, 8), torch.randn(3, 8)
        weight, eps = self.kernel.weight_of(self.norm), self.kernel.eps_of(self.norm)
        handover.put(self.normed, self.total, self.norm, weight, eps, self.kernel, self.link, backend)
        self.counts = self.norm.__dict__[STATE][CALLS]

    def taken(self, norm: nn.Module | None = None, total: torch.Tensor | None = None) -> torch.Tensor | None:
        with torch.no_grad():
            return handover.take(self.norm if norm is None else norm, self.total if total is None else total)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["first", "bare"])
def test_it_is_put_with_what_tells_a_change_and_taken_once(name: str, inference: bool) -> None:
    made = Carried(name, "triton", inference)
    carry = made.total.__dict__[handover.CARRIED]
    weight = getattr(made.norm, "weight", None)
    version, written = None if inference else made.total._version, None if weight is None else weight._version
    told = (made.normed, id(made.total), version, made.norm, weight, written, 1e-6, made.kernel, made.link, "triton")
    assert all(each is want or each == want for each, want in zip(carry, told, strict=True))
    assert (made.link.given, made.link.untaken, made.counts.handed_over) == (1, 1, 0)
    assert made.taken() is made.normed
    assert (made.link.given, made.link.untaken, made.counts.handed_over) == (1, 0, 1)
    assert handover.CARRIED not in made.total.__dict__
    assert made.taken() is None
    assert made.counts.handed_over == 1


def test_a_weight_made_in_inference_mode_counts_no_writes() -> None:
    made = Carried()
    with torch.inference_mode():
        weight = torch.ones(8)
    handover.put(made.normed, made.total, made.norm, weight, 1e-6, made.kernel, made.link)
    carry = made.total.__dict__[handover.CARRIED]
    assert (carry.weight is weight, carry.written, carry.backend) == (True, None, "")


def passed_to_another(made: Carried) -> torch.Tensor | None:
    return made.taken(norm=made.model.second)


def patched_anew(made: Carried) -> torch.Tensor | None:
    rmsnorm_patch.revert(made.model)
    rmsnorm_patch.apply(made.model, backend="auto")
    return made.taken()


def carried_away(made: Carried) -> torch.Tensor | None:
    other = made.total.clone()
    other.__dict__.update(made.total.__dict__)
    return made.taken(total=other)


def written_to(made: Carried) -> torch.Tensor | None:
    made.total.add_(1)
    return made.taken()


def weight_replaced(made: Carried) -> torch.Tensor | None:
    made.norm.weight = nn.Parameter(made.norm.weight.clone(), requires_grad=False)
    return made.taken()


def weight_written(made: Carried) -> torch.Tensor | None:
    made.norm.weight.add_(1)
    return made.taken()


def other_eps(made: Carried) -> torch.Tensor | None:
    made.norm.eps = 2e-6
    return made.taken()


CHANGES = (passed_to_another, patched_anew, carried_away, written_to, weight_replaced, weight_written, other_eps)


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_alone_keeps_it_from_being_taken(change: Callable[[Carried], torch.Tensor | None]) -> None:
    made = Carried()
    assert change(made) is None
    assert (made.link.untaken, made.counts.handed_over) == (1, 0)


def test_the_taken_tensor_is_reported_with_who_made_it() -> None:
    for backend, told in (("triton", "triton"), ("", "reference")):
        made = Carried(backend=backend)
        events: list[observe.Event] = []
        with observe.observing(events.append):
            assert made.taken() is made.normed
        (event,) = events
        assert (event.kind, event.norm, event.total, event.backend) == ("taken", made.norm, None, told)
        assert event.operands[0] is made.total
        assert event.normed is made.normed


@pytest.mark.parametrize("again", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_of_nothing(again: Callable[[Any], Any]) -> None:
    made = Carried()
    assert again(made.total.__dict__[handover.CARRIED]) is None
    link = again(made.link)
    assert type(link) is handover.Link
    assert (link.norm(), link.given, link.untaken) == (None, 0, 0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Runner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last, self.norm = Layer(), Layer(), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.last(self.layer(x)))


def step(runner: Runner, receiver: bool = False, passages: tuple[Passage, ...] = ()) -> handover.HandOver:
    places = Place(runner, "layer", runner.layer), Place(runner, "norm", runner.norm)
    return handover.HandOver(runner.layer, runner.norm, runner.last if receiver else None, True, places, passages)


@pytest.mark.parametrize("receiver", [False, True])
@pytest.mark.parametrize("through", [False, True])
def test_steps_are_those_that_were_given(receiver: bool, through: bool) -> None:
    runner = Runner()
    given = step(runner, receiver, (Passage.through(runner.last, True),) if through else ())
    handed = handover.HandOvers([given], Runner)
    assert handed.steps == (given,)
    assert (handed.runner, handed.digest) == (Runner, handover.HandOvers((), Runner).digest)
    handed.connect()
    link = runner.layer.__dict__[STATE][handover.LINK]
    assert (type(link) is handover.LinkThrough, type(link) is handover.Link) == (through, not through)
    assert link.norm() is runner.norm
    assert (link.receiver and link.receiver()) is (runner.last if receiver else None)
    assert (link.loop, link.passive) == (Runner.forward.__code__, True)
    assert link.places.unchanged()
    runner.last.forward = lambda x: x
    assert link.loop is (None if through else Runner.forward.__code__)


def test_a_module_in_between_that_has_changed_is_named_before_the_caller() -> None:
    runner, x = Runner().eval(), torch.randn(3, 8)
    rmsnorm_patch.apply(runner, backend="reference")
    given = step(runner, passages=(Passage.through(runner.last, True),))
    link = handover.HandOvers([given], Runner).link(given)
    with torch.no_grad():
        why = layer_calls.why_kept(runner.layer, link, runner.norm, x, x)
        assert why == "the layer was not called by the loop that was read"
        runner.last.forward = lambda x: x
        why = layer_calls.why_kept(runner.layer, link, runner.norm, x, x)
        assert why.startswith("a module was hooked, wrapped, moved or put between")


@pytest.mark.parametrize("gone", ["layer", "norm", "last", "places"])
def test_a_step_goes_with_each_of_its_modules(gone: str) -> None:
    runner, elsewhere = Runner(), Runner()
    given = step(runner, receiver=True)
    places = given.places if gone == "places" else step(elsewhere).places
    if gone == "places":
        places = (*places, Place(elsewhere, "layer", elsewhere.layer))
    handed = handover.HandOvers([given._replace(places=places)], Runner)
    del given, places
    assert len(handed.steps) == 1
    if gone == "places":
        del elsewhere
    else:
        delattr(runner, gone)
    gc.collect()
    assert handed.steps == ()


def test_nobody_runs_the_layers_of_hand_overs_without_a_runner() -> None:
    handed = handover.HandOvers(digest="of no source")
    assert (handed.runner, handed._loop, handed.digest, handed.steps) == (None, None, "of no source", ())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_the_runner_links_its_own_layers(again: Callable[[Any], Any]) -> None:
    runner = Runner()
    handed = handover.HandOvers([step(runner, receiver=True)], Runner)
    runner.__dict__[STATE] = {handover.CHAIN: handed}
    handed.connect()
    copied = again(runner)
    link = copied.layer.__dict__[STATE][handover.LINK]
    assert link.norm() is copied.norm
    assert link.receiver() is copied.last
    assert link.loop is Runner.forward.__code__
    assert [each.layer for each in copied.__dict__[STATE][handover.CHAIN].steps] == [copied.layer]


def test_a_step_of_which_a_part_is_not_copied_is_left_out() -> None:
    """Deep copies know the modules that they have made."""
    runner = Runner()
    elsewhere = Runner()
    for foreign in (Place(runner, "layer", elsewhere.layer), Place(elsewhere, "layer", runner.layer)):
        given = step(runner)
        handed = handover.HandOvers([given._replace(places=(*given.places, foreign))], Runner)
        memo: dict[int, Any] = {}
        copy.deepcopy(runner, memo)
        assert copy.deepcopy(handed, memo).steps == ()
    memo = {}
    copied = copy.deepcopy(runner, memo)
    assert [each.layer for each in copy.deepcopy(handover.HandOvers([step(runner)], Runner), memo).steps] == [
        copied.layer
    ]
