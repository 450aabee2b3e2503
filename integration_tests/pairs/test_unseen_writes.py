"""Code between a layer's add and the norm that reads its sum, and what it may do so that no version shows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn as nn
from small_layers import Base, Function, Model, patched_counts

import rmsnorm_patch


class Runner(nn.Module):
    layer = Function

    def __init__(self) -> None:
        super().__init__()
        made = Model(self.layer)
        self.layers, self.norm, self.doubled = made.layers, made.norm, Doubled()
        self.eval()


def double(x):
    x.data.mul_(2.0)


class Doubled(nn.Module):
    def forward(self, x):
        double(x)


class Data(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x.data.mul_(2.0)
        return self.norm(x)


class DataBehindTheLoop(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        x.data.mul_(2.0)
        return self.norm(x)


class DataAssigned(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x.data = x.data * 2.0
        return self.norm(x)


class DataByName(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            getattr(x, "data").mul_(2.0)  # noqa: B009
        return self.norm(x)


class Array(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x.numpy()[:] *= 2.0
        return self.norm(x)


class OfAnotherLibrary(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            np.multiply(np.asarray(x), 2.0, out=np.asarray(x))
        return self.norm(x)


class Storage(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x.untyped_storage().copy_((x * 2.0).untyped_storage())
        return self.norm(x)


class InAFunction(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            double(x)
        return self.norm(x)


class InAMethod(Runner):
    def twice(self, x):
        double(x)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            self.twice(x)
        return self.norm(x)


class InAModule(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            self.doubled(x)
        return self.norm(x)


class InAnArgument(Runner):
    def forward(self, x, steps=(double,)):
        for layer in self.layers:
            x = layer(x)
            for step in steps:
                step(x)
        return self.norm(x)


def of_variables(every: bool = False):
    step = double
    if every:
        other = double

    class Closure(Runner):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                step(x)
                if x is None:
                    other(x)
            return self.norm(x)

    return Closure


Closure = of_variables()


class AtTheEndOfALayer(Runner):
    class layer(Base):
        def forward(self, x):
            x = x + self.mixer(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
            x.data.mul_(2.0)
            return x

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class AtTheBeginningOfALayer(Runner):
    class layer(Base):
        def forward(self, x):
            x.data.mul_(2.0)
            x = x + self.mixer(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class WithoutALoop(Runner):
    def forward(self, x):
        x = self.layers[0](x)
        x.data.mul_(2.0)
        x = self.layers[1](x)
        self.doubled(x)
        return self.norm(self.layers[2](x))


class Passing(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.held = nn.ModuleList([layer])

    def forward(self, x):
        x = self.held[0](x)
        double(x)
        return x


class Through(Runner):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Passing(layer) for layer in self.layers).eval()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Autocast(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.norm(x)


WRITERS = {
    Data: "`x.data`",
    DataBehindTheLoop: "`x.data`",
    DataAssigned: "`x.data`",
    DataByName: "`getattr(...)`",
    Array: "`x.numpy`",
    OfAnotherLibrary: "`np.multiply(...)`",
    Storage: "`(x * 2.0).untyped_storage`",
    InAFunction: "`x.data`",
    InAMethod: "`x.data`",
    InAModule: "`x.data`",
    InAnArgument: "`step(...)`",
    Closure: "`x.data`",
    AtTheEndOfALayer: "`x.data`",
    AtTheBeginningOfALayer: "`x.data`",
    WithoutALoop: "`x.data`",
    Through: "`x.data`",
    Autocast: "`torch.autocast(...)`",
}
TAKEN = {DataBehindTheLoop: 2, Autocast: 2, AtTheBeginningOfALayer: 1}


@pytest.mark.parametrize("runner", WRITERS, ids=lambda runner: runner.__name__)
def test_nothing_is_handed_over_past_it(runner: type[nn.Module], x: torch.Tensor) -> None:
    model = runner()
    left = [pair for pair in rmsnorm_patch.plan(model).pairs if "may write to the sum" in pair.reason]
    assert left
    assert all(f"the norm, {WRITERS[runner]} may" in pair.reason and pair.action == "leave" for pair in left)
    assert patched_counts(model, x)["taken/reference"] == TAKEN.get(runner, 0)


class Versioned(Runner):
    """torch's own operations, its modules, and functions and methods that call no others."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def edited(self, x, kept):
        kept.append(x)
        largest(self.drop(x), len(kept))

    def forward(self, x):
        kept = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 1:
                x.mul_(2.0)
            self.edited(x, kept)
        return self.norm(x)


def largest(x, bound):
    return torch.clamp(x, -bound, bound).max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_version_shows_costs_one_hand_over(x: torch.Tensor, mode) -> None:
    model = Versioned()
    with mode():
        expected = model(x.clone())
        counts = rmsnorm_patch.apply(model, backend="reference").plan.counts()
        assert (counts["cross_layer/fuse"], counts["final/fuse"]) == (2, 1)
        assert torch.equal(model(x.clone()), expected)
    assert rmsnorm_patch.status(model).counts()["handed_over"] == (2 if mode is torch.no_grad else 0)
