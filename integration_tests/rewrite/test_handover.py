"""What may come between a layer's last add and the norm that reads its sum. The result is always the unpatched one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from handing_over import LAYERS, Model, logits, taken

import rmsnorm_patch
from rmsnorm_patch.rewrite import handover


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mul_(2.0)


def edit_output(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    double(output)


def edit_input(module: nn.Module, args: tuple) -> None:
    double(args[0])


def edit_data(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    double(output.data)  # past the version counter


def replace_input(module: nn.Module, args: tuple) -> tuple:
    return (args[0] * 2.0, *args[1:])


HOOKS = {
    "layer output, in place": lambda m: m.model.layers[1].register_forward_hook(edit_output),
    "layer output, past the version counter": lambda m: m.model.layers[1].register_forward_hook(edit_data),
    "next layer's input, in place": lambda m: m.model.layers[2].register_forward_pre_hook(edit_input),
    "next layer's input, replaced": lambda m: m.model.layers[2].register_forward_pre_hook(replace_input),
    "entry norm's input, in place": lambda m: m.model.layers[2].input_layernorm.register_forward_pre_hook(edit_input),
    "entry norm's output": lambda m: m.model.layers[2].input_layernorm.register_forward_hook(edit_output),
    "in-layer norm's input": lambda m: m.model.layers[1].post_attention_layernorm.register_forward_pre_hook(edit_input),
    "in-layer norm's output": lambda m: m.model.layers[1].post_attention_layernorm.register_forward_hook(edit_output),
    "final norm's input": lambda m: m.model.norm.register_forward_pre_hook(edit_input),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_edit_tensors(twins, tokens, hook: str, mode) -> None:
    plain, patched = twins()
    expected = logits(plain, tokens, mode)
    for model in (plain, patched):
        HOOKS[hook](model)
    edited = logits(plain, tokens, mode)
    assert not torch.equal(edited, expected), "the hook changes nothing: the test proves nothing"
    assert torch.equal(logits(patched, tokens, mode), edited)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_global_hooks_that_edit_tensors(twins, tokens, mode) -> None:
    plain, patched = twins()

    def edit(module: nn.Module, args: tuple, output: object) -> None:
        if type(module).__name__ == "LlamaDecoderLayer":
            double(output.data)

    handle = torch.nn.modules.module.register_module_forward_hook(edit)
    try:
        assert torch.equal(logits(patched, tokens, mode), logits(plain, tokens, mode))
    finally:
        handle.remove()


def test_recorded_hidden_states_keep_the_hand_over(twins, tokens) -> None:
    """transformers leaves its recording hooks on every layer once hidden states were asked for."""
    _, patched = twins()
    with torch.no_grad():
        patched(tokens, output_hidden_states=True)
    assert patched.model.layers[0]._forward_hooks
    assert taken(patched, tokens) == LAYERS


def test_callers_hidden_states_are_not_written(twins, tokens) -> None:
    """What a caller keeps of one call stays as it is in the next."""
    _, patched = twins()
    with torch.no_grad():
        kept = patched(tokens, output_hidden_states=True).hidden_states
        copies = [state.clone() for state in kept]
        patched(tokens.flip(0), output_hidden_states=True)
    assert all(torch.equal(state, saved) for state, saved in zip(kept, copies, strict=True))
    assert not any(state.__dict__.get(handover.CARRIED) for state in kept), "a normed tensor is kept alive"


def test_residual_is_hidden_states(twins) -> None:
    """Both operands of an add are one tensor."""
    plain, patched = twins()
    for model in (plain, patched):
        for layer in model.model.layers:
            layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
            layer.mlp.forward = lambda hidden_states: hidden_states
            layer.input_layernorm.weight.data.fill_(1.0)
            layer.input_layernorm.forward = lambda hidden_states: hidden_states
    tokens = torch.arange(3, 10)[None]
    assert torch.equal(logits(patched, tokens), logits(plain, tokens))


LAYOUTS: dict[str, Callable[[nn.ModuleList], list[nn.Module]]] = {
    "dropped": lambda layers: [layers[0], layers[2], layers[3]],
    "last dropped": lambda layers: list(layers)[:-1],
    "reversed": lambda layers: list(layers)[::-1],
    "shared": lambda layers: [layers[0], layers[1], layers[0], layers[1]],
    "one layer four times": lambda layers: [layers[2]] * 4,
    "swapped": lambda layers: [layers[0], layers[2], layers[1], layers[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_layers_rearranged_after_patching(twins, tokens, layout: str, mode) -> None:
    plain, patched = twins()
    for model in (plain, patched):
        model.model.layers = nn.ModuleList(LAYOUTS[layout](model.model.layers))
        model.config.num_hidden_layers = len(model.model.layers)
    assert torch.equal(logits(patched, tokens, mode), logits(plain, tokens, mode))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_rearranged_before_patching(small_model, tokens, layout: str) -> None:
    model = small_model("llama", num_hidden_layers=LAYERS)
    model.model.layers = nn.ModuleList(LAYOUTS[layout](model.model.layers))
    model.config.num_hidden_layers = len(model.model.layers)
    before = logits(model, tokens)
    plan = rmsnorm_patch.apply(model, backend="reference").plan
    assert torch.equal(logits(model, tokens), before)
    handed = len(list(plan.fused_pairs("cross_layer"))) + len(list(plan.fused_pairs("final")))
    repeated = len(set(map(id, model.model.layers))) < len(model.model.layers)
    assert handed == (0 if repeated else len(model.model.layers))
    assert taken(model, tokens) == handed


def test_early_exit(twins, tokens) -> None:
    plain, patched = twins()
    for model in (plain, patched):
        model.config.num_hidden_layers = 2  # the model's own loop stops here
    assert torch.equal(logits(patched, tokens), logits(plain, tokens))


class Editing(nn.Module):
    """Writes to the hidden states before what it wraps, or, with nothing inside, returns them."""

    def __init__(self, inner: nn.Module | None, uncounted: bool) -> None:
        super().__init__()
        self.inner = inner
        self.uncounted = uncounted

    def forward(self, hidden_states: torch.Tensor, *arguments, **named):
        written = hidden_states.data if self.uncounted else hidden_states
        written[..., :9].add_(2.0)
        return hidden_states if self.inner is None else self.inner(hidden_states, *arguments, **named)


def _insert(model: Model, at: int, module: nn.Module) -> None:
    model.model.layers.insert(at, module)
    model.config.num_hidden_layers = len(model.model.layers)


def _wrap_in_new_list(model: Model, uncounted: bool) -> None:
    layers = list(model.model.layers)
    layers[2] = Editing(layers[2], uncounted)
    model.before = (model.model.layers,)  # still alive, and unchanged
    model.model.layers = nn.ModuleList(layers)


def _subclass(model: Model, uncounted: bool) -> None:
    layer = model.model.layers[2]
    cls = type(layer)

    class Edited(cls):
        def forward(self, hidden_states: torch.Tensor, **named):
            Editing(None, uncounted)(hidden_states)
            return cls.forward(self, hidden_states, **named)

    layer.__class__ = Edited


EDITORS: dict[str, Callable[[Model, bool], object]] = {
    "layer wrapped": lambda m, u: m.model.layers.__setitem__(2, Editing(m.model.layers[2], u)),
    "layer wrapped in a new list": _wrap_in_new_list,
    "its norm wrapped": lambda m, u: setattr(
        m.model.layers[2], "input_layernorm", Editing(m.model.layers[2].input_layernorm, u)
    ),
    "final norm wrapped": lambda m, u: setattr(m.model, "norm", Editing(m.model.norm, u)),
    "inserted": lambda m, u: _insert(m, 2, Editing(None, u)),
    "appended": lambda m, u: _insert(m, LAYERS, Editing(None, u)),
    "in the place of another": lambda m, u: setattr(
        m.model, "layers", nn.ModuleList([m.model.layers[1], Editing(None, u), *m.model.layers[2:]])
    ),
    "layer of another class": _subclass,
}


@pytest.mark.parametrize("edit", EDITORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_module_put_between_the_layers_may_edit_the_sum(twins, tokens, edit: str, mode) -> None:
    """Steering wrappers do; neither `.data` nor inference mode counts the write."""
    plain, patched = twins()
    logits(patched, tokens, mode)
    for model in (plain, patched):
        EDITORS[edit](model, mode is torch.no_grad)
    expected = logits(plain, tokens, mode)
    assert torch.equal(logits(patched, tokens, mode), expected)
    copied = copy.deepcopy(patched) if "class" not in edit else patched
    assert torch.equal(logits(copied, tokens, mode), expected)
    rmsnorm_patch.revert(patched)
    assert torch.equal(logits(patched, tokens, mode), expected)


def test_a_proof_names_what_was_put_between(twins, tokens) -> None:
    """The model is right, if slower: no failure, and the reason."""
    _, patched = twins()
    EDITORS["appended"](patched, False)
    (fallback,) = rmsnorm_patch.verify(patched, tokens).fired.fallbacks
    assert fallback.startswith("model.norm: 1 of 1")
    assert "put between the layer and the norm" in fallback


EPS = torch.linspace(1e-6, 0.5, 7)[:, None]
CHANGES: dict[str, Callable[[Model], object]] = {
    "weight written": lambda m: m.model.layers[2].input_layernorm.weight.data.mul_(3.0),
    "weight replaced": lambda m: setattr(
        m.model.layers[2].input_layernorm, "weight", nn.Parameter(torch.full((64,), 2.0))
    ),
    "eps changed": lambda m: setattr(m.model.layers[2].input_layernorm, "variance_epsilon", 0.5),
    "eps of each token": lambda m: [
        setattr(layer.input_layernorm, "variance_epsilon", EPS) for layer in m.model.layers
    ],
    "norm replaced": lambda m: setattr(m.model.layers[2], "input_layernorm", nn.LayerNorm(64)),
    "in-layer norm replaced": lambda m: setattr(m.model.layers[2], "post_attention_layernorm", nn.LayerNorm(64)),
    "final norm replaced": lambda m: setattr(m.model, "norm", nn.Identity()),
    "other dtype": lambda m: m.to(torch.bfloat16),
    "norms in fp32": lambda m: m.to(torch.bfloat16) and [layer.input_layernorm.float() for layer in m.model.layers],
    "new weights": lambda m: m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_model_changed_after_patching(twins, tokens, change: str) -> None:
    plain, patched = twins()
    logits(patched, tokens)
    for model in (plain, patched):
        CHANGES[change](model)
    try:
        expected = logits(plain, tokens)
    except RuntimeError as error:  # a mixture of dtypes that the model itself does not run with
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            logits(patched, tokens)
        return
    assert torch.equal(logits(patched, tokens), expected)


@pytest.mark.parametrize("what", ["sum", "weight", "other weight", "eps", "norm"])
@pytest.mark.usefixtures("any_caller")
def test_a_carry_that_no_longer_holds_is_refused(twins, what: str) -> None:
    """The direct case: between the add and the norm, one of the things that the carry depends on changes."""
    _, patched = twins()
    layer, norm = patched.model.layers[1], patched.model.layers[2].input_layernorm
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        positions = patched.model.rotary_emb(x, torch.arange(3)[None])
        total = layer(x, position_embeddings=positions)
        assert handover.CARRIED in total.__dict__
        if what == "sum":
            total += 1.0
        elif what == "weight":
            norm.weight += 1.0
        elif what == "other weight":
            norm.weight = nn.Parameter(norm.weight * 2.0)
        elif what == "norm":
            other = patched.model.norm
            other.weight = norm.weight
            assert handover.take(other, total) is None
            return
        else:
            norm.variance_epsilon = 0.5
        expected = type(norm).__mro__[1].forward(norm, total)
        assert torch.equal(norm(total), expected)
        assert handover.CARRIED not in total.__dict__


@pytest.mark.usefixtures("any_caller")
def test_copies_of_a_sum_carry_nothing(twins) -> None:
    _, patched = twins()
    x = torch.randn(1, 3, 64)
    norm = patched.model.layers[2].input_layernorm
    with torch.no_grad():
        total = patched.model.layers[1](x, position_embeddings=patched.model.rotary_emb(x, torch.arange(3)[None]))
        copied = [copy.deepcopy(total), pickle.loads(pickle.dumps(total)), copy.copy(total), total.clone(), total[:]]
        shallow = copy.copy(total)
        total.mul_(2.0)  # the same memory; the copy has a version counter of its own
        assert torch.equal(norm(shallow), type(norm).__mro__[1].forward(norm, shallow))
        for other in copied:
            other.mul_(2.0)
            assert torch.equal(norm(other), type(norm).__mro__[1].forward(norm, other))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_users_own_loop_may_edit_the_sum(twins, mode) -> None:
    """`.data` and inference mode count no versions: only the model's own loop, which was read, may hand over."""
    plain, patched = twins()
    x = torch.randn(1, 3, 64)

    def loop(model: Model) -> torch.Tensor:
        state = x
        positions = model.model.rotary_emb(x, torch.arange(3)[None])
        for layer in model.model.layers:
            state = layer(state, position_embeddings=positions)
            double(state.data)
        return model.model.norm(state)

    with mode():
        assert torch.equal(loop(patched), loop(plain))


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_the_plan_says_what_is_not_handed_over_in_inference_mode(twins, tokens, model_type: str) -> None:
    plain, patched = twins(model_type)
    handed = [pair for pair in rmsnorm_patch.plan(plain).pairs if pair.kind != "in_layer" and pair.action == "fuse"]
    always = [pair for pair in handed if "except in inference mode" not in pair.reason]
    assert (len(always) == len(handed)) is (model_type == "llama")
    assert taken(patched, tokens) == len(handed)
    assert taken(patched, tokens, torch.inference_mode) == len(always)
    assert torch.equal(logits(plain, tokens, torch.inference_mode), logits(patched, tokens, torch.inference_mode))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_classs_own_forward_put_on_the_layer_is_no_obstacle(twins, tokens, mode) -> None:
    """transformers 5.0 leaves it there once hidden states were asked for."""
    plain, patched = twins()
    for layer in patched.model.layers:
        layer.forward = layer.forward
    assert taken(patched, tokens, mode) == LAYERS
    assert torch.equal(logits(plain, tokens, mode), logits(patched, tokens, mode))
    rmsnorm_patch.revert(patched)
    for layer in patched.model.layers:
        assert layer.__dict__["forward"].__func__ is type(layer).forward
