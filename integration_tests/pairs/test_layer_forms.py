"""Layer forwards of many forms: what is found in each, and that the rewritten one computes the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from small_layers import Base, Dropout, Model, Plain, SuperAndPrivate, patched_counts
from transformers.modeling_layers import GradientCheckpointingLayer

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe


class OtherOrder(Base):
    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = self.mixer(self.norm1(hidden_states)) + residual
        hidden_states = hidden_states + self.mlp(self.norm2(hidden_states))
        return hidden_states


class ReturnsTuple(Base):
    def forward(self, hidden_states, output_attentions=False):
        residual = hidden_states
        hidden_states, weights = self.mixer(self.norm1(hidden_states)), hidden_states.sum()
        x: torch.Tensor = residual + hidden_states * self.scale
        y = self.norm2(x)
        y, _ = self.mlp(y), None
        hidden_states = x + y
        outputs = (hidden_states,)
        if output_attentions:
            outputs += (weights,)
        return outputs[0]


class SumUsedTwice(Base):
    def forward(self, hidden_states):
        x = hidden_states + self.mixer(self.norm1(hidden_states))
        y = self.norm2(x)
        z = x * 3.0
        return z + self.mlp(y) - x


class InBranches(Base):
    def forward(self, hidden_states):
        if self.flag:
            hidden_states = hidden_states + self.mixer(hidden_states)
            hidden_states = self.norm1(hidden_states)
        else:
            hidden_states = hidden_states + self.mlp(hidden_states)
            hidden_states = self.norm2(hidden_states)
        return hidden_states


class Inherited(Plain):
    pass


class Checkpointing(Base, GradientCheckpointingLayer):
    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mixer(self.norm1(hidden_states))
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        return residual + self.mlp(hidden_states)


FUSED = [Plain, OtherOrder, Dropout, ReturnsTuple, SumUsedTwice, InBranches, SuperAndPrivate, Inherited, Checkpointing]


class WrittenBetween(Base):
    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mixer(self.norm1(hidden_states))
        hidden_states.mul_(2.0)
        return self.norm2(hidden_states)


class CodeBetween(Base):
    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mixer(self.norm1(hidden_states))
        other = self.mlp(hidden_states)
        return self.norm2(hidden_states) + other * 2.0


class CallFirst(Base):
    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mixer(self.norm1(hidden_states))
        return hidden_states.mul_(2.0) * self.norm2(hidden_states)


class MaybeRebound(Base):
    def forward(self, hidden_states):
        x = hidden_states + self.mixer(self.norm1(hidden_states))
        if self.flag:
            x = x * 2.0
        return self.norm2(x)


class Conditional(Base):
    def forward(self, hidden_states):
        x = hidden_states + self.mixer(self.norm1(hidden_states))
        return self.norm2(x) if not self.flag else x


class InLoop(Base):
    def forward(self, hidden_states):
        x = hidden_states
        for _ in range(2):
            x = x + self.mixer(self.norm1(x))
        return self.norm2(x)


class Broadcast(Base):
    """A sum of two shapes is no residual add: the guards' business."""

    def forward(self, hidden_states):
        x = hidden_states + hidden_states.mean(1, keepdim=True)
        return self.norm2(x)


LEFT = [WrittenBetween, CodeBetween, CallFirst, MaybeRebound, Conditional, InLoop]


@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_fused_forms(layer: type[nn.Module], x: torch.Tensor) -> None:
    ran = patched_counts(Model(layer), x)
    assert ran["in_layer/reference"] == 3
    assert ran["in_layer/original"] == 0


@pytest.mark.parametrize("layer", LEFT, ids=lambda layer: layer.__name__)
def test_forms_that_are_left_alone(layer: type[nn.Module], x: torch.Tensor) -> None:
    """The class keeps its own in-layer arithmetic."""
    model = Model(layer)
    plan = rmsnorm_patch.plan(model, backend="reference")
    assert not list(plan.fused_pairs("in_layer"))
    assert not patched_counts(model, x)["in_layer/reference"]


def test_refusals_have_a_reason(x: torch.Tensor) -> None:
    reasons = {
        layer.__name__: [p.reason for p in rmsnorm_patch.plan(Model(layer)).pairs if p.kind == "in_layer"]
        for layer in (CodeBetween, CallFirst)
    }
    assert reasons == {
        "CodeBetween": ["code runs between the add and the norm"] * 3,
        "CallFirst": ["code runs in the norm's statement before the norm"] * 3,
    }


class Scaled(Plain):
    """What it returns is more than its last sum."""

    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = residual + self.mixer(self.norm1(hidden_states))
        residual = hidden_states
        hidden_states = residual + self.mlp(self.norm2(hidden_states))
        return hidden_states * self.scale


class TwoLoops(Model):
    """The first layer's sum is read by the second layer, and then, in another order, by the third."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        for layer in self.layers[::2]:
            x = layer(x)
        return self.norm(x)


def test_sums_that_are_not_handed_over_have_a_reason(x: torch.Tensor) -> None:
    def left(model: nn.Module) -> list[tuple[str, str, str, str]]:
        pairs = rmsnorm_patch.plan(model, backend="reference").pairs
        return [(p.kind, p.layer, p.norm, p.reason) for p in pairs if p.kind in ("cross_layer", "final")]

    last, several = "what it returns is not the sum of its last add alone", "its sum may be read by different norms"
    assert left(Model(Scaled)) == [
        ("cross_layer", "layers.0", "layers.1.norm1", last),
        ("cross_layer", "layers.1", "layers.2.norm1", last),
        ("final", "layers.2", "norm", last),
    ]
    assert patched_counts(Model(Scaled), x) == {"norm/reference": 4, "in_layer/reference": 3}

    first, second, *_ = left(TwoLoops(Plain))
    assert [first[:3], second[:3]] == [
        ("cross_layer", "layers.0", "layers.1.norm1"),
        ("cross_layer", "layers.0", "layers.2.norm1"),
    ]
    assert first[3].startswith(several)
    assert second[3].startswith(several)
    assert patched_counts(TwoLoops(Plain), x)["in_layer/reference"] == 5

    repeated = Model(Plain)
    repeated.layers.append(repeated.layers[0])
    assert {reason for *_, reason in left(repeated) if "once" in reason} == {"the loop runs it more than once"}


def test_a_sum_of_two_shapes(x: torch.Tensor) -> None:
    assert patched_counts(Model(Broadcast), x)["in_layer/reference"] == 3


def test_calls_that_no_kernel_serves_say_why(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmsnorm_patch.backends.triton.backend.available", lambda device: (True, ""))
    model, x = Model(Plain).double(), x.double()
    with torch.no_grad():
        expected = model(x)
    rmsnorm_patch.apply(model, backend="triton")  # no kernel is reached: the guards send every call away
    seen: list[observe.Event] = []
    with torch.no_grad(), observe.observing(seen.append):
        assert torch.equal(model(x), expected)
    reasons = {(event.kind, event.backend, event.reason) for event in seen}
    assert reasons == {(kind, "original", "input dtype torch.float64") for kind in ("norm", "in_layer", "kept")}


def test_branch_that_the_instance_does_not_take(x: torch.Tensor) -> None:
    model = Model(InBranches)
    model.layers[1].flag = False
    plan = rmsnorm_patch.plan(model, backend="reference")
    assert [p.norm for p in plan.fused_pairs("in_layer")] == ["layers.0.norm1", "layers.1.norm2", "layers.2.norm1"]
    assert patched_counts(model, x)["in_layer/reference"] == 3
