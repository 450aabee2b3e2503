"""Layers of two norms and two adds, a model of them, and what its patched copy computes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import add
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

WIDTH = 16


def decorated(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return function(self, *args, **kwargs)

    return wrapper


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = LlamaRMSNorm(WIDTH, eps=1e-5)
        self.norm2 = LlamaRMSNorm(WIDTH, eps=1e-6)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.scale = 0.25
        self.flag = True


class Plain(Base):
    def forward(self, hidden_states, scale=0.5, *, extra: float = 1.0):
        residual = hidden_states
        hidden_states = self.mixer(self.norm1(hidden_states))
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        hidden_states = residual + self.mlp(hidden_states) * scale * extra
        return hidden_states


class Dropout(Base):
    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = residual + self.dropout(self.mixer(self.norm1(hidden_states)))
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        return residual + F.dropout(self.mlp(hidden_states), p=0.5, training=self.training)


class SuperAndPrivate(Base):
    def __private(self, x):
        return self.mixer(self.norm1(x))

    @decorated
    def forward(self, hidden_states):
        if super().extra_repr():  # no `assert`: pytest rewrites it, and that code has no source
            raise ValueError
        residual = hidden_states
        hidden_states = residual + self.__private(hidden_states)
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        return residual + self.mlp(hidden_states)


class Function(Base):
    def forward(self, x):
        x = torch.add(x, self.mixer(self.norm1(x)))
        return add(x, self.mlp(self.norm2(x)))


class InPlaceThroughout(Base):
    def forward(self, x):
        x = x.clone()
        x += self.mixer(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class Model(nn.Module):
    """Three layers and a final norm."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.norm = LlamaRMSNorm(WIDTH)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
        self.eval()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def patched_counts(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """Apply, run, check every bit; what ran."""
    with torch.no_grad():
        expected = model(x.clone())
    rmsnorm_patch.apply(model, backend="reference")
    ran: Counter[str] = Counter()
    with torch.no_grad(), observe.observing(lambda event: ran.update([f"{event.kind}/{event.backend}"])):
        assert torch.equal(model(x.clone()), expected)
    return ran
