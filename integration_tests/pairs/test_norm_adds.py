"""Which adds of a norm's result are found, how they are rewritten, and what keeps others as they are."""

from __future__ import annotations

import ast
import textwrap

import pytest
import torch
from torch import nn

import rmsnorm_patch
from rmsnorm_patch.pairs.dataflow import analyse
from rmsnorm_patch.pairs.norm_add import norm_adds
from rmsnorm_patch.rewrite import observe

N = 16
NORMS = frozenset({"post", "pre", "other"})


def found(body: str) -> list[tuple[str, int, str]]:
    """(norm, side, reason) of each add of a norm's result in this forward."""
    code = "def forward(self, h, residual, flag=None):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (tree,) = ast.parse(code).body
    assert isinstance(tree, ast.FunctionDef)
    return [(each.attr, each.side, each.reason) for each in norm_adds(tree, analyse(tree, NORMS))]


FUSED = {
    "a variable": ("h = self.mlp(h)\nh = self.post(h)\nh = residual + h\nreturn h", 1),
    "on the left": ("h = self.mlp(h)\nh = self.post(h)\nh = h + residual\nreturn h", 0),
    "another name": ("y = self.mlp(h)\ny = self.post(y)\nh = h + y\nreturn h", 1),
    "of an expression": ("y = self.post(self.mlp(h))\nreturn residual + y", 1),
    "within the add": ("return residual + self.post(self.mlp(h))", 1),
    "within the add, code on the left": ("return self.skip(h) + self.post(self.mlp(h))", 1),
    "renamed in between": ("y = self.post(self.mlp(h))\nx = residual\nx = x + y\nreturn x", 1),
    "in a branch": ("if flag:\n    y = self.post(self.mlp(h))\n    h = h + y\nreturn h", 1),
    "deleted later": ("y = self.post(self.mlp(h))\nh = h + y\ndel y\nreturn h", 1),
}


@pytest.mark.parametrize("name", FUSED)
def test_adds_that_can_be_one_call(name: str) -> None:
    body, side = FUSED[name]
    assert found(body) == [("post", side, "")]


LEFT = {
    "in place": ("y = self.post(self.mlp(h))\nh = self.mlp(h)\nh += y\nreturn h", "in place"),
    "by keyword": ("y = self.post(x=self.mlp(h))\nreturn residual + y", "by keyword"),
    "of the argument": ("y = self.post(h)\nreturn residual + y", "also reads a sum"),
    "of a sum": ("y = self.post(self.mlp(h) + residual)\nreturn residual + y", "also reads a sum"),
    "read later": ("y = self.post(self.mlp(h))\nx = h + y\nreturn x * y", "something else reads"),
    "read twice": ("y = self.post(self.mlp(h))\nreturn y + y", "something else reads"),
    "kept by another name": ("y = self.post(self.mlp(h))\nz = y\nh = h + y\nreturn h, z", "something else reads"),
    "two names": ("y = z = self.post(self.mlp(h))\nh = h + y\nreturn h, z", "several names"),
    "read by a closure": (
        "f = lambda: y\ny = self.post(self.mlp(h))\nh = h + y\nreturn h, f()",
        "something else reads",
    ),
    "code in between": ("y = self.post(self.mlp(h))\nself.log(h)\nreturn h + y", "code runs between"),
    "code in the add": ("y = self.post(self.mlp(h))\nreturn self.skip(h) + y", "code runs between"),
    "code on the right": ("return self.post(self.mlp(h)) + self.skip(h)", "code runs between"),
    "another branch": ("y = self.post(self.mlp(h))\nif flag:\n    h = h + y\nreturn h", "different branches"),
    "another form of name": ("self.y = self.post(self.mlp(h))\nreturn h", None),
    "of something else too": ("y = self.post(self.mlp(h)) * 2\nreturn h + y", None),
}


@pytest.mark.parametrize("name", LEFT)
def test_adds_that_stay(name: str) -> None:
    body, reason = LEFT[name]
    adds = [why for attr, _, why in found(body) if attr == "post"]
    assert not adds if reason is None else all(reason in why for why in adds) and adds


def test_of_two_norms_the_later_one_is_one_call_with_the_add() -> None:
    (first, second) = found("x = self.post(self.mlp(h))\ny = self.other(self.mlp(h))\nreturn x + y")
    assert "code runs between" in first[2] or "the other one runs later" in first[2]
    assert second == ("other", 1, "")
    (first, second) = found("return self.post(self.mlp(h)) + self.other(self.mlp(h))")
    assert first[2]
    assert second == ("other", 1, "")


class Layer(nn.Module):
    """A sandwich around one product; how the sum is written is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(N, N)
        self.post, self.pre = (nn.RMSNorm(N, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(N, N)
        for norm in (self.post, self.pre):
            nn.init.normal_(norm.weight)


class WithNext(Layer):
    def forward(self, h):
        residual = h
        h = self.mlp(h)
        h = self.post(h)
        h = residual + h
        return h + self.out(self.pre(h))


class OnTheLeft(Layer):
    def forward(self, h):
        y = self.post(self.mlp(h))
        h = y + h
        residual = h
        h = self.pre(h)
        return residual * self.out(h)


class WithinTheNorm(Layer):
    def forward(self, h):
        return self.out(self.pre(h + self.post(self.mlp(h))))


class Alone(Layer):
    def forward(self, h):
        x = self.pre(self.mlp(h))
        h = h + self.post(self.mlp(h))
        return h, x


class BothNorms(Layer):
    def forward(self, h):
        x = self.pre(self.mlp(h))
        y = self.post(self.out(h))
        return x + y


@pytest.mark.parametrize(
    ("cls", "kinds"),
    [
        (WithNext, ["norm_add", "in_layer"]),
        (OnTheLeft, ["norm_add", "in_layer"]),
        (WithinTheNorm, ["norm_add", "in_layer"]),
        (Alone, ["norm", "norm_add"]),
        (BothNorms, ["norm", "norm_add"]),
    ],
)
def test_each_form_gives_the_models_bits_and_reverts(cls: type[Layer], kinds: list[str]) -> None:
    layer = cls().eval()
    x = torch.randn(3, N)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            made = layer(x.clone())
        return list(made) if isinstance(made, tuple) else [made]

    before, forward = run(), cls.forward
    rmsnorm_patch.apply(layer, backend="reference")
    events: list[observe.Event] = []
    with observe.observing(events.append):
        after = run()
    assert [event.kind for event in events] == kinds
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (added,) = [event for event in events if event.kind == "norm_add"]
    assert added.norm is layer.post
    assert torch.equal(added.normed, nn.functional.rms_norm(added.operands[0], (N,), layer.post.weight, 1e-6))
    rmsnorm_patch.revert(layer)
    assert type(layer) is cls
    assert type(layer).forward is forward
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))


def test_the_plan_says_what_becomes_of_it() -> None:
    (line,) = [pair for pair in rmsnorm_patch.plan(WithNext()).pairs if pair.kind == "norm_add"]
    assert (line.action, line.norm, line.reason) == ("fuse", "post", "norm, add and the next norm in one call")
    (line,) = [pair for pair in rmsnorm_patch.plan(Alone()).pairs if pair.kind == "norm_add"]
    assert (line.action, line.reason) == ("fuse", "norm and add in one call")
    (line,) = [pair for pair in rmsnorm_patch.plan(WithNext(), exclude=["pre"]).pairs if pair.kind == "norm_add"]
    assert (line.action, line.reason) == ("fuse", "norm and add in one call")
    (line,) = [pair for pair in rmsnorm_patch.plan(WithNext(), exclude=["post"]).pairs if pair.kind == "norm_add"]
    assert line.action == "leave"
    assert line.reason.startswith("its norm is left alone")


class Hidden(Layer):
    """An add that is no statement of its own: only the trace shows it."""

    def forward(self, h):
        return (h + self.post(self.mlp(h))) * 2, self.pre(self.mlp(h))


class NotRun(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.sandwich = False

    def forward(self, h):
        if self.sandwich:
            y = self.post(self.mlp(h))
            h = h + y
        return self.out(self.pre(self.mlp(h)))


def test_a_branch_that_does_not_run_is_left_with_the_reason() -> None:
    (line,) = [pair for pair in rmsnorm_patch.plan(NotRun()).pairs if pair.kind == "norm_add"]
    assert line.action == "leave"
    assert "a trace of its forward did not confirm" in line.reason


def test_an_add_that_only_the_trace_shows_is_listed() -> None:
    (line,) = rmsnorm_patch.plan(Hidden()).pairs
    assert (line.kind, line.action, line.norm) == ("norm_add", "leave", "post")
    assert "that its source does not show" in line.reason


class Router(nn.Module):
    """Its methods need shapes, which proxies have not."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Linear(N, N)

    def predict(self, x):
        return self.coefficients(x).reshape(*x.shape[:-1], N) + x

    def double_(self, x):
        return x.mul_(x.new_full([*x.shape], 2.0))


class Routed(Layer):
    """As Gemma 3n's: a child's method ahead of the norms, an argument that is None by default and never given so, and
    an add to a part of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()

    def forward(self, h, scale=None):
        active = self.router.predict(h)
        y = self.post(self.mlp(active))
        active = active + y
        gated = torch.multiply(self.out(active), scale)
        active[1:] += self.pre(gated[1:])
        return active


class EditedBetween(Routed):
    def forward(self, h, scale=None):
        y = self.post(self.mlp(h))
        total = h + y
        self.router.double_(total)
        return self.out(self.pre(total)) * scale


class EditedByName(Routed):
    def forward(self, h, scale=None):
        y = self.post(self.mlp(h))
        total = h + y
        doubled = self.router.double_(total)
        return self.out(self.pre(total)) * scale + doubled


@pytest.mark.parametrize("cls", [Routed, EditedBetween, EditedByName])
def test_a_layer_that_runs_methods_of_its_children(cls: type[Layer]) -> None:
    layer, x, scale = cls().eval(), torch.randn(3, N), torch.randn(N)
    with torch.no_grad():
        before = layer(x.clone(), scale)
        plan = rmsnorm_patch.apply(layer, backend="reference").plan
        events: list[observe.Event] = []
        with observe.observing(events.append):
            assert torch.equal(layer(x.clone(), scale), before)
    assert [(pair.kind, pair.norm) for pair in plan.fused_pairs()] == [("norm_add", "post")]
    assert [event.kind for event in events] == ["norm_add", "norm"]
    left = [(pair.norm, pair.reason) for pair in plan.pairs if pair.action == "leave"]
    assert [norm for norm, _ in left] == ["pre"]
    if cls is Routed:
        assert "that its source does not show" in left[0][1]


class NeedsShapes(Layer):
    """Its own code, not a child's: nothing stands for what it computes."""

    def forward(self, h):
        h = h.reshape(*h.shape[:-1], N)
        y = self.post(self.mlp(h))
        return h + y


def test_a_forward_that_cannot_be_traced_in_either_way_is_left_with_the_reason() -> None:
    (line,) = rmsnorm_patch.plan(NeedsShapes()).pairs
    assert (line.kind, line.action) == ("norm_add", "leave")
    assert "its forward could not be traced (TraceError" in line.reason
