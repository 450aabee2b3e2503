"""Forwards that somebody holds beyond `revert`: wrappers put on after `apply`, saved bound methods, derived classes.

Every call of ours, fused or not, is an event. After `revert` there must be none, whatever holds the patched forward.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import torch.nn as nn
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.rewrite import handover, layer_calls

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def pass_on(forward, *args, **named):
    return forward(*args, **named)


def partial(module: nn.Module) -> None:
    """As diffusers' HookRegistry does."""
    held = module.forward
    module.forward = functools.update_wrapper(functools.partial(pass_on, held), held)


def closure(module: nn.Module) -> None:
    held = module.forward

    @functools.wraps(held)
    def forward(*args, **named):
        return held(*args, **named)

    module.forward = forward


def saved(module: nn.Module) -> None:
    module.forward = module.forward


def called(module: nn.Module) -> None:
    """The module's call is held, not its forward."""
    module.forward = functools.partial(type(module).forward, module)


def accelerate(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())
    add_hook_to_module(module, ModelHook(), append=True)


def compiled(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


class Mixin:
    pass


def derived_and_held(module: nn.Module) -> None:
    """As FSDP2 derives a class, and a wrapper around it."""
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (Mixin, cls), {})
    partial(module)


WAYS = [partial, closure, saved, called, accelerate, compiled, derived_and_held]


def norms_of(model: PreTrainedModel) -> list[nn.Module]:
    return [module for path, module in model.named_modules() if path.endswith("norm")]


def hold(model: PreTrainedModel, kind: str, way: Callable[[nn.Module], None]) -> None:
    for module in model.model.layers if kind == "layers" else norms_of(model):
        way(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["norms", "layers"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_of_ours_runs_after_revert(small_model, run, ids, way, kind):
    model = small_model("llama")
    before = run(model, ids)
    rmsnorm_patch.apply(model, backend="reference")
    hold(model, kind, way)
    assert run(model, ids).same_as(before)
    rmsnorm_patch.revert(model)
    after = run(model, ids)
    assert after.kinds == {}
    assert after.same_as(before)


def test_no_kernel_runs_after_revert(small_model, run, ids, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = small_model("llama", num_hidden_layers=1)
    before = run(model, ids)
    rmsnorm_patch.apply(model, backend="triton")
    hold(model, "norms", partial)
    assert run(model, ids).backends["triton"] > 0
    rmsnorm_patch.revert(model)
    after = run(model, ids)
    assert after.kinds == {}
    assert after.same_as(before)


@pytest.mark.parametrize("kind", ["norms", "layers"])
@pytest.mark.parametrize("way", [partial, accelerate], ids=lambda way: way.__name__)
def test_a_forward_held_from_an_earlier_patch_follows_the_one_that_the_module_has_now(
    small_model, run, ids, monkeypatch, way, kind
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = small_model("llama")
    rmsnorm_patch.apply(model, backend="triton")
    held = [(module, module.forward) for module in (*norms_of(model), *model.model.layers)]
    rmsnorm_patch.revert(model)
    rmsnorm_patch.apply(model, backend="reference", exclude=["model.layers.0.*"])
    expected = run(model, ids)
    for module, forward in held:
        module.forward = functools.partial(pass_on, forward)
    after = run(model, ids)
    assert set(after.backends) <= {"reference", "original"}
    assert {id(event.norm) for event in after.events} == {id(event.norm) for event in expected.events}
    assert after.same_as(expected)


def test_a_layer_left_out_of_a_second_patch_keeps_its_own_forward(small_model, run, ids):
    """Its norms are patched still: the forward that was rewritten must not fuse them."""
    model = small_model("llama")
    rmsnorm_patch.apply(model, backend="reference")
    layer = model.model.layers[0]
    held = layer.forward
    rmsnorm_patch.revert(model)
    rmsnorm_patch.apply(layer.post_attention_layernorm, backend="reference")
    layer.forward = held
    assert run(model, ids).kinds == {"norm": 1}


def test_a_sum_from_an_earlier_patch_is_not_taken(small_model):
    norm, x = small_model("llama").model.norm, torch.randn(1, 3, 64)
    rmsnorm_patch.apply(norm, backend="reference")
    left = torch.zeros_like(x)
    kernel = layer_calls.kernel_of(norm)
    with torch.no_grad():
        handover.put(left, x, norm, norm.weight, norm.variance_epsilon, kernel, handover.Link())
        rmsnorm_patch.revert(norm)
        rmsnorm_patch.apply(norm, backend="auto")
        assert torch.equal(norm(x), kernel.original(norm, x))
        handover.put(left, x, norm, norm.weight, norm.variance_epsilon, layer_calls.kernel_of(norm), handover.Link())
        assert norm(x) is left


def test_a_held_layer_forward_passes_every_kind_of_argument():
    """Positional, by name, keyword-only, collected: as the unpatched forward has them."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = LlamaRMSNorm(16), nn.Linear(16, 16)

        def forward(self, hidden, /, scale, *rest, shift=0.0, **named):
            """Documented."""
            residual = hidden
            hidden = self.up(hidden)
            hidden = residual + hidden
            normed = self.norm(hidden)
            return normed * scale + shift + sum(rest) + named.get("bias", 0.0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, 2.0, 3.0, 4.0, shift=5.0, bias=6.0)
            return x

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = model(x)
        report = rmsnorm_patch.apply(model, backend="reference")
        assert report.layers == ("layers.0", "layers.1")
        held = [layer.forward for layer in model.layers]
        assert held[0].__doc__ == "Documented."
        rmsnorm_patch.revert(model)
        for layer, forward in zip(model.layers, held, strict=True):
            layer.forward = functools.partial(forward)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_wrapped_patched_model_revert_for_themselves(small_model, run, ids, way):
    before = run(small_model("llama"), ids)
    model = small_model("llama")
    rmsnorm_patch.apply(model, backend="reference")
    hold(model, "norms", partial)
    made = way(model)
    fused = run(made, ids)
    assert fused.kinds["norm"] > 0
    assert {id(event.norm) for event in fused.events} <= {id(module) for module in made.modules()}
    rmsnorm_patch.revert(made)
    after = run(made, ids)
    assert after.kinds == {}
    assert after.same_as(before)
    assert run(model, ids).kinds["norm"] > 0


def test_a_wrapper_taken_off_after_revert_leaves_the_model_to_the_next_apply(small_model, run, ids):
    """The wrapper puts back what it held, which is ours: it stands for the class's own forward."""
    model = small_model("llama")
    before = run(model, ids)
    rmsnorm_patch.apply(model, backend="reference")
    expected = run(model, ids)
    held = [(module, module.forward) for module in (*norms_of(model), *model.model.layers)]
    rmsnorm_patch.revert(model)
    for module, forward in held:
        module.forward = forward
    assert run(model, ids).kinds == {}
    rmsnorm_patch.apply(model, backend="reference")
    assert run(model, ids).kinds == expected.kinds
    rmsnorm_patch.revert(model)
    after = run(model, ids)
    assert after.kinds == {}
    assert after.same_as(before)
    for module, _ in held:
        forward = module.__dict__["forward"]
        assert isinstance(forward, MethodType)
        assert forward.__func__ is type(module).forward


@pytest.mark.parametrize("way", [partial, closure], ids=lambda way: way.__name__)
def test_layers_wrapped_before_apply_fuse_at_the_next_one(small_model, run, ids, way):
    model = small_model("llama")
    fused = small_model("llama")
    rmsnorm_patch.apply(fused, backend="reference")
    for layer in model.model.layers:
        way(layer)
    report = rmsnorm_patch.apply(model, backend="reference")
    assert not any(report.plan.fused_pairs())
    assert rmsnorm_patch.apply(model, backend="reference") is report
    for layer in model.model.layers:
        del layer.forward
    assert any(rmsnorm_patch.plan(model, backend="reference").fused_pairs())
    rmsnorm_patch.apply(model, backend="reference")
    assert run(model, ids).kinds == run(fused, ids).kinds


def test_a_class_derived_from_a_patched_one_has_its_own_methods_after_revert(small_model):
    """`super()` in them must find the class that the module then has."""
    norm, x = small_model("llama").model.norm, torch.randn(2, 64)
    with torch.no_grad():
        expected = norm(x) * 2
        rmsnorm_patch.apply(norm, backend="reference")

        class Doubled(type(norm)):
            def forward(self, hidden_states, *, times=2):
                """Twice."""
                return super().forward(hidden_states) * times

            @property
            def described(self):
                return super().extra_repr()

        norm.__class__ = Doubled
        assert torch.equal(norm(x), expected)
        described = norm.described
        rmsnorm_patch.revert(norm)
        assert torch.equal(norm(x), expected)
        assert norm.described == described
        assert norm.forward.__doc__ == "Twice."
        assert type(norm).__name__ == "Doubled"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["norms", "layers"])
def test_a_compiled_forward_that_is_held_is_traced_again_after_revert(small_model, ids, kind):
    """The guard is on the class, and what is traced then is the original's code: whole graphs before and after."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    model = small_model("llama")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        rmsnorm_patch.apply(model, backend="reference")
        for module in model.model.layers if kind == "layers" else norms_of(model):
            module.forward = torch.compile(module.forward, backend=record, fullgraph=True)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        patched = len(graphs)
        rmsnorm_patch.revert(model)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert len(graphs) > patched
