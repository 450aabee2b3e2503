"""Pairs in code that the reader of forwards does not know: each norm behind an add has a line in the plan."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
from small_layers import Base, Function, Model, patched_counts
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch


class OperatorInPlace(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(x))
        y = torch.ops.aten.add_.Tensor(y, x)
        return y + self.mlp(self.norm2(y))


class UnboundInPlace(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(x))
        torch.Tensor.add_(y, x)
        return y + self.mlp(self.norm2(y))


class WholeSlice(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(x))
        y[:] += x
        return y + self.mlp(self.norm2(y))


class WholeAssignment(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(x))
        y[...] = x + y
        return y + self.mlp(self.norm2(y))


class CastBetween(Base):
    def forward(self, x):
        x = (x + self.mixer(self.norm1(x))).to(x.dtype)
        return x + self.mlp(self.norm2(x))


class CastInNorm(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x.to(self.norm1.weight.dtype)))
        return x + self.mlp(self.norm2(x.view(x.shape)))


class ResidualAdd(nn.Module):
    def forward(self, x, y):
        return x + y


class AddInModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.add = ResidualAdd()

    def forward(self, x):
        x = self.add(x, self.mixer(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class CalledForward(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1.forward(x))
        return x + self.mlp(self.norm2.forward(x))


class NormInSequential(Base):
    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = nn.Sequential(self.norm2, self.mlp)
        del self.norm2, self.mlp

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.feed_forward(x)


class PreNorm(nn.Module):
    def __init__(self, norm: nn.Module, function: nn.Module) -> None:
        super().__init__()
        self.norm, self.function = norm, function

    def forward(self, x):
        return self.function(self.norm(x))


class NormInWrapper(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PreNorm(self.norm1, self.mixer), PreNorm(self.norm2, self.mlp)
        del self.norm1, self.norm2, self.mixer, self.mlp

    def forward(self, x):
        x = self.first(x) + x
        return self.second(x) + x


class Norms(nn.ModuleList):
    pass


class NormsInOwnList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norms = Norms([self.norm1, self.norm2])
        del self.norm1, self.norm2

    def forward(self, x):
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class OptionalResidual(Base):
    def forward(self, x, residual=None):
        if residual is not None:
            x = x + residual
        y = self.norm1(x)
        return x + self.mlp(self.norm2(y))


class InDictionary(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return {"hidden": x + self.mlp(self.norm2(x))}


class Output(NamedTuple):
    hidden: torch.Tensor
    extra: None = None


class InRecord(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return Output(x + self.mlp(self.norm2(x)))


class BranchOnValues(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        if x.abs().max() > 1e9:
            x = x.clamp(-1e9, 1e9)
        return x + self.mlp(self.norm2(x))


class Terms(Function):
    """A name that ends in "rms" is no norm's."""


LAYERS = {
    OperatorInPlace: "its source does not show",
    UnboundInPlace: "could not be traced",
    WholeSlice: "it is written into another tensor",
    WholeAssignment: "it is written into another tensor",
    CastBetween: "the norm reads it through .to",
    CastInNorm: "the norm reads it through .view",
    AddInModule: "its source does not show",
    CalledForward: "its source does not show",
    NormInSequential: "its source does not show",
    NormInWrapper: "the norm is called by another module than the one that adds",
    NormsInOwnList: "its source does not show",
    BranchOnValues: "could not be traced",
}


class Runner(nn.Module):
    def __init__(self, layer: type[nn.Module] = Function) -> None:
        super().__init__()
        made = Model(layer)
        self.layers, self.norm = made.layers, made.norm
        self.eval()


class ForElse(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        else:
            x = self.norm(x)
        return x


class ByKey(Runner):
    def __init__(self) -> None:
        super().__init__(InDictionary)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)["hidden"]
        return self.norm(x)


class ByName(Runner):
    def __init__(self) -> None:
        super().__init__(InRecord)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).hidden
        return self.norm(x)


class CastInFront(Runner):
    def __init__(self) -> None:
        super().__init__(CastInNorm)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.to(self.norm.weight.dtype))


class SkipConnection(Runner):
    def forward(self, x):
        first = self.layers[0](x)
        second = self.layers[1](first)
        return self.norm(self.layers[2](first + second))


class Blend(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = x + 0.5 * (layer(x) - x)
        return self.norm(x)


class PairsOfModules(Runner):
    def __init__(self) -> None:
        super().__init__(Base)
        pairs = [nn.ModuleList([PreNorm(l.norm1, l.mixer), nn.Sequential(l.norm2, l.mlp)]) for l in self.layers]  # noqa: E741
        self.layers = nn.ModuleList(pairs)

    def forward(self, x):
        for first, second in self.layers:
            x = first(x) + x
            x = second(x) + x
        return self.norm(x)


class Residual(nn.Module):
    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return x + self.function(x)


def residual_sequence() -> nn.Module:
    made = Model(Base)
    parts = [(l.norm1, l.mixer, l.norm2, l.mlp) for l in made.layers]  # noqa: E741
    halves = [half for a, b, c, d in parts for half in ((a, b), (c, d))]
    return nn.Sequential(*[Residual(nn.Sequential(*half)) for half in halves], made.norm).eval()


RUNNERS = [ForElse, ByKey, ByName, CastInFront, SkipConnection, Blend, PairsOfModules, residual_sequence]


def without_a_line(model: nn.Module) -> list[str]:
    """Paths of norms that no pair names, the first norm left out: it reads the model's input."""
    norms = [path for path, module in model.named_modules() if isinstance(module, LlamaRMSNorm)]
    named = {pair.norm for pair in rmsnorm_patch.plan(model, backend="reference").pairs}
    return [path for path in norms[1:] if path not in named]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layers(layer: type[nn.Module], x: torch.Tensor) -> None:
    model = Model(layer)
    assert not without_a_line(model)
    pairs = [pair for pair in rmsnorm_patch.plan(model).pairs if pair.kind == "in_layer"]
    assert [pair.action for pair in pairs] == ["leave"] * 3
    assert all(LAYERS[layer] in pair.reason for pair in pairs), {pair.reason for pair in pairs}
    patched_counts(model, x)


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner.__name__)
def test_runners(runner, x: torch.Tensor) -> None:
    model = runner()
    assert not without_a_line(model)
    patched_counts(model, x)


def test_a_pair_that_only_an_optional_argument_brings(x: torch.Tensor) -> None:
    model = Model(OptionalResidual)
    found = [
        pair for pair in rmsnorm_patch.plan(model).pairs if pair.norm.endswith("norm1") and pair.kind == "in_layer"
    ]
    assert {(pair.action, pair.reason) for pair in found} == {
        ("leave", "it runs only where an optional argument is given")
    }
    assert len(found) == 3
    with torch.no_grad():
        expected = model.layers[0](x.clone(), residual=x)
        rmsnorm_patch.apply(model, backend="reference")
        assert torch.equal(model.layers[0](x.clone(), residual=x), expected)


def test_a_layer_that_is_called_like_a_norm(x: torch.Tensor) -> None:
    model = Model(Terms)
    assert len(rmsnorm_patch.plan(model).norms) == 7
    ran = patched_counts(model, x)
    assert (ran["in_layer/reference"], ran["taken/reference"]) == (3, 3)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = Model(Function)
        first, second, third = made.layers
        self.stages = nn.ModuleList([nn.Sequential(first, second), nn.Sequential(third)])
        self.norm = made.norm
        self.eval()

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)


def a_sequence() -> nn.Module:
    made = Model(Function)
    return nn.Sequential(*made.layers, made.norm).eval()


@pytest.mark.parametrize("make", [Stages, a_sequence])
def test_sequences_of_layers_are_fused(make, x: torch.Tensor) -> None:
    """As a model that is cut into stages, and as one that is a sequence itself."""
    ran = patched_counts(make(), x)
    assert (ran["in_layer/reference"], ran["cross_layer/reference"], ran["taken/reference"]) == (3, 3, 3)


def test_layers_of_mamba_read_their_sum_through_a_cast() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "vocab_size": 50, "pad_token_id": 0}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    pairs = {pair.norm: pair.reason for pair in rmsnorm_patch.plan(model).pairs}
    assert pairs["backbone.layers.1.norm"] == pairs["backbone.layers.2.norm"] == "the norm reads a copy of its sum"


@pytest.mark.parametrize("layer", [CalledForward, NormInWrapper], ids=lambda layer: layer.__name__)
def test_proved(layer: type[nn.Module], x: torch.Tensor) -> None:
    """`norm.forward(x)` runs no hook of the norm."""
    model = Model(layer)
    rmsnorm_patch.apply(model, backend="reference", verify={"x": x})
