"""Tensors that alias, and hooks that edit them."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics.spec import LLAMA

MODES = [torch.no_grad, torch.inference_mode]


class Doubling(nn.Module):
    """x + x: the residual is the hidden state itself."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states):
        hidden_states = hidden_states + hidden_states
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        return residual, hidden_states


@pytest.mark.parametrize("mode", MODES)
def test_the_residual_is_the_hidden_state(small_model, mode):
    norm = small_model("llama").model.norm
    layer = Doubling(norm).eval()
    x = torch.randn(2, 3, 64)
    kept = x.clone()
    with mode():
        expected = layer(x)
        report = rmsnorm_patch.apply(layer)
        got = layer(x)
    assert report.layers == ("",)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(x, kept)


def test_the_op_takes_one_tensor_as_both_operands():
    x, weight = torch.randn(3, 64), torch.rand(64)
    normed, total = ops.bind_fused_add_rms_norm(LLAMA)(x, x, weight, 1e-6)
    wanted, sum_ = ops.bind_fused_add_rms_norm(LLAMA)(x, x.clone(), weight, 1e-6)
    assert torch.equal(normed, wanted)
    assert torch.equal(total, sum_)


def test_an_in_place_result_that_aliases_the_weight_is_refused():
    weight = torch.rand(64)
    for x, residual in ((weight[None], torch.rand(1, 64)), (torch.rand(1, 64), weight[None])):
        kept = weight.clone()
        with pytest.raises(UnsupportedInput, match="weight"):
            ops.bind_fused_add_rms_norm_(LLAMA)(x, residual, weight, 1e-6)
        assert torch.equal(weight, kept)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "mixtral", "phi3"])
def test_hidden_states_that_a_caller_keeps_do_not_change(small_model, ids, model_type, mode):
    model = small_model(model_type, num_hidden_layers=3)
    with mode():
        expected = model(ids, output_hidden_states=True).hidden_states
    rmsnorm_patch.apply(model)
    kept = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: kept.append((_first(out), _first(out).clone())))
        for layer in model.model.layers
    ]
    with mode():
        got = model(ids, output_hidden_states=True).hidden_states
        copies = [h.clone() for h in got]
        model((ids + 1) % 320)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, copies, strict=True))
    for out, at_the_time in kept:
        assert torch.equal(out, at_the_time)


@pytest.mark.parametrize("mode", MODES)
def test_every_depth_keeps_its_direction(small_model, run, ids, mode):
    """Cosine per layer against fp32; in the reference arithmetic it is the unpatched model's, in bf16 too."""
    model = small_model("llama", torch.bfloat16, num_hidden_layers=6)
    exact = small_model("llama", torch.float32, num_hidden_layers=6)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    wide = run(exact, ids)
    rmsnorm_patch.apply(model)
    ours = run(model, ids)
    assert len(ours.hidden) == 7
    for mine, theirs in zip(ours.hidden, wide.hidden, strict=True):
        cosine = nn.functional.cosine_similarity(mine.float().flatten(1), theirs.flatten(1))
        assert cosine.min() >= 0.999


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _edit_output(module, arguments, output):
    _first(output).mul_(1.5)


def _replace_output(module, arguments, output):
    return (_first(output) * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def _edit_through_a_view(module, arguments, output):
    _first(output).view(-1)[:64] = 0.25


def _edit_input(module, arguments):
    arguments[0].add_(0.5)


def _replace_input(module, arguments):
    return (arguments[0] + 0.5, *arguments[1:])


OUTPUT_HOOKS = [_edit_output, _replace_output, _edit_through_a_view]
INPUT_HOOKS = [_edit_input, _replace_input]


def _install(model, where, hook):
    module = {
        "layer": lambda: model.model.layers[1],
        "next layer": lambda: model.model.layers[2],
        "norm": lambda: model.model.layers[1].input_layernorm,
        "in-layer norm": lambda: model.model.layers[1].post_attention_layernorm,
        "final norm": lambda: model.model.norm,
        "mlp": lambda: model.model.layers[1].mlp,
        "attention": lambda: model.model.layers[1].self_attn,
    }[where]()
    if hook in OUTPUT_HOOKS:
        return module.register_forward_hook(hook)
    return module.register_forward_pre_hook(hook)


WHERE = ["layer", "next layer", "norm", "in-layer norm", "final norm", "mlp"]


@pytest.mark.parametrize("order", ["hook first", "hook after"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hook", OUTPUT_HOOKS + INPUT_HOOKS, ids=lambda h: h.__name__[1:])
@pytest.mark.parametrize("where", WHERE)
def test_hooks_that_edit_tensors_have_the_effect_that_they_had(small_model, run, ids, where, hook, mode, order):
    inference = mode is torch.inference_mode
    plain, model = (small_model("llama", num_hidden_layers=4) for _ in range(2))
    if order == "hook after":
        run(plain, ids)  # transformers' recording hooks come first then, and record what this hook gets
    _install(plain, where, hook)
    if order == "hook first":
        _install(model, where, hook)
        rmsnorm_patch.apply(model)
    else:
        rmsnorm_patch.apply(model)
        run(model, ids, inference=inference)
        handle = _install(model, where, hook)
    expected = run(plain, ids, inference=inference)
    assert run(model, ids, inference=inference).same_as(expected)
    if order == "hook after":
        handle.remove()
        stock = run(small_model("llama", num_hidden_layers=4), ids, inference=inference)
        after = run(model, ids, inference=inference)
        assert after.same_as(stock)
        assert after.kinds["in_layer"] == 4


@pytest.mark.parametrize("mode", MODES)
def test_a_global_hook_that_edits_layer_outputs(small_model, run, ids, mode):
    inference = mode is torch.inference_mode
    plain, model = (small_model("llama", num_hidden_layers=3) for _ in range(2))
    rmsnorm_patch.apply(model)

    def edit(module, arguments, output):
        if type(module).__name__ in ("LlamaDecoderLayer", "LlamaRMSNorm"):
            _edit_output(module, arguments, output)

    handle = nn.modules.module.register_module_forward_hook(edit)
    try:
        expected, got = run(plain, ids, inference=inference), run(model, ids, inference=inference)
    finally:
        handle.remove()
    assert got.same_as(expected)
    assert not got.same_as(run(plain, ids, inference=inference))


@pytest.mark.parametrize("mode", MODES)
def test_a_subclass_of_the_model_that_edits_between_layers(small_model, ids, mode):
    """The loop over the layers is somebody's own code, which edits the sum in place between two layers."""

    def steer(model):
        with mode():
            x = model.model.embed_tokens(ids)
            position = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
            for layer in model.model.layers:
                x = layer(x, position_embeddings=position)
                x += 0.125
            return model.lm_head(model.model.norm(x))

    model = small_model("llama", num_hidden_layers=3)
    expected = steer(model)
    rmsnorm_patch.apply(model)
    assert torch.equal(steer(model), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_over_the_layers_is_replaced_after_patching(small_model, ids, mode):
    """`LlamaModel.forward` was read and found passive; then somebody overrides it on the instance."""
    from types import MethodType

    from transformers.modeling_outputs import BaseModelOutputWithPast

    def forward(self, input_ids=None, **named):
        x = self.embed_tokens(input_ids)
        position = self.rotary_emb(x, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=position)
            x.mul_(0.5)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    plain, model = (small_model("llama", num_hidden_layers=3) for _ in range(2))
    rmsnorm_patch.apply(model)
    for made in (plain, model):
        made.model.forward = MethodType(forward, made.model)
    with mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("mode", MODES)
def test_one_input_tensor_fed_twice(small_model, mode):
    """The same tensor object goes through a norm twice, edited in between: nothing that was left on it is reused."""
    model = small_model("llama")
    layer, following = model.model.layers
    x = torch.randn(1, 3, 64)
    position = model.model.rotary_emb(x, torch.arange(3)[None])
    rmsnorm_patch.apply(model)
    with mode():
        total = layer(x.clone(), position_embeddings=position)
        total.mul_(2.0)
        edited = following.input_layernorm(total)
        again = following.input_layernorm(total)
        wanted = following.input_layernorm(total.clone())
    assert torch.equal(edited, wanted)
    assert torch.equal(again, wanted)
