"""Modules whose classes guard their attributes, compare themselves, or say how they are pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE

WIDTH = 64


class PlainRMSNorm(nn.Module):
    def __init__(self, width: int = WIDTH, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class FrozenRMSNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("frozen") and name != "training":
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)


class NamedRMSNorm(PlainRMSNorm):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (WIDTH, self.eps), self.__dict__


class GivenRMSNorm(PlainRMSNorm):
    def __reduce__(self) -> Any:
        return made, (type(self), self.state_dict())


def made(cls: type[nn.Module], weights: dict[str, torch.Tensor]) -> nn.Module:
    norm = cls()
    norm.load_state_dict(weights)
    return norm.eval()


class Layer(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = norm(), norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ComparedLayer(Layer):
    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("which of them?")


class Model(nn.Module):
    def __init__(self, norm: type[nn.Module] = PlainRMSNorm, layer: type[Layer] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.norm = nn.ModuleList([layer(norm), layer(norm)]), norm()
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


MODELS = [(FrozenRMSNorm, Layer), (NamedRMSNorm, Layer), (GivenRMSNorm, Layer), (PlainRMSNorm, ComparedLayer)]


@pytest.mark.parametrize(("norm", "layer"), MODELS)
def test_they_are_patched_proved_copied_and_reverted(norm: type[nn.Module], layer: type[Layer]) -> None:
    model, x = Model(norm, layer), torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        expected = model(x)
        report = rmsnorm_patch.apply(model)
        assert (len(report.norms), len(report.layers)) == (5, 2)
        assert torch.equal(model(x), expected)
        rmsnorm_patch.verify(model, {"x": x})
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
            assert torch.equal(again(x), expected)
            rmsnorm_patch.revert(again)
            assert torch.equal(again(x), expected)
            assert type(again.norm) is norm
            assert type(again.layers[0]) is layer
            assert not any(STATE in module.__dict__ for module in again.modules())


class ShownRMSNorm(PlainRMSNorm):
    @property
    def __class__(self) -> Any:
        return PlainRMSNorm


def test_a_class_that_cannot_be_set_is_an_error_and_nothing_is_changed() -> None:
    model, x = Model(), torch.randn(2, 3, WIDTH)
    model.norm = ShownRMSNorm().eval()
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(rmsnorm_patch.UnsupportedModel, match="has no setter"):
            rmsnorm_patch.apply(model)
        assert torch.equal(model(x), expected)
    assert type(model.layers[0].norm1) is PlainRMSNorm
    assert not any(STATE in module.__dict__ for module in model.modules())
