"""Each wrong rewrite or hand-over turns a proof red, also where every single norm call is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from proof_models import apply_as_kernel, as_kernel, build, honest, prompts

from rmsnorm_patch import VerificationFailed, apply, verify
from rmsnorm_patch.patch_state import STATE, is_patched, original_class
from rmsnorm_patch.rewrite import layer_calls, norm_adds, norms, observe


def helper_cell(layer: nn.Module, name: str) -> object:
    """The closure cell through which the rewritten forward of `layer` calls a helper."""
    function = type(layer).forward
    while name not in function.__code__.co_freevars:
        function = function.__wrapped__
    return function.__closure__[function.__code__.co_freevars.index(name)]


@pytest.fixture
def rewrite_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """rewrite_with(model, "in_layer" or "tail", f): the rewritten layers call f in place of the helper."""
    changed = []

    def put(model: nn.Module, helper: str, function: Callable) -> None:
        cell = helper_cell(model.model.layers[1], f"_rmsnorm_{helper}")
        changed.append((cell, cell.cell_contents))
        cell.cell_contents = function

    yield put
    for cell, before in changed:
        cell.cell_contents = before


def red(model: nn.Module, **options: object) -> VerificationFailed:
    """Without greedy text, which a test asks for where it says something of it."""
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts(), **{"greedy_tokens": 0, **options})
    return caught.value


def only_at(norm: nn.Module, wrong: Callable) -> Callable:
    """`wrong` at one norm, the real helper at all others. A proof calls a replica's, which has the same weight."""

    def in_layer(called: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (wrong if called.weight is norm.weight else layer_calls.in_layer)(called, a, b)

    return in_layer


def behind(in_layer: Callable) -> Callable:
    """The helper of a sandwich whose first norm is right, and whose pair is `in_layer`."""

    def norm_add_norm(norm, inner, side, a, b):  # type: ignore[no-untyped-def]
        return in_layer(norm, *norm_adds._reference(inner, layer_calls.kernel_of(inner), side, a, b))

    return norm_add_norm


def sum_not_written(norm, a, b):  # type: ignore[no-untyped-def]
    _, normed = layer_calls.in_layer(norm, a, b)
    return b, normed


def sum_written_late(norm, a, b):  # type: ignore[no-untyped-def]
    total, normed = layer_calls.in_layer(norm, a, b)
    return total + 0 * normed.float().mean() + 2 * torch.finfo(a.dtype).eps * total, normed


def normed_replaced(norm, a, b):  # type: ignore[no-untyped-def]
    total, _ = layer_calls.in_layer(norm, a, b)
    return total, total


def skipped_silently(norm, a, b):  # type: ignore[no-untyped-def]
    return a + b, a + b


def unobserved(norm, a, b):  # type: ignore[no-untyped-def]
    with observe.observing(lambda event: None):
        return layer_calls.in_layer(norm, a, b)


def operands_crossed(norm, a, b):  # type: ignore[no-untyped-def]
    return tuple(reversed(layer_calls.in_layer(norm, a, b)))


IN_LAYER = {
    f.__name__: f
    for f in (sum_not_written, sum_written_late, normed_replaced, skipped_silently, unobserved, operands_crossed)
}


AT_ONE_SITE = [
    pytest.param(kind, name, marks=() if kind in ("llama", "gemma2") or number == at else pytest.mark.long)
    for at, kind in enumerate(("llama", "qwen3", "gemma2", "mixtral"))
    for number, name in enumerate(sorted(IN_LAYER))
]
"""The short form: every fault in Llama and in Gemma 2, whose layers are written otherwise, and one in each other."""


@pytest.mark.parametrize(("kind", "name"), AT_ONE_SITE)
def test_in_layer_at_one_site(name: str, kind: str, rewrite_with: Callable) -> None:
    model = build(kind, torch.bfloat16)
    apply(model)
    layer = model.model.layers[1]
    if kind == "gemma2":
        rewrite_with(model, "norm_add_norm", behind(only_at(layer.pre_feedforward_layernorm, IN_LAYER[name])))
    else:
        rewrite_with(model, "in_layer", only_at(layer.post_attention_layernorm, IN_LAYER[name]))
    caught = red(model)
    assert not (caught.proof.flow.passed and caught.proof.fired.passed)
    assert "layers." in caught.site


@pytest.mark.parametrize("everywhere", [True, False])
def test_norms_swapped(everywhere: bool, rewrite_with: Callable) -> None:
    """Two norms of a layer trade places: each call is right for the norm it names, and each norm is called once."""
    model = build("llama", torch.bfloat16)
    apply(model)
    for layer in model.model.layers if everywhere else model.model.layers[1:2]:
        layer.post_attention_layernorm.__dict__["other"] = layer.input_layernorm

    def in_layer(norm, a, b):  # type: ignore[no-untyped-def]
        return layer_calls.in_layer(norm.__dict__.get("other", norm), a, b)

    rewrite_with(model, "in_layer", in_layer)
    proof = red(model).proof
    assert all(site.passed for site in proof.sites)
    assert not proof.flow.passed
    assert not proof.fired.passed


def test_weights_swapped_within_a_call(rewrite_with: Callable) -> None:
    """The event names the right norm; the arithmetic used its neighbour's weight."""
    model = build("llama", torch.bfloat16)
    apply(model)
    layer = model.model.layers[1]

    def wrong(norm, a, b):  # type: ignore[no-untyped-def]
        total = a + b
        normed = original_class(type(norm)).forward(layer.input_layernorm, total)  # of the model itself: same weights
        if observe.active:
            observe.report(observe.Event("in_layer", norm, (a, b), normed, total, "reference"))
        return total, normed

    rewrite_with(model, "in_layer", only_at(layer.post_attention_layernorm, wrong))
    assert red(model).site == "model.layers.1.post_attention_layernorm"


def test_wrong_eps_in_one_hand_over(kernel: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the driven runs reach it: the model's own sums are too large for eps to matter in bf16."""
    kernel(as_kernel(honest))
    model = build("llama", torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(200)
    apply_as_kernel(model)
    bad = model.model.layers[1].post_attention_layernorm
    found = layer_calls.kernel_of(bad)
    assert found is not None
    right = found.eps_of
    monkeypatch.setattr(found, "eps_of", lambda norm: 1e-5 if norm.weight is bad.weight else right(norm))
    caught = red(model)
    assert caught.site == "model.layers.1.post_attention_layernorm"
    (site,) = [site for site in caught.proof.sites if not site.passed]
    assert {m.name for m in site.measurements if not m.passed} >= {"driven:tiny"}


@pytest.mark.parametrize("observed", [True, False])
def test_stale_value_handed_over(observed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm takes what was left for it in the layer before, or in the run before."""
    model = build("llama", torch.bfloat16)
    apply(model)
    right, kept = norms.take, {}

    def stale(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
        with observe.observing(lambda event: None):
            now = right(norm, hidden_states)
        if now is None:
            return None
        before = kept.setdefault(now.shape, now)
        if observed and observe.active:
            observe.report(observe.Event("taken", norm, (hidden_states,), before, None, "reference"))
        return before

    monkeypatch.setattr(norms, "take", stale)
    caught = red(model)
    assert not caught.proof.passed
    assert caught.site != "LlamaForCausalLM"


def test_tail_returns_another_sum(rewrite_with: Callable) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    last = model.model.layers[-1]

    def tail(layer, a, b):  # type: ignore[no-untyped-def]
        total = layer_calls.tail(layer, a, b)
        return a if layer.input_layernorm.weight is last.input_layernorm.weight else total

    rewrite_with(model, "tail", tail)
    assert not red(model).proof.flow.passed


def test_tail_hands_over_to_the_wrong_norm() -> None:
    """What was normed with another layer's weights is refused by the norm, so all values are right; the count says
    that the pairs did not fire."""
    model = build("llama", torch.bfloat16)
    apply(model)
    layers = model.model.layers
    links = [layer.__dict__[STATE]["next"] for layer in layers]
    links[0].norm, links[1].norm = links[1].norm, links[0].norm
    caught = red(model)
    assert caught.proof.flow.passed
    assert not caught.proof.fired.passed
    assert caught.proof.fired.pairs_fused == caught.proof.fired.pairs_expected - 2


def test_nothing_fused_ran() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    for module in model.modules():
        if is_patched(type(module)):
            module.__class__ = original_class(type(module))
    caught = red(model, greedy_tokens=4)
    assert caught.proof.fired.fused == 0
    assert caught.proof.logits.bit_identical
    assert caught.proof.greedy.equal
    assert "nothing fused ran" in caught.proof.explain()


def test_every_call_fell_back(monkeypatch: pytest.MonkeyPatch, kernel: Callable) -> None:
    kernel(as_kernel(honest))
    model = build("llama", torch.bfloat16)
    apply_as_kernel(model)
    monkeypatch.setattr("rmsnorm_patch.rewrite.guards.servable", lambda x, weight: False)
    monkeypatch.setattr(layer_calls, "_servable", lambda x, weight: False)
    caught = red(model)
    assert caught.proof.fired.fused == 0
    assert all(site.passed for site in caught.proof.sites)
    assert len(caught.proof.fired.fallbacks) >= 7


def test_one_unpatched_norm_is_missed() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    norm = model.model.norm
    norm.__class__ = original_class(type(norm))
    caught = red(model)
    assert caught.site == "model.norm"
    assert any(text.startswith("model.norm: 0 calls, 1 expected") for text in caught.proof.fired.missing)


def test_a_call_that_fell_back_for_a_reason_is_listed(kernel: Callable) -> None:
    """A hooked norm is called as a module: no fault, but said; `strict` makes it one."""
    kernel(as_kernel(honest))
    model = build("llama", torch.bfloat16)
    apply_as_kernel(model)
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda module, args, output: None)
    proof = verify(model, prompts())
    assert any("model.layers.1.post_attention_layernorm" in text and "hook" in text for text in proof.fired.fallbacks)
    assert proof.fired.pairs_fused == proof.fired.pairs_expected - 1
    assert not red(model, strict=True).proof.fired.passed


def test_a_fused_site_that_the_plan_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    report = apply(model)
    sites = tuple(replace(s, action="leave") if s.path == "model.norm" else s for s in report.plan.norms)
    state = model.__dict__[STATE]
    monkeypatch.setitem(state, "applied", replace(report, plan=replace(report.plan, norms=sites)))
    assert any("model.norm" in text for text in red(model).proof.fired.missing)
