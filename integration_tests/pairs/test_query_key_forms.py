"""Forwards of attentions in many forms: which norms of a query and a key are fused, and why others are left."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn as nn
from query_and_key import reasons
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm = LlamaRMSNorm(16)
        self.k_norm = LlamaRMSNorm(16)
        self.q_proj = nn.Linear(16, 32)
        self.k_proj = nn.Linear(16, 32)
        self.dropout = nn.Dropout(0.5)
        self.flag = True

    def rows(self, x):
        return self.k_proj(x).view(*x.shape[:-1], 2, 16)


class Plain(Base):
    def forward(self, x):
        q = self.q_norm(self.q_proj(x).view(*x.shape[:-1], -1, 16)).transpose(1, 2) * 0.5
        k: torch.Tensor = self.k_norm(hidden_states=self.k_proj(x).view(*x.shape[:-1], -1, 16)).to(x.dtype)
        return q.sum() + k.sum()


class OneNorm(Base):
    def forward(self, x):
        q = self.q_norm(self.q_proj(x).view(*x.shape[:-1], 2, 16))
        q = q.transpose(1, 2)
        k = self.q_norm(self.k_proj(x).view(*x.shape[:-1], 2, 16))
        return q.sum() + k.sum()


class Chained(Base):
    def forward(self, x):
        q = self.q_norm(x)
        k = self.k_norm(q)
        return k


class ReadsItsResult(Base):
    def forward(self, x):
        q = self.q_norm(x)
        k = self.k_norm(self.q_proj(q).view(*x.shape[:-1], 2, 16))
        return k


class ProductBetween(Base):
    def forward(self, x):
        q = self.q_norm(self.q_proj(x).view(*x.shape[:-1], 2, 16))
        x = self.dropout(x)
        k = self.k_norm(self.k_proj(x).view(*x.shape[:-1], 2, 16))
        return q.sum() + k.sum()


class DropsIn(Base):
    def forward(self, x):
        q = self.dropout(self.q_norm(self.q_proj(x).view(*x.shape[:-1], 2, 16)))
        k = self.k_norm(self.k_proj(x).view(*x.shape[:-1], 2, 16))
        return q.sum() + k.sum()


class WritesInPlace(Base):
    def forward(self, x):
        q = self.q_norm(x)
        k = self.k_norm(x.mul_(2))
        return q.sum() + k.sum()


class AnotherBranch(Base):
    def forward(self, x):
        q = self.q_norm(x)
        k = x
        if self.flag:
            k = self.k_norm(x)
        return q.sum() + k.sum()


class OwnMethod(Base):
    def forward(self, x):
        q = self.q_norm(self.q_proj(x).view(*x.shape[:-1], 2, 16))
        k = self.k_norm(self.rows(x))
        return q.sum() + k.sum()


class OneStatement(Base):
    def forward(self, x):
        q, k = self.q_norm(x), self.k_norm(x)
        return q.sum() + k.sum()


class WritesInMethod(Base):
    def rows(self, x):
        return super().rows(x.mul_(2))

    def forward(self, x):
        q = self.q_norm(x)
        k = self.k_norm(self.rows(x))
        return q.sum() + k.sum()


class RunsInProperty(Base):
    @property
    def scale(self):
        self.dropout(torch.ones(1))
        return 2

    def forward(self, x):
        q = self.q_norm(x)
        k = self.k_norm(x * self.scale)
        return q.sum() + k.sum()


FUSED = (Plain, OneNorm, OwnMethod)
LEFT = {
    Chained: "k_norm reads what is computed after q_norm",
    ReadsItsResult: "k_norm reads what is computed after q_norm",
    ProductBetween: "code runs between the two norms",
    DropsIn: "the statement of q_norm does more than shape the norm's result",
    WritesInPlace: "what k_norm reads is computed in another way than by a module and in shape",
    AnotherBranch: "the two norms stand in different branches",
    OneStatement: "both norms stand in one statement",
    WritesInMethod: "a trace of its forward shows that code runs between the two norms",
    RunsInProperty: "a trace of its forward shows that code runs between the two norms",
}


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.attention = kind()

    def forward(self, x):
        return self.attention(x)


@torch.no_grad()
def run(model: nn.Module) -> tuple[torch.Tensor, Counter[str]]:
    torch.manual_seed(1)
    found: Counter[str] = Counter()
    with observe.observing(lambda event: found.update([event.kind])):
        return model(torch.linspace(-1, 1, 3 * 2 * 16).view(2, 3, 16)), found


@pytest.mark.parametrize("kind", FUSED)
def test_forms_that_are_fused(kind) -> None:
    torch.manual_seed(0)
    model = Model(kind).eval()
    before, _ = run(model)
    rmsnorm_patch.apply(model)
    after, found = run(model)
    assert found == {"together": 2}
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", LEFT)
def test_forms_that_are_left(kind) -> None:
    torch.manual_seed(0)
    model = Model(kind).eval()
    assert reasons(model) == {LEFT[kind]}
    before, _ = run(model)
    rmsnorm_patch.apply(model)
    after, found = run(model)
    assert "together" not in found
    assert torch.equal(before, after)
