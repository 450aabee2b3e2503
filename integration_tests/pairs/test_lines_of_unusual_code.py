"""Sums and norms that are written as nobody would write them: each norm behind an add has a line in the plan."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_layers import WIDTH, Base, Function, Model, patched_counts
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch.pairs.trace import COPIED, INSIDE, SECOND, UNUSED

SUMS = {
    "x - (-y)": "it is written as a difference",
    "torch.sub(x, -y)": "it is written as a difference",
    "x.sub(y.neg())": "it is written as a difference",
    "x - y * -1": "it is written as a difference",
    "torch.rsub(-y, x)": "it is written as a difference",
    "torch.sub(x, y, alpha=-1)": "it is written as a difference",
    "torch.ops.aten.sub.Tensor(x, -y)": "it is written as a difference",
    "torch.ops.aten.add.Tensor(x, y)": "",
    "operator.add(x, y)": "",
    "sum([x, y])": "",
    "functools.reduce(operator.add, [x, y])": "",
    "torch.stack([x, y]).sum(0)": "it is part of another operation (sum)",
    "torch.sum(torch.stack((x, y)), 0)": "it is part of another operation (sum)",
    "torch.addcmul(x, y, y)": "it is part of another operation (addcmul)",
    "torch.lerp(x, y, 0.5)": "it is part of another operation (lerp)",
    "self.dropout(x + y)": "the norm reads it through Dropout",
    "nn.functional.dropout(x + y, 0.0, False)": "the norm reads it through .dropout",
}
IN_PLACE = {"x -= -y": "it is written as a difference", "x.sub_(-y)": "it is written as a difference"}
NORMS = {
    "type(self.norm2).forward(self.norm2, x)": "",
    "self.norm2.__class__.forward(self.norm2, x)": "",
    "LlamaRMSNorm.forward(self.norm2, x)": INSIDE,
    "nn.Module.__call__(self.norm2, x)": INSIDE,
    "self.norm2._call_impl(x)": INSIDE,
    "self.norm2.__call__(x)": "",
    "getattr(self, 'norm2')(x)": "",
    "self._modules['norm2'](x)": "",
    "functools.partial(self.norm2)(x)": "",
    "next(map(self.norm2, [x]))": "",
    "torch.utils.checkpoint.checkpoint(self.norm2, x, use_reentrant=False)": "",
    "F.rms_norm(x, (x.shape[-1],), self.norm2.weight, 1e-6)": UNUSED,
}
HEAD = """
import functools, operator
import torch, torch.nn as nn, torch.nn.functional as F, torch.utils.checkpoint
from small_layers import Base
from transformers.models.llama.modeling_llama import LlamaRMSNorm

class Written(Base):
    def forward(self, x):
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., type]]:
    """`written(statements, untraceable)`: a layer of that forward, imported from a file."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(statements: list[str], untraceable: bool) -> type:
        branch = ["if x.abs().max() > 1e9:", "    x = x.clamp(-1e9, 1e9)"] if untraceable else []
        body = "\n".join(f"        {line}" for line in [*branch, "y = self.mixer(self.norm1(x))", *statements])
        (tmp_path / "written_layer.py").write_text(HEAD + body + "\n")
        importlib.invalidate_caches()
        return importlib.import_module("written_layer").Written

    yield make
    sys.modules.pop("written_layer", None)


def check(layer: type[nn.Module], x: torch.Tensor, untraceable: bool, why: str) -> None:
    model = Model(layer)
    pairs = [pair for pair in rmsnorm_patch.plan(model).pairs if pair.norm == "layers.1.norm2"]
    assert [pair.action for pair in pairs] == ["leave"]
    assert ("could not be traced" if untraceable else why or "its source does not show") in pairs[0].reason
    assert pairs[0].source.startswith("written_layer.py:")
    patched_counts(model, x)


@pytest.mark.parametrize("untraceable", [False, True])
@pytest.mark.parametrize("total", SUMS)
def test_sums(written, x: torch.Tensor, total: str, untraceable: bool) -> None:
    layer = written([f"x = {total}", "return x + self.mlp(self.norm2(x))"], untraceable)
    check(layer, x, untraceable, SUMS[total])


@pytest.mark.parametrize("untraceable", [False, True])
@pytest.mark.parametrize("statement", IN_PLACE)
def test_sums_in_place(written, x: torch.Tensor, statement: str, untraceable: bool) -> None:
    layer = written(["x = x.clone()", statement, "return x + self.mlp(self.norm2(x))"], untraceable)
    check(layer, x, untraceable, IN_PLACE[statement])


@pytest.mark.parametrize("untraceable", [False, True])
@pytest.mark.parametrize("total", ["x + y", "x - (-y)"])
@pytest.mark.parametrize("call", NORMS)
def test_calls_of_norms(written, x: torch.Tensor, total: str, call: str, untraceable: bool) -> None:
    layer = written([f"x = {total}", f"z = {call}", "return x + self.mlp(z)"], untraceable)
    check(layer, x, untraceable, NORMS[call])


class Parallel(Base):
    def forward(self, x):
        return x + self.mixer(self.norm1(x)) + self.mlp(self.norm2(x))


class ParallelAsFunctions(Base):
    def forward(self, x):
        normed = LlamaRMSNorm.forward(self.norm1, x)
        return x + self.mixer(normed) + self.mlp(LlamaRMSNorm.forward(self.norm2, x))


class SecondReader(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm3 = LlamaRMSNorm(WIDTH)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x)) + self.mixer(self.norm3(x))


class CastResult(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return (x + self.mlp(self.norm2(x))).to(x.dtype)


class DroppedResult(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return self.dropout(x + self.mlp(self.norm2(x)))


class UntracedEnds(Base):
    def forward(self, x):
        if x.abs().max() > 1e9:
            x = x.clamp(-1e9, 1e9)
        x = x + self.mixer(type(self.norm1).forward(self.norm1, x))
        return x - (-self.mlp(self.norm2(x)))


NO_TAIL = "what it returns is not the sum of its last add alone"
LAYERS = {
    Parallel: {"norm2": SECOND},
    ParallelAsFunctions: {"norm1": "passes through the forward of another module", "norm2": SECOND},
    SecondReader: {"norm3": SECOND},
    CastResult: {"norm1": NO_TAIL},
    DroppedResult: {"norm1": NO_TAIL},
    UntracedEnds: {"norm1": "could not be traced", "norm2": "could not be traced"},
}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_second_readers_and_ends(layer: type[nn.Module], x: torch.Tensor) -> None:
    model = Model(layer)
    pairs = {pair.norm: pair for pair in rmsnorm_patch.plan(model, backend="reference").pairs}
    for name, why in LAYERS[layer].items():
        assert pairs[f"layers.1.{name}"].action == "leave"
        assert why in pairs[f"layers.1.{name}"].reason
    assert "norm" in pairs
    patched_counts(model, x)


class Runner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = Model(Function)
        self.layers, self.norm, self.dropout = made.layers, made.norm, nn.Dropout(0.5)
        self.eval()


class LastAsFunction(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return LlamaRMSNorm.forward(self.norm, x)


class LastOfItsType(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return type(self.norm).forward(self.norm, x)


class DroppedBetween(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(self.dropout(x))
        return self.norm(self.dropout(x))


class LastByHand(Runner):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return F.rms_norm(x, (WIDTH,), self.norm.weight, 1e-6)


RUNNERS = {
    LastAsFunction: INSIDE,
    LastOfItsType: "the loop that runs the layer was not read for this norm",
    DroppedBetween: COPIED,
    LastByHand: UNUSED,
}


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner.__name__)
def test_last_norms(runner: type[nn.Module], x: torch.Tensor) -> None:
    model = runner()
    (pair,) = (pair for pair in rmsnorm_patch.plan(model).pairs if pair.norm == "norm")
    assert (pair.action, pair.reason) == ("leave", RUNNERS[runner])
    patched_counts(model, x)


class Holder(nn.Module):
    """Without a forward: it only holds modules."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class HeldLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = Model(Function)
        self.backbone = Holder(layers=made.layers, norm=made.norm)
        self.eval()

    def forward(self, x):
        for layer in self.backbone.layers:
            x = layer(x)
        return self.backbone.norm(x)


class Stages(Runner):
    def __init__(self) -> None:
        super().__init__()
        first, second, third = self.layers
        parts = [Holder(blocks=nn.ModuleList(blocks)) for blocks in ([first, second], [third])]
        self.layers = nn.ModuleList(parts)

    def forward(self, x):
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
        return self.norm(x)


class StagesByIndex(Stages):
    def forward(self, x):
        for at in range(len(self.layers)):
            for number in range(len(self.layers[at].blocks)):
                x = self.layers[at].blocks[number](x)
        return self.norm(x)


class HeldNorms(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norms = Holder(first=self.norm1, second=self.norm2)
        del self.norm1, self.norm2

    def forward(self, x):
        x = x + self.mixer(self.norms.first(x))
        return x + self.mlp(self.norms.second(x))


HELD = {
    HeldLayers: {"in_layer/fuse": 3, "cross_layer/fuse": 2, "final/leave": 1},
    Stages: {"in_layer/fuse": 3, "cross_layer/fuse": 2, "final/fuse": 1},
    StagesByIndex: {"in_layer/fuse": 3, "cross_layer/fuse": 2, "final/fuse": 1},
    HeldNorms: {"in_layer/leave": 3, "cross_layer/leave": 2, "final/fuse": 1},
}


@pytest.mark.parametrize("made", HELD, ids=lambda made: made.__name__)
def test_modules_in_one_that_has_no_forward(made: type[nn.Module], x: torch.Tensor) -> None:
    model = Model(made) if issubclass(made, Base) else made()
    counts = rmsnorm_patch.plan(model).counts()
    assert {name: count for name, count in counts.items() if not name.startswith("norm")} == HELD[made]
    handed_over = HELD[made].get("cross_layer/fuse", 0) + HELD[made].get("final/fuse", 0)
    assert patched_counts(model, x)["taken/reference"] == handed_over


class Doubling(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).mul_(2.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made", [HeldLayers, Stages])
def test_a_held_layer_that_is_wrapped_after_apply(made: type[nn.Module], x: torch.Tensor, mode) -> None:
    def wrap(model: nn.Module) -> None:
        blocks = model.backbone.layers if made is HeldLayers else model.layers[0].blocks
        blocks[1] = Doubling(blocks[1])

    model, other = made(), made()
    rmsnorm_patch.apply(model, backend="reference")
    with mode():
        model(x.clone())
        for each in (model, other):
            wrap(each)
        assert torch.equal(model(x.clone()), other(x.clone()))


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_a_layer_under_a_decorator_hands_nothing_over(x: torch.Tensor) -> None:
    """Its frame would stand between the layer and the loop."""
    model = Model(Decorated)
    counts = rmsnorm_patch.plan(model).counts()
    assert (counts["in_layer/fuse"], counts["cross_layer/leave"], counts["final/leave"]) == (3, 2, 1)
    patched_counts(model, x)
    assert not rmsnorm_patch.status(model).why_apart()
