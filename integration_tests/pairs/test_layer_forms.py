"""Layer forwards of many forms: what is found in each, and that the rewritten one computes the same bits."""

from __future__ import annotations

import functools
import importlib.util
import traceback
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils.deprecation import deprecate_kwarg

import rmsnorm_patch
from rmsnorm_patch.pairs.source import read_forward
from rmsnorm_patch.patch_state import is_patched
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


class OtherOrder(Base):
    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = self.mixer(self.norm1(hidden_states)) + residual
        hidden_states = hidden_states + self.mlp(self.norm2(hidden_states))
        return hidden_states


class Dropout(Base):
    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = residual + self.dropout(self.mixer(self.norm1(hidden_states)))
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        return residual + F.dropout(self.mlp(hidden_states), p=0.5, training=self.training)


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


class Inherited(Plain):
    pass


class Checkpointing(Base, GradientCheckpointingLayer):
    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mixer(self.norm1(hidden_states))
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        return residual + self.mlp(hidden_states)


class Remembers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def forward(self, hidden_states):
        x = hidden_states + self.mixer(self.norm1(hidden_states))
        y = self.norm2(x)
        self.seen.append(x)
        self.last = x
        return x + y


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


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))


def patched_counts(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """Apply, run, check every bit; what ran."""
    with torch.no_grad():
        expected = model(x.clone())
    rmsnorm_patch.apply(model, backend="reference")
    ran: Counter[str] = Counter()
    with torch.no_grad(), observe.observing(lambda event: ran.update([f"{event.kind}/{event.backend}"])):
        assert torch.equal(model(x.clone()), expected)
    return ran


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


def test_training_keeps_dropout_and_gradients(x: torch.Tensor) -> None:
    model = Model(Dropout).train()

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    rmsnorm_patch.apply(model, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_arguments_defaults_and_signature_stay() -> None:
    model = Model(Plain)
    layer, x = model.layers[0], torch.randn(1, 2, WIDTH)
    with torch.no_grad():
        expected = [layer(x), layer(x, 0.1), layer(x, scale=0.2, extra=3.0)]
        rmsnorm_patch.apply(model, backend="reference")
        assert all(
            torch.equal(a, b)
            for a, b in zip(expected, [layer(x), layer(x, 0.1), layer(x, scale=0.2, extra=3.0)], strict=True)
        )
    forward = type(layer).forward
    assert (forward.__defaults__, forward.__kwdefaults__) == (Plain.forward.__defaults__, Plain.forward.__kwdefaults__)
    assert forward.__qualname__ == Plain.forward.__qualname__
    assert forward.__annotations__ == Plain.forward.__annotations__
    assert forward.__globals__ is globals()


def test_decorators_run_once_a_call(x: torch.Tensor) -> None:
    model = Model(SuperAndPrivate)
    patched_counts(model, x)
    assert [layer.calls for layer in model.layers] == [2, 2, 2]


def test_traceback_shows_the_models_own_line() -> None:
    model = Model(Plain)
    rmsnorm_patch.apply(model, backend="reference")
    with pytest.raises(RuntimeError) as caught:
        model.layers[0](torch.randn(1, 2, WIDTH + 1))
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename == __file__]
    assert "hidden_states = self.mixer(self.norm1(hidden_states))" in lines


def test_a_forward_of_the_instance_is_left_alone(x: torch.Tensor) -> None:
    model = Model(Plain)
    model.layers[1].forward = lambda hidden_states: hidden_states * 2.0
    plan = rmsnorm_patch.plan(model, backend="reference")
    assert [p.layer for p in plan.fused_pairs("in_layer")] == ["layers.0", "layers.2"]
    assert any(p.layer == "layers.1" and "instance-level forward" in p.reason for p in plan.pairs)
    patched_counts(model, x)
    assert not is_patched(type(model.layers[1]))


def test_a_trace_that_disagrees_keeps_the_forward(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source alone is not enough: with a norm that the trace does not see called, the layer is left alone."""
    from rmsnorm_patch.pairs import layer, trace

    blind = trace.Trace(frozenset(), 0, "")
    monkeypatch.setattr(layer, "trace_layer", lambda *_: blind)
    plan = rmsnorm_patch.plan(Model(Plain), backend="reference")
    assert not list(plan.fused_pairs())
    assert {p.reason.partition(" of line")[0] for p in plan.pairs} == {
        "a trace of its forward did not confirm the pair"
    }


def test_a_forward_without_source_is_left_alone(x: torch.Tensor) -> None:
    namespace: dict = {"Base": Base}
    code = "class Hidden(Base):\n def forward(self, x):\n  x = x + self.mixer(self.norm1(x))\n  return self.norm2(x)\n"
    exec(code, namespace)
    namespace["Hidden"].__module__ = "nowhere"
    model = Model(namespace["Hidden"])
    assert "its source cannot be read" in rmsnorm_patch.plan(model).pairs[0].reason
    assert set(patched_counts(model, x)) == {"norm/reference"}


def test_only_decorators_that_rename_arguments_let_results_pass_unseen() -> None:
    class Renamed(Plain):
        forward = deprecate_kwarg("states", "9.0", new_name="hidden_states")(Plain.forward)

    assert read_forward(Plain).passes_results
    assert read_forward(Renamed).wrappers
    assert read_forward(Renamed).passes_results
    assert not read_forward(SuperAndPrivate).passes_results


def test_a_decorator_put_on_later_is_kept(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patched class of an earlier apply must not come back without what was put around the forward since."""
    rmsnorm_patch.apply(Model(Plain), backend="reference")
    monkeypatch.setattr(Plain, "forward", decorated(Plain.forward))
    model = Model(Plain)
    assert patched_counts(model, x)["in_layer/reference"] == 3
    assert [layer.calls for layer in model.layers] == [2, 2, 2]


def test_the_trace_leaves_no_mark(x: torch.Tensor) -> None:
    model = Model(Remembers)
    rmsnorm_patch.plan(model)
    assert all(layer.seen == [] and not hasattr(layer, "last") for layer in model.layers)


EDITED = """
import torch
import torch.nn as nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm(16)
        self.mlp = nn.Linear(16, 16)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mlp(hidden_states)
        residual = hidden_states
        return residual + 1.0 * self.norm(hidden_states)
"""


@pytest.mark.parametrize("edited", [False, True])
def test_a_source_edited_after_its_import_is_left_alone(x: torch.Tensor, tmp_path, edited: bool) -> None:
    """The same names on the same lines, another constant: a rewritten forward would be the code of the edit."""
    path = tmp_path / f"edited_{edited}.py"
    path.write_text(EDITED)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    torch.manual_seed(0)
    layer = module.Layer().eval()
    with torch.no_grad():
        expected = layer(x)
    if edited:
        path.write_text(EDITED.replace("1.0 *", "2.5 *"))
    plan = rmsnorm_patch.apply(layer, backend="reference").plan
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert [pair.action for pair in plan.fused_pairs()] == ([] if edited else ["fuse"])
    assert not edited or "is not the code that runs" in plan.pairs[0].reason
