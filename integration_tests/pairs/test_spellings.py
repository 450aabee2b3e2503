"""The same pairs, written in other ways: each has a line in the plan, and the bits stay."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
import torch.nn as nn
from small_layers import WIDTH, Base, Function, InPlaceThroughout, Model, patched_counts

import rmsnorm_patch
from rmsnorm_patch.pairs import questions


class InPlace(Base):
    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = self.mixer(self.norm1(hidden_states))
        hidden_states += residual
        return residual + self.mlp(self.norm2(hidden_states))


class SumInNorm(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(x))
        z = self.norm2(x + y)
        return (x + y) + self.mlp(z)


class Keyword(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(hidden_states=x))
        residual = x
        return residual + self.mlp(self.norm2(hidden_states=residual))


class InPlaceKeyword(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(hidden_states=x))
        y += x
        return y + self.mlp(self.norm2(hidden_states=y))


class Block(Base):
    def forward(self, x):
        with torch.profiler.record_function("layer"):
            x = x + self.mixer(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        return x


class Alias(Base):
    def forward(self, x):
        first = self.norm1
        norm = self.norm2
        x = x + self.mixer(first(x))
        h = x
        h = norm(h)
        return x + self.mlp(h)


FUSED = [InPlace, InPlaceThroughout, Function, SumInNorm, Keyword, InPlaceKeyword, Block, Alias]


class WritesArgument(Base):
    def forward(self, x):
        x += self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WritesWhatAnotherNameHolds(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(x))
        z = y
        y += x
        return z + self.mlp(self.norm2(y))


class Alpha(Base):
    def forward(self, x):
        x = torch.add(x, self.mixer(self.norm1(x)), alpha=0.5)
        return x + self.mlp(self.norm2(x))


class Method(Base):
    def forward(self, x):
        x = x.add(self.mixer(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class MethodInPlace(Base):
    def forward(self, x):
        y = self.mixer(self.norm1(x))
        y.add_(x)
        return x + self.mlp(self.norm2(y))


class Unbound(Base):
    def forward(self, x):
        x = torch.Tensor.add(x, self.mixer(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class Walrus(Base):
    def forward(self, x):
        y = self.norm2(x := x + self.mixer(self.norm1(x)))
        return x + self.mlp(y)


class NestedTuple(Base):
    def forward(self, x):
        (x, _), _ = (x + self.mixer(self.norm1(x)), None), None
        return x + self.mlp(self.norm2(x))


class ConditionalSum(Base):
    def forward(self, x):
        x = x + self.mixer(self.norm1(x)) if self.flag else x
        return x + self.mlp(self.norm2(x))


class InLoop(Base):
    def forward(self, x):
        for _ in range(1):
            x = x + self.mixer(self.norm1(x))
            y = self.norm2(x)
        return x + self.mlp(y)


class HiddenAdd(Base):
    def residual(self, x, y):
        return x + y

    def forward(self, x):
        x = self.residual(x, self.mixer(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class NormsInList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([self.norm1, self.norm2])

    def forward(self, x):
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[-1](x))


class NormsInDictionary(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"first": self.norm1, "second": self.norm2})
        del self.norm1, self.norm2

    def forward(self, x):
        x = x + self.mixer(self.norms["first"](x))
        _, second = self.norms.values()
        return x + self.mlp(second(x))


LEFT = {
    WritesArgument: "the in-place add writes the tensor that its caller gave",
    WritesWhatAnotherNameHolds: "the in-place add also writes what `z` holds",
    Alpha: "that its source does not show: it scales what it adds (alpha)",
    Method: "that its source does not show: it is written as a method call (.add)",
    MethodInPlace: "that its source does not show: it is written as a method call (.add_)",
    Unbound: "its forward could not be traced",
    Walrus: "that its source does not show",
    NestedTuple: "that its source does not show",
    ConditionalSum: "that its source does not show",
    InLoop: "that its source does not show",
    HiddenAdd: "that its source does not show",
    NormsInList: "that its source does not show",
    NormsInDictionary: "that its source does not show",
}


@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_fused(layer: type[nn.Module], x: torch.Tensor) -> None:
    ran = patched_counts(Model(layer), x)
    assert ran["in_layer/reference"] == 3


@pytest.mark.parametrize("layer", LEFT, ids=lambda layer: layer.__name__)
def test_left_with_a_reason(layer: type[nn.Module], x: torch.Tensor) -> None:
    model = Model(layer)
    pairs = [pair for pair in rmsnorm_patch.plan(model, backend="reference").pairs if pair.kind == "in_layer"]
    assert [pair.action for pair in pairs] == ["leave"] * 3
    assert all(LEFT[layer] in pair.reason and pair.source for pair in pairs)
    assert [pair.norm for pair in pairs] != [pair.layer for pair in pairs]
    assert not patched_counts(model, x)["in_layer/reference"]


@pytest.mark.parametrize("layer", [*FUSED, *LEFT], ids=lambda layer: layer.__name__)
def test_gradients_and_what_the_caller_holds(layer: type[nn.Module], x: torch.Tensor) -> None:
    """One layer, so that the caller's tensor is the argument itself."""
    model = Model(layer)

    def run(grad: bool) -> list[torch.Tensor]:
        model.zero_grad()
        given = x.clone()
        with torch.set_grad_enabled(grad):
            result = model.layers[0](given)
        if grad:
            result.square().sum().backward()
        return [given, result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    grads = layer not in (InPlaceThroughout, WritesArgument)  # an in-place write of what autograd saved is its error
    before = [run(False), *([run(True)] if grads else [])]
    rmsnorm_patch.apply(model, backend="reference")
    for expected, seen in zip(before, [run(False), *([run(True)] if grads else [])], strict=True):
        assert len(expected) == len(seen)
        assert all(torch.equal(a, b) for a, b in zip(expected, seen, strict=True))


def held_by_hook(model: nn.Module, view: bool) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []

    def keep(module, args, output):
        kept.append(output.view(-1) if view else output)

    for layer in model.layers:
        layer.mixer.register_forward_hook(keep)
    return kept


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_in_place_add_is_seen_by_whoever_holds_its_tensor(x: torch.Tensor, mode, view: bool) -> None:
    """A hook keeps the tensor, or a view of its memory, that `+=` writes."""
    model = Model(InPlace)
    kept = held_by_hook(model, view)
    with mode():
        expected = [model(x.clone()), *kept]
        kept.clear()
        rmsnorm_patch.apply(model, backend="reference")
        seen = [model(x.clone()), *kept]
    assert len(seen) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, seen, strict=True))


def test_an_in_place_add_keeps_its_dtype(x: torch.Tensor) -> None:
    class Half(InPlace):
        pass

    class ToHalf(nn.Module):
        def forward(self, x):
            return x.to(torch.bfloat16)

    model = Model(Half)
    for layer in model.layers:
        layer.mixer = ToHalf()
        layer.mlp = nn.Identity()
    patched_counts(model, x)


def test_in_place_under_compile(x: torch.Tensor) -> None:
    model = Model(InPlaceThroughout)
    with torch.no_grad():
        expected = torch.compile(model, backend="eager", fullgraph=True)(x.clone())
        torch._dynamo.reset()
        rmsnorm_patch.apply(model, backend="reference")
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x.clone()), expected)


def test_a_hook_sees_the_keyword(x: torch.Tensor) -> None:
    model = Model(Keyword)
    rmsnorm_patch.apply(model, backend="reference")
    seen = []
    for layer in model.layers:
        for norm in (layer.norm1, layer.norm2):
            norm.register_forward_pre_hook(
                lambda module, args, named: seen.append((args, list(named))), with_kwargs=True
            )
    with torch.no_grad():
        model(x)
    assert seen == [((), ["hidden_states"])] * 6


def test_a_forward_of_the_norms_own_sees_the_keyword(x: torch.Tensor) -> None:
    model = Model(Keyword)
    rmsnorm_patch.apply(model, backend="reference")
    seen = []
    for layer in model.layers:
        for norm in (layer.norm1, layer.norm2):
            norm.forward = lambda *args, **named: seen.append(list(named)) or next(iter(named.values()))
    with torch.no_grad():
        model(x)
    assert seen == [["hidden_states"]] * 6


def test_in_place_under_vmap(x: torch.Tensor) -> None:
    model = Model(InPlace)
    with torch.no_grad():
        expected = torch.vmap(model)(x.clone())
        rmsnorm_patch.apply(model, backend="reference")
        assert torch.equal(torch.vmap(model)(x.clone()), expected)


@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_proved(layer: type[nn.Module], x: torch.Tensor) -> None:
    model = Model(layer)
    assert rmsnorm_patch.apply(model, backend="reference", verify={"x": x}).plan.counts()["in_layer/fuse"] == 3


def test_who_holds_a_tensor() -> None:
    class Holder:
        pass

    def ask(make, hold=None):
        tensor, other = make(), torch.ones(3, WIDTH)
        kept = hold(tensor) if hold else None
        answer = questions.unseen(tensor, other)
        del kept
        return answer

    def attribute(tensor):
        tensor.note = "kept"

    fresh = lambda: torch.ones(3, WIDTH)  # noqa: E731
    with torch.no_grad():
        assert ask(fresh)
        for hold in (
            lambda t: t,
            lambda t: t[0],
            lambda t: t.detach(),
            lambda t: t.untyped_storage(),
            attribute,
            weakref.ref,
        ):
            assert not ask(fresh, hold)
        for make in (lambda: torch.ones(3, 1), lambda: fresh().double(), lambda: fresh().t().contiguous().t()):
            assert not ask(make)
        with torch.inference_mode():
            assert ask(fresh)
            stored = [fresh()]
        assert not ask(lambda: stored.pop())
    assert not ask(fresh)


def test_an_exception_in_a_with_block_leaves_the_rest_as_it_was(x: torch.Tensor) -> None:
    class Suppressed(Base):
        def forward(self, x):
            with contextlib.suppress(ValueError):
                x = x + self.mixer(self.norm1(x))
                if self.flag:
                    raise ValueError
                x = x + self.mlp(self.norm2(x))
            return self.norm2(x)

    patched_counts(Model(Suppressed), x)
