"""The norms of queries and keys: in which forwards they are found, and that rewritten ones compute the same bits."""

from __future__ import annotations

import copy
import inspect
import linecache
import pickle
import traceback
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn as nn
from query_and_key import TOKENS, outputs, reasons, same
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.pairs.layout import layout
from rmsnorm_patch.rewrite import observe, query_key

FORMS = {
    "qwen3": {},  # the norm around the viewed product
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3_text": {},  # a statement of its own, after the transpose
    "exaone4": {},
    "glm4_moe": {"use_qk_norm": True, "n_routed_experts": 8},  # in a branch
    "hunyuan_v1_dense": {},  # after the rotation
    "nanochat": {},  # the same, and the rotation's arguments are optional
    "olmo2": {"num_key_value_heads": 4},  # over the whole width
    "afmoe": {},  # a statement of its own, transposed in it
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"]},  # viewed with unpacked sizes
}
"""Types by the form in which their attention norms queries and keys."""


def ran(model: PreTrainedModel) -> Counter[str]:
    found: Counter[str] = Counter()
    with torch.no_grad(), observe.observing(lambda event: found.update([event.kind])):
        model(TOKENS)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", FORMS)
def test_bits_stay_in_each_form(small_model, kind: str, dtype: torch.dtype) -> None:
    model = small_model(kind, dtype, num_hidden_layers=3, **FORMS[kind])
    classes = [type(module) for module in model.modules()]
    before = outputs(model)
    report = rmsnorm_patch.apply(model, backend="reference")
    sites = list(report.plan.fused_query_key())
    assert sites
    assert report.counts()["query_key/fuse"] == len(sites)
    assert {site.layer for site in sites} == set(report.attentions)
    assert ran(model)["together"] == 2 * len(sites)
    assert same(before, outputs(model))
    assert rmsnorm_patch.status(model).why_single() == {}
    rmsnorm_patch.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert same(before, outputs(model))


def test_plan_and_report_name_the_line(qwen3) -> None:
    plan = rmsnorm_patch.plan(qwen3)
    (first, _) = plan.query_key
    assert (first.query, first.key) == ("model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm")
    lines, begin = inspect.getsourcelines(type(qwen3.model.layers[0].self_attn).forward)
    number = int(first.source.rpartition(":")[2])
    assert "self.q_norm(" in lines[number - begin]
    page = " ".join(str(plan).split())
    assert "2 of 2 attentions norm q and k in one launch (2 with their rotation)" in page
    assert f"q and k norms in one launch, with their rotation: {first.source}" in page
    assert plan.to_dict()["query_key"][0]["layer"] == "model.layers.0.self_attn"


def test_a_proof_counts_them_and_turns_red_where_they_are_crossed(qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    rmsnorm_patch.apply(qwen3)
    fired = rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=2).fired
    assert (fired.together, fired.together_expected, fired.fallbacks) == (4, 4, ())
    own = query_key._query_key
    monkeypatch.setattr(query_key, "known", lambda function: None)  # the rotation by itself
    for wrong in (
        lambda q_norm, k_norm, q, k: tuple(x * 1.5 for x in own(q_norm, k_norm, q, k)),
        lambda q_norm, k_norm, q, k: (own(q_norm, k_norm, q, k)[0], k_norm(k)),
    ):
        monkeypatch.setattr(query_key, "_query_key", wrong)
        with pytest.raises(rmsnorm_patch.VerificationFailed):
            rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=2)


def test_a_hooked_norm_is_called_where_the_model_calls_it(qwen3) -> None:
    attention = qwen3.model.layers[0].self_attn
    order: list[str] = []
    for name in ("q_proj", "q_norm", "k_proj", "k_norm"):
        getattr(attention, name).register_forward_hook(lambda *_, name=name: order.append(name))
    before, called = outputs(qwen3), list(order)
    rmsnorm_patch.apply(qwen3)
    order.clear()
    assert same(before, outputs(qwen3))
    assert order == called
    status = rmsnorm_patch.status(qwen3)
    assert list(status.why_single()) == ["a norm has hooks or a forward of its own"]
    assert "norms of queries and keys that did not share a launch" in str(status)
    fired = rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=0).fired
    assert (fired.together, fired.together_expected) == (2, 4)
    assert any("a norm has hooks" in text for text in fired.fallbacks)
    with pytest.raises(rmsnorm_patch.VerificationFailed):
        rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=0, strict=True)


def test_gradients_keep_the_models_own_order(qwen3) -> None:
    def gradients() -> list[torch.Tensor]:
        qwen3.zero_grad()
        qwen3(TOKENS).logits.float().pow(2).mean().backward()
        return [p.grad.clone() for p in qwen3.parameters()]

    before = gradients()
    rmsnorm_patch.apply(qwen3)
    assert same(before, gradients())
    assert set(rmsnorm_patch.status(qwen3).why_single()) == {"a gradient may be wanted"}


def test_a_compiled_graph_is_the_models_own(qwen3) -> None:
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append([f"{node.op} {node.target}" for node in graph.graph.nodes])
        return graph

    def compile_and_run() -> list[str]:
        graphs.clear()
        torch.compiler.reset()
        attention = qwen3.model.layers[0].self_attn
        cos = torch.ones(2, 9, attention.head_dim)
        with torch.no_grad():
            torch.compile(attention, backend=keep, fullgraph=True)(torch.ones(2, 9, 64), (cos, cos), None)
        return graphs[0]

    before = compile_and_run()
    rmsnorm_patch.apply(qwen3)
    assert compile_and_run() == before


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_models_of_their_own(qwen3, way) -> None:
    before = outputs(qwen3)
    rmsnorm_patch.apply(qwen3)
    made = way(qwen3)
    rmsnorm_patch.revert(qwen3)
    assert ran(made)["together"] == 4
    assert ran(qwen3) == {}
    assert same(before, outputs(made))


def test_a_bound_forward_held_beyond_revert_runs_the_models_own(qwen3) -> None:
    rmsnorm_patch.apply(qwen3)
    attention = qwen3.model.layers[0].self_attn
    held = attention.forward
    rmsnorm_patch.revert(qwen3)
    cos = torch.ones(1, 9, attention.head_dim)
    found: list[observe.Event] = []
    with torch.no_grad(), observe.observing(found.append):
        (result, _) = held(torch.ones(1, 9, 64), (cos, cos), None)
        assert torch.equal(result, attention(torch.ones(1, 9, 64), (cos, cos), None)[0])
    assert found == []


def test_a_traceback_shows_the_models_own_lines(qwen3) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    attention = qwen3.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(fail)
    seen = []
    for patch in (False, True):
        if patch:
            rmsnorm_patch.apply(qwen3)
        with torch.no_grad(), pytest.raises(RuntimeError, match="stop") as caught:
            qwen3(TOKENS)
        frames = traceback.extract_tb(caught.value.__traceback__)
        seen.append([(frame.filename, frame.lineno) for frame in frames if frame.name == "forward"])
    file, line = next(at for at in seen[0] if "self.k_norm(" in linecache.getline(*at))
    assert (file, line) in seen[1]


def test_what_one_launch_does_not_take_is_said(small_model) -> None:
    model = small_model("olmo2", num_hidden_layers=1)
    assert reasons(model) == {"rows of 64 and of 32: one launch takes rows of one length"}
    with torch.device("meta"):
        wide = small_model("olmo2", num_hidden_layers=1, num_key_value_heads=16, num_attention_heads=16, head_dim=256)
    (reason,) = reasons(wide)
    assert reason.startswith("rows of 4096: needs N <= 512")
    model = small_model("qwen3", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.k_norm.variance_epsilon = 1e-3
    assert reasons(model) == {"the two norms compute differently: their numerics or eps are not the same"}
    attention.k_norm = nn.LayerNorm(16)
    assert reasons(model) == {"the norm k_norm is left alone: it has a bias (bias)"}
    read = layout(model, rmsnorm_patch.plan(small_model("qwen3", num_hidden_layers=1)).norms)
    assert {site.reason for site in read.query_key((), "triton")} == {"backend triton has no kernel for two norms"}
    (site,) = rmsnorm_patch.plan(small_model("qwen3", num_hidden_layers=1), exclude=["*.k_norm"]).query_key
    assert site.reason.startswith("the norm k_norm is left alone: ")


def test_an_eps_changed_after_apply_is_read(qwen3) -> None:
    rmsnorm_patch.apply(qwen3)
    for layer in qwen3.model.layers:
        layer.self_attn.k_norm.variance_epsilon = 1e-2
    patched = outputs(qwen3)
    rmsnorm_patch.revert(qwen3)
    assert same(patched, outputs(qwen3))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "exaone4", "hunyuan_v1_dense"])
def test_a_dtype_that_no_kernel_takes(small_model, kind: str, backend) -> None:
    """The plan says so; the model is patched with its own arithmetic."""
    model = small_model(kind, torch.float64, num_hidden_layers=3, **FORMS[kind])
    before = outputs(model)
    sites = rmsnorm_patch.apply(model, backend=backend).plan.query_key
    assert sites
    assert {site.action for site in sites} == {"leave"}
    assert {site.reason for site in sites} == {"weights of float64: no kernel takes that"}
    assert same(before, outputs(model))
