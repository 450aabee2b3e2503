"""What a rewritten layer keeps: gradients, signature, decorators, tracebacks; which layers keep their own forward."""

from __future__ import annotations

import ast
import importlib.util
import traceback

import pytest
import small_layers
import torch
from small_layers import WIDTH, Base, Dropout, Model, Plain, SuperAndPrivate, decorated, patched_counts
from transformers.utils.deprecation import deprecate_kwarg

import rmsnorm_patch
from rmsnorm_patch.pairs.source import read_forward
from rmsnorm_patch.patch_state import is_patched


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
    assert forward.__globals__ is vars(small_layers)


def test_decorators_run_once_a_call(x: torch.Tensor) -> None:
    model = Model(SuperAndPrivate)
    patched_counts(model, x)
    assert [layer.calls for layer in model.layers] == [2, 2, 2]


def test_traceback_shows_the_models_own_line() -> None:
    model = Model(Plain)
    rmsnorm_patch.apply(model, backend="reference")
    with pytest.raises(RuntimeError) as caught:
        model.layers[0](torch.randn(1, 2, WIDTH + 1))
    frames = traceback.extract_tb(caught.value.__traceback__)
    lines = [frame.line for frame in frames if frame.filename == small_layers.__file__]
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


def test_code_that_is_put_under_a_forward_is_read_anew() -> None:
    """A forward that was read may get another function's code; the tree of the first is not what runs."""

    class Changing(Base):
        def forward(self, hidden_states):
            residual = hidden_states
            hidden_states = self.norm1(hidden_states)
            return residual + self.mixer(hidden_states)

    before = read_forward(Changing).tree
    assert read_forward(Changing).tree is before
    Changing.forward.__code__ = Plain.forward.__code__
    assert ast.unparse(read_forward(Changing).tree) == ast.unparse(read_forward(Plain).tree)
