"""Loops over layers, written in other ways: each pair between two layers has a line in the plan, and the bits stay."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn as nn
from small_layers import Function, InPlaceThroughout, Model, patched_counts
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe


class Runner(nn.Module):
    def __init__(self, container=nn.ModuleList) -> None:
        super().__init__()
        made = Model(Function)
        children = list(made.layers)
        if container is nn.ModuleDict:
            self.layers = nn.ModuleDict({f"l{at}": layer for at, layer in enumerate(children)})
        else:
            self.layers = container(children) if container is nn.ModuleList else container(*children)
        self.norm = made.norm
        self.eval()


class OverSequential(Runner):
    container = nn.Sequential

    def __init__(self) -> None:
        super().__init__(nn.Sequential)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ByIndex(Runner):
    def forward(self, x):
        for i in range(len(self.layers)):
            x = self.layers[i](x)
        return self.norm(x)


class ByIndexBackwards(Runner):
    def forward(self, x):
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            x = layer(x)
        return self.norm(x)


class Enumerated(Runner):
    def forward(self, x):
        for _, layer in enumerate(self.layers[:3]):
            x = layer(x)
        return self.norm(x)


class Zipped(Runner):
    def forward(self, x):
        for layer, _ in zip(self.layers, range(3)):  # noqa: B905
            x = layer(x)
        return self.norm(x)


class OverDictionary(Runner):
    def __init__(self) -> None:
        super().__init__(nn.ModuleDict)

    def forward(self, x):
        for _, layer in self.layers.items():
            x = layer(x)
        return self.norm(x)


class ScaledSequence(nn.Sequential):
    def forward(self, x, scale=2.0):
        for layer in self:
            x = layer(x) * scale
        return x


class ScaledList(nn.ModuleList):
    forward = ScaledSequence.forward


class ScaledDictionary(nn.ModuleDict):
    def forward(self, x, scale=2.0):
        for layer in self.values():
            x = layer(x) * scale
        return x


class OverScaledSequence(Runner):
    """Its children have a forward of their own, which this loop does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = ScaledSequence(*self.layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class OverScaledList(OverScaledSequence):
    def __init__(self) -> None:
        super().__init__()
        self.layers = ScaledList(self.layers)


class OverScaledDictionary(Runner):
    def __init__(self) -> None:
        super().__init__()
        self.layers = ScaledDictionary({f"l{at}": layer for at, layer in enumerate(self.layers)})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return self.norm(x)


class OtherNameOfSelf(Runner):
    def forward(this, x):
        for layer in this.layers:
            x = layer(x)
        return this.norm(x)


LOOPS = (
    *(OverSequential, ByIndex, ByIndexBackwards, Enumerated, Zipped, OverDictionary),
    *(OverScaledSequence, OverScaledList, OverScaledDictionary, OtherNameOfSelf),
)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("runner", LOOPS, ids=lambda r: r.__name__)
def test_loops(runner: type[nn.Module], x: torch.Tensor, mode) -> None:
    with mode():
        ran = patched_counts(runner(), x)
    assert (ran["cross_layer/reference"], ran["taken/reference"]) == (3, 3), ran


class Unrolled(Runner):
    def forward(self, x, scale=None):
        x = self.layers[0](x)
        x = self.layers[1](x)
        if scale is not None:
            x = x * scale
        x = self.layers[-1](x)
        return self.norm(x)


class TwoWays(Runner):
    def forward(self, x, deep=None):
        x = self.layers[0](x)
        if deep is not None:
            x = self.layers[1](x)
        x = self.layers[2](x)
        return self.norm(x)


class ByAnotherFunction(Runner):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        return self.norm(self.run(x))


class CalledSequential(OverSequential):
    def forward(self, x):
        x = self.layers(x)
        return self.norm(x)


class FilledList(Runner):
    def forward(self, x):
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.norm(states[-1])


def lines(model: nn.Module) -> list[tuple[str, str, str]]:
    pairs = rmsnorm_patch.plan(model, backend="reference").pairs
    return sorted((pair.layer, pair.norm, pair.action) for pair in pairs if pair.kind in ("cross_layer", "final"))


IN_TURN = [("layers.0", "layers.1.norm1"), ("layers.1", "layers.2.norm1"), ("layers.2", "norm")]


@pytest.mark.parametrize("runner", [Unrolled, FilledList], ids=lambda r: r.__name__)
def test_order_from_the_trace(runner: type[nn.Module], x: torch.Tensor) -> None:
    fused = [(*pair, "fuse") for pair in IN_TURN]
    if runner is Unrolled:  # with the argument that may be left out, something else reads the sum
        fused[1] = (*IN_TURN[1], "leave")
    assert lines(runner()) == fused
    ran = patched_counts(runner(), x)
    wanted = sum(action == "fuse" for *_, action in fused)
    assert (ran["cross_layer/reference"], ran["taken/reference"]) == (wanted, wanted)


def test_a_sequential_that_is_called(x: torch.Tensor) -> None:
    model = CalledSequential()
    assert lines(model) == [(*pair, "fuse") for pair in IN_TURN]
    ran = patched_counts(model, x)
    assert (ran["cross_layer/reference"], ran["taken/reference"]) == (3, 3)


def test_layers_called_by_another_function_have_a_line(x: torch.Tensor) -> None:
    model = ByAnotherFunction()
    assert lines(model) == [(*pair, "leave") for pair in IN_TURN]
    assert not patched_counts(model, x)["cross_layer/reference"]


@pytest.mark.parametrize("deep", [None, True])
def test_two_orders_of_the_same_layers(x: torch.Tensor, deep) -> None:
    model = TwoWays()
    assert lines(model) == sorted([*((*pair, "fuse") for pair in IN_TURN), ("layers.0", "layers.2.norm1", "leave")])
    with torch.no_grad():
        expected = model(x, deep)
        rmsnorm_patch.apply(model, backend="reference")
        assert torch.equal(model(x, deep), expected)


def test_a_copy_between_layers_has_a_line(x: torch.Tensor) -> None:
    model = Model(InPlaceThroughout)
    assert [action for *_, action in lines(model)] == ["leave", "leave", "fuse"]
    reasons = {pair.reason for pair in rmsnorm_patch.plan(model).pairs if pair.kind == "cross_layer"}
    assert reasons == {"the norm reads a copy of its sum"}
    ran = patched_counts(model, x)
    assert (ran["cross_layer/reference"], ran["taken/reference"]) == (1, 1)


@pytest.mark.parametrize("decoder", [False, True])
def test_sub_layers_of_t5(decoder: bool) -> None:
    configuration = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = (T5ForConditionalGeneration if decoder else T5EncoderModel)(configuration).eval()
    ids = torch.arange(12).view(2, 6)
    named = {"decoder_input_ids": ids} if decoder else {}
    found = rmsnorm_patch.plan(model, backend="reference").counts()
    across = {"cross_layer/fuse": 13, "cross_layer/leave": 3, "final/fuse": 2}
    assert {kind: found.get(kind) for kind in across} == (
        across if decoder else {"cross_layer/fuse": 5, "cross_layer/leave": None, "final/fuse": 1}
    )
    with torch.no_grad():
        expected = model(ids, **named)[0]
        rmsnorm_patch.apply(model, backend="reference", verify={"input_ids": ids, **named})
        ran: Counter[str] = Counter()
        with observe.observing(lambda event: ran.update([event.kind])):
            assert torch.equal(model(ids, **named)[0], expected)
    assert ran["taken"] == ran["cross_layer"] == found["cross_layer/fuse"] + found["final/fuse"]
