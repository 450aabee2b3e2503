"""Who is told of each class that is made, by a base class or a metaclass, does not hear of patched ones."""

from __future__ import annotations

import abc
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn as nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch

WIDTH = 32
BY_NAME: dict[str, type] = {}


class Registered(nn.Module):
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        BY_NAME[cls.__name__] = cls


class Unique(nn.Module):
    names: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__name__ in Unique.names:
            raise TypeError(f"a second {cls.__name__}")
        Unique.names += (cls.__name__,)


class Configured(nn.Module):
    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind


class Registering(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
        made = super().__new__(mcs, name, bases, namespace)
        BY_NAME[name] = made
        return made


class RegisteringAbstract(abc.ABCMeta):
    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        BY_NAME[name] = cls


class RegisteredNorm(Registered, LlamaRMSNorm):
    pass


class UniqueNorm(Unique, LlamaRMSNorm):
    pass


class ConfiguredNorm(Configured, LlamaRMSNorm, kind="norm"):
    pass


class MetaNorm(LlamaRMSNorm, metaclass=Registering):
    pass


class AbstractNorm(LlamaRMSNorm, metaclass=RegisteringAbstract):
    pass


Item = TypeVar("Item")


class GenericNorm(LlamaRMSNorm, Generic[Item]):
    pass


class SlottedNorm(LlamaRMSNorm):
    __slots__ = ("kept",)


NORMS = [RegisteredNorm, UniqueNorm, ConfiguredNorm, MetaNorm, AbstractNorm, GenericNorm, SlottedNorm]


class Layer(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2, self.mlp = norm(WIDTH), norm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class RegisteredLayer(Registered, Layer):
    pass


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
@pytest.mark.parametrize("layer", [Layer, RegisteredLayer])
def test_no_register_holds_a_patched_class(layer: type[nn.Module], norm: type[nn.Module]) -> None:
    model, x = layer(norm), torch.randn(3, WIDTH)
    with torch.no_grad():
        expected = model(x)
        report = rmsnorm_patch.apply(model, backend="reference")
        assert report.plan.counts()["in_layer/fuse"] == 1
        patched = type(model.norm1)
        assert patched is not norm
        assert patched.__mro__[1:] == norm.__mro__
        assert isinstance(model.norm1, norm)
        assert not isinstance(norm(WIDTH), patched)
        assert not issubclass(norm, patched)
        assert torch.equal(model(x), expected)
    assert all(globals()[name] is registered for name, registered in BY_NAME.items())
    made = layer(norm)
    assert type(made.norm1) is norm
    rmsnorm_patch.revert(model)
    assert type(model) is layer
    assert type(model.norm1) is norm
