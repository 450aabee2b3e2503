"""Layers whose forward looks at its own variables, or adds to what is no tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from small_layers import Base, Model, patched_counts

import rmsnorm_patch


class Locals(Base):
    def count(self, **named):
        return len(named)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        count = self.count(**{name: value for name, value in locals().items() if name != "self"})
        return x * count + self.mlp(self.norm2(x))


class Evaluated(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x * eval("len(locals())") + self.mlp(self.norm2(x))


class OwnVariables(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x * len(vars()) + self.mlp(self.norm2(x))


@pytest.mark.parametrize("layer", [Locals, Evaluated, OwnVariables], ids=lambda layer: layer.__name__)
def test_a_forward_that_asks_for_its_variables_keeps_them(layer: type[nn.Module], x: torch.Tensor) -> None:
    check_left_alone(layer, x, "it may ask for its own variables by")


def check_left_alone(layer: type[nn.Module], x: torch.Tensor, why: str) -> None:
    model = Model(layer)
    pairs = [pair for pair in rmsnorm_patch.plan(model).pairs if pair.kind == "cross_layer"]
    assert pairs
    assert all(why in pair.reason for pair in pairs)
    patched_counts(model, x)


class Emptied(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        y = self.mlp(self.norm2(x))
        self = None
        return x + y


class Deleted(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        y = self.mlp(self.norm2(x))
        del self
        return x + y


class Looped(Base):
    def forward(self, x):
        y = self.mlp(self.norm2(x + self.mixer(self.norm1(x))))
        for self in (1, 2):
            y = y * self
        return x + y


class Caught(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        y = self.mlp(self.norm2(x))
        try:
            raise ValueError
        except ValueError as self:
            pass
        return x + y


class Imported(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        y = self.mlp(self.norm2(x))
        import math as self

        return x + y * self.pi


class Matched(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        y = self.mlp(self.norm2(x))
        match x.dim():
            case self:
                return x + y * self


class OfAnotherScope(Base):
    def forward(self, x):
        def forget():
            nonlocal self
            self = None

        x = x + self.mixer(self.norm1(x))
        y = self.mlp(self.norm2(x))
        forget()
        return x + y


FORGETFUL = [Emptied, Deleted, Looped, Caught, Imported, Matched, OfAnotherScope]


@pytest.mark.parametrize("layer", FORGETFUL, ids=lambda layer: layer.__name__)
def test_a_forward_that_forgets_its_object_keeps_it(layer: type[nn.Module], x: torch.Tensor) -> None:
    check_left_alone(layer, x, "it gives 'self', what it calls its object, another value")


class Residual(Base):
    def forward(self, x, residual):
        residual = residual + x
        y = self.mixer(self.norm1(residual))
        residual = residual + y
        return self.mlp(self.norm2(residual)), residual


class FirstOfZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = Model(Residual)
        self.layers, self.norm = made.layers, made.norm
        self.eval()

    def forward(self, x):
        residual = 0
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(residual + x)


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
def test_a_first_layer_that_adds_to_zero(x: torch.Tensor, backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = FirstOfZero()
    with torch.no_grad():
        expected = model(x)
        assert rmsnorm_patch.apply(model, backend=backend).plan.counts()["in_layer/fuse"] == 7
        torch.testing.assert_close(model(x), expected, rtol=2e-5 if backend == "triton" else 0, atol=1e-5)
    if backend != "reference":
        assert rmsnorm_patch.status(model).why_apart() == {"input is a int": 1}


def test_a_first_layer_that_adds_to_zero_under_compile(x: torch.Tensor) -> None:
    model = FirstOfZero()
    with torch.no_grad():
        expected = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch._dynamo.reset()
        rmsnorm_patch.apply(model)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
