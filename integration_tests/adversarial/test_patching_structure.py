"""A model that changes shape after it was patched, and threads."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.patch_state import derives_from_patched, is_patched, original_class
from rmsnorm_patch.rewrite import observe


def _dropped(model):
    del model.model.layers[1]


def _last_dropped(model):
    del model.model.layers[-1]


def _reordered(model):
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])


def _rotated(model):
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([*layers[1:], layers[0]])


def _shared(model):
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([layers[0], layers[1], layers[1], layers[0]])


def _norm_replaced(model):
    kind = original_class(type(model.model.norm))
    fresh = kind(64, eps=1e-3)
    model.model.layers[1].input_layernorm = fresh


def _final_norm_replaced(model):
    model.model.norm = nn.Identity()


def _norm_is_layer_norm(model):
    torch.manual_seed(9)
    model.model.layers[2].post_attention_layernorm = nn.LayerNorm(64)


def _weight_replaced(model):
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.linspace(0.5, 2.0, 64))


def _weight_edited(model):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1.5)
        model.model.norm.weight.data.add_(0.5)


def _eps_changed(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-2
    model.model.layers[2].post_attention_layernorm.variance_epsilon = 0.0


def _norms_swapped(model):
    a, b = model.model.layers[0], model.model.layers[1]
    a.input_layernorm, b.input_layernorm = b.input_layernorm, a.input_layernorm
    a.post_attention_layernorm = b.input_layernorm


def _norm_parametrized(model):
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    for norm in (model.model.layers[1].input_layernorm, model.model.layers[0].post_attention_layernorm):
        torch.nn.utils.parametrize.register_parametrization(norm, "weight", Double())


def _half_in_another_dtype(model):
    model.model.layers[1].input_layernorm.to(torch.bfloat16)
    model.model.layers[2].post_attention_layernorm.to(torch.float16)


CHANGES = [
    _dropped,
    _last_dropped,
    _reordered,
    _rotated,
    _shared,
    _norm_replaced,
    _final_norm_replaced,
    _norm_is_layer_norm,
    _weight_replaced,
    _weight_edited,
    _eps_changed,
    _norms_swapped,
    _norm_parametrized,
    _half_in_another_dtype,
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__[1:])
def test_a_model_changed_after_patching_computes_what_the_changed_model_does(
    small_model, run, ids, change, model_type, inference
):
    plain, model = (small_model(model_type, num_hidden_layers=3) for _ in range(2))
    rmsnorm_patch.apply(model)
    run(model, ids, inference=inference)
    change(plain)
    change(model)
    expected = run(plain, ids, inference=inference, use_cache=False)
    for _ in range(2):
        after = run(model, ids, inference=inference, use_cache=False)
        assert after.same_as(expected)
    assert after.kinds["in_layer"] >= 1
    rmsnorm_patch.apply(model)  # patches what is there now, and computes the same
    assert run(model, ids, inference=inference, use_cache=False).same_as(expected)
    rmsnorm_patch.revert(model)
    reverted = run(model, ids, inference=inference, use_cache=False)
    assert reverted.same_as(expected)
    assert reverted.kinds == {}
    assert not any(derives_from_patched(type(m)) for m in model.modules())


def test_a_new_norm_is_patched_by_applying_again(small_model, run, ids):
    model = small_model("llama")
    report = rmsnorm_patch.apply(model)
    model.model.norm = original_class(type(model.model.norm))(64, eps=1e-3)
    expected = run(model, ids)
    assert "model.norm" in report.norms
    assert not is_patched(type(model.model.norm))
    assert "model.norm" in rmsnorm_patch.apply(model).norms
    assert is_patched(type(model.model.norm))
    assert run(model, ids).same_as(expected)


def test_layers_left_early(small_model, ids):
    """A forward that stops after any number of layers, or skips some, and norms what it has."""
    model = small_model("llama", num_hidden_layers=4)

    def hidden(order, inference):
        mode = torch.inference_mode() if inference else torch.no_grad()
        with mode:
            x = model.model.embed_tokens(ids)
            position = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
            for index in order:
                x = model.model.layers[index](x, position_embeddings=position)
            return model.lm_head(model.model.norm(x))

    orders = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2], [3, 1], [1, 1, 2], [0, 1, 3], []]
    for inference in (False, True):
        rmsnorm_patch.revert(model)
        expected = [hidden(order, inference) for order in orders]
        rmsnorm_patch.apply(model)
        for order, wanted in zip(orders, expected, strict=True):
            assert torch.equal(hidden(order, inference), wanted), (order, inference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_another_dtype_after_patching(small_model, run, ids, dtype):
    plain, model = small_model("llama"), small_model("llama")
    rmsnorm_patch.apply(model)
    run(model, ids)
    expected = run(plain.to(dtype), ids)
    after = run(model.to(dtype), ids)
    assert after.same_as(expected)
    assert after.logits.dtype == dtype


def test_load_state_dict_after_patching(small_model, run, ids):
    model, other = small_model("llama"), small_model("llama", seed=4)
    rmsnorm_patch.apply(model)
    run(model, ids)
    model.load_state_dict(other.state_dict())
    after = run(model, ids)
    assert after.same_as(run(other, ids))
    assert after.kinds["taken"] == 2


def test_eight_threads_on_one_model(small_model, ids):
    model = small_model("llama", num_hidden_layers=3)
    inputs = [(ids + 7 * i) % 320 for i in range(8)]
    with torch.no_grad():
        expected = [model(x).logits for x in inputs]
    rmsnorm_patch.apply(model)
    wrong, start = [], threading.Barrier(8)

    def work(index):
        start.wait()
        for round_ in range(15):
            with torch.inference_mode() if round_ % 2 else torch.no_grad():
                if not torch.equal(model(inputs[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


def test_models_patched_and_reverted_by_eight_threads(small_model, snapshot, run, ids):
    models = [small_model("llama") for _ in range(8)]
    before = [snapshot(model) for model in models]
    failed = []

    def work(model):
        try:
            for _ in range(5):
                assert len(rmsnorm_patch.apply(model).norms) == 5
                rmsnorm_patch.revert(model)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failed == []
    assert [snapshot(model) for model in models] == before


class Odd(nn.Module):
    """A decoder layer that adds and norms in ways that no rewriter should touch."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.lin = nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(2):
            y = x
            y += self.lin(self.norm(x)) if x.mean() > 0 else self.lin(x)
            exec("pass")
            x = next(self.norm(t) for t in (y,))
        return x


def test_a_layer_that_the_rewriter_does_not_know_keeps_its_forward(small_model):
    kind = type(small_model("llama").model.norm)
    torch.manual_seed(0)
    model = nn.Sequential(Odd(kind(64)), Odd(kind(64))).eval()
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = model(x.clone())
    report = rmsnorm_patch.apply(model)
    assert report.layers == ()
    assert report.norms == ("0.norm", "1.norm")
    events = []
    with torch.no_grad(), observe.observing(events.append):
        assert torch.equal(model(x.clone()), expected)
    assert {event.kind for event in events} == {"norm"}


def test_a_forward_built_without_source_keeps_it(small_model):
    kind = type(small_model("llama").model.norm)
    scope = {"nn": nn}
    exec(
        "class Made(nn.Module):\n"
        "    def __init__(self, norm):\n"
        "        super().__init__()\n"
        "        self.norm = norm\n"
        "    def forward(self, a, b):\n"
        "        x = a + b\n"
        "        return self.norm(x), x\n",
        scope,
    )
    layer = scope["Made"](kind(64)).eval()
    report = rmsnorm_patch.apply(layer)
    assert report.norms == ("norm",)
    assert report.layers == ()
    a, b = torch.randn(2, 64), torch.randn(2, 64)
    with torch.no_grad():
        normed, total = layer(a, b)
    assert torch.equal(total, a + b)
    rmsnorm_patch.revert(layer)
    with torch.no_grad():
        assert torch.equal(layer(a, b)[0], normed)
