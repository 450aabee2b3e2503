"""What a norm's code reads beside the module, or who calls it, changes after `apply`: its patched modules compute what
the unpatched ones do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.patch_state import REPLACED

WIDTH = 64
OFFSET = False


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def doubled(x: torch.Tensor, eps: float) -> torch.Tensor:
    return 2 * x


class ReadingRMSNorm(nn.Module):
    scaled: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH) + 0.5), 1e-6

    @property
    def scale(self) -> torch.Tensor:
        return 1 + self.weight if OFFSET or self.scaled else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * normed(x.float(), self.eps).to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2, self.mlp = ReadingRMSNorm(), ReadingRMSNorm(), nn.Linear(WIDTH, WIDTH)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm1(x))
        return self.norm2(x)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def class_flag(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadingRMSNorm, "scaled", True)


def class_property(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadingRMSNorm, "scale", property(lambda norm: 3 * norm.weight))


def module_flag(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "OFFSET", True)


def module_function(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "normed", doubled)


def code_of_that_function(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(normed, "__code__", doubled.__code__)


def code_of_the_forward(patch: pytest.MonkeyPatch) -> None:
    """As a reload of an edited module leaves it (`%autoreload 2`)."""
    patch.setattr(ReadingRMSNorm.forward, "__code__", (lambda self, x: 2 * x).__code__)


CHANGES = [class_flag, class_property, module_flag, module_function, code_of_that_function, code_of_the_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_norms_code_reads_counts(change: Callable, interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, x = Layer(), torch.randn(3, WIDTH)
    model = copy.deepcopy(stock)
    rmsnorm_patch.apply(model, backend="triton")
    with torch.no_grad():
        before = model(x)
        change(monkeypatch)
        wanted = stock(x)
        assert not torch.allclose(wanted, before, rtol=1e-2)
        assert torch.equal(model(x), wanted)
        (note, *_) = [note for note in rmsnorm_patch.status(model).notes if note.startswith("norm2 ")]
        assert note == "norm2 runs what ReadingRMSNorm got since apply; after revert, apply reads that"
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert torch.equal(model(x), before)
    assert not rmsnorm_patch.status(model).notes


def wrapped(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def outer(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x)

    return outer


class WrappedRMSNorm(nn.Module):
    """Of what it reads, the code under the wrapper alone can change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH) + 0.5), 1e-6

    @wrapped
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class FlaggedRMSNorm(WrappedRMSNorm):
    """Its forward calls nothing, and reads a flag of its Python module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, wide = 1 + self.weight if OFFSET else self.weight, x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class OneFunctionRMSNorm(WrappedRMSNorm):
    """Its forward is the only function, and reads nothing but the module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def code_of_one_function(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OneFunctionRMSNorm.forward, "__code__", (lambda self, x: 2 * x).__code__)


def code_under_the_wrapper(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WrappedRMSNorm.forward.__wrapped__, "__code__", (lambda self, x: 2 * x).__code__)


ONE_THING = [
    (WrappedRMSNorm, code_under_the_wrapper),
    (FlaggedRMSNorm, module_flag),
    (OneFunctionRMSNorm, code_of_one_function),
]


@pytest.mark.parametrize(("norm", "change"), ONE_THING, ids=lambda each: each.__name__)
def test_one_thing_that_it_reads_is_enough(norm: type, change: Callable, interpreter, monkeypatch) -> None:
    stock, x = nn.Sequential(norm()).eval(), torch.randn(3, WIDTH)
    model = copy.deepcopy(stock)
    rmsnorm_patch.apply(model, backend="triton")
    with torch.no_grad():
        before = model(x)
        change(monkeypatch)
        assert not torch.allclose(stock(x), before, rtol=1e-2)
        assert torch.equal(model(x), stock(x))
    assert rmsnorm_patch.status(model).why() == {REPLACED: 1}


def called(patch: pytest.MonkeyPatch, cls: type[nn.Module], name: str) -> None:
    before = getattr(cls, name)

    def shifted(self: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        output = before(self, *args)
        return output + 0.5 if isinstance(self, ReadingRMSNorm) else output

    patch.setattr(cls, name, shifted)


@pytest.mark.parametrize("early", [False, True], ids=["after_apply", "before_apply"])
@pytest.mark.parametrize("cls", [ReadingRMSNorm, nn.Module], ids=["class", "every_module"])
@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_who_calls_modules_sees_a_norm_whose_add_is_fused(
    name: str, cls: type[nn.Module], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, x = Layer(), torch.randn(3, WIDTH)
    model = copy.deepcopy(stock)
    with torch.no_grad():
        before = stock(x)
        if early:
            called(monkeypatch, cls, name)
            wanted = stock(x)
        if early and (cls, name) == (ReadingRMSNorm, "__call__"):
            with pytest.raises(rmsnorm_patch.UnsupportedModel, match="overrides __call__"):
                rmsnorm_patch.apply(model)
            return
        rmsnorm_patch.apply(model)
        if not early:
            assert torch.equal(model(x), before)
            called(monkeypatch, cls, name)
            wanted = stock(x)
        assert not torch.equal(wanted, before)
        assert torch.equal(model(x), wanted)
        monkeypatch.undo()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("early", [False, True], ids=["after_apply", "before_apply"])
def test_who_calls_one_module_sees_it(early: bool) -> None:
    stock, x = Layer(), torch.randn(3, WIDTH)
    model = copy.deepcopy(stock)
    if not early:
        rmsnorm_patch.apply(model)
    for each in (stock, model):
        norm = each.norm2
        norm._call_impl = lambda x, norm=norm: norm.forward(x) + 0.5
    if early:
        (left,) = [site for site in rmsnorm_patch.apply(model).plan.norms if site.action != "fuse"]
        assert left.path == "norm2"
        assert "an instance-level _call_impl" in left.reason
    with torch.no_grad():
        assert torch.equal(model(x), stock(x))


def other_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.norm2(self.mlp(x))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_layer_runs_the_code_that_a_reload_puts_into_its_forward(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, x = Layer(), torch.randn(3, WIDTH)
    model = copy.deepcopy(stock)
    assert rmsnorm_patch.apply(model).layers == ("",)
    with torch.set_grad_enabled(grad):
        before = model(x)
        monkeypatch.setattr(Layer.forward, "__code__", other_forward.__code__)
        assert not torch.equal(stock(x), before)
        assert torch.equal(model(x), stock(x))
        monkeypatch.undo()
        assert torch.equal(model(x), before)
