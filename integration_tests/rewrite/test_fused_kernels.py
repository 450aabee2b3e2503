"""The fused call itself, with a real kernel: Triton's, in its CPU interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.rewrite import observe
from rmsnorm_patch.rewrite.traced import keeps_op

pytest.importorskip("triton")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.arange(1, 6)[None]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_triton_pairs_fire_and_agree(model_type: str, small_model: Callable[..., PreTrainedModel]) -> None:
    model = small_model(model_type, torch.bfloat16, **SIZES)
    before = model(TOKENS).logits
    rmsnorm_patch.apply(model, backend="triton")
    events: list[observe.Event] = []
    with observe.observing(events.append):
        after = model(TOKENS).logits
    sandwich = {"norm_add/triton": 4} if model_type == "gemma2" else {}
    assert Counter(f"{event.kind}/{event.backend}" for event in events) == {
        **sandwich,
        "norm/triton": 1,
        "in_layer/triton": 2,
        "cross_layer/triton": 2,
        "taken/triton": 2,
    }
    for event in events:
        if event.kind == "taken":
            continue
        behind = event.kind == "norm_add"  # its operands are what is normed, and what that is added to
        total = event.operands[0] if behind else sum(event.operands[1:], event.operands[0])
        expected = type(event.norm).__mro__[1].forward(event.norm, total)
        assert (event.normed.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max() <= 1
        added = event.normed + event.operands[1] if behind else total
        assert event.total is None or torch.equal(event.total, added), "not the model's own add"
    assert torch.equal(before.argmax(-1), after.argmax(-1))


@torch.no_grad()
def test_compiled_graphs_hold_the_fused_op(
    small_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ops.COMPILE_VARIABLE, "op")
    model = small_model("llama", torch.bfloat16, **SIZES)
    rmsnorm_patch.apply(model, backend="triton")
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    eager = model(TOKENS, use_cache=False).logits
    compiled = torch.compile(model, backend=record, fullgraph=True)(TOKENS, use_cache=False).logits
    # entry norms and the final norm stand alone in a graph; each layer's second norm is fused with its add
    expected = 2 * ["rmsnorm_patch.fused_add_rms_norm.default"] + 3 * ["rmsnorm_patch.rms_norm.default"]
    assert sorted(target for target in targets if "rmsnorm_patch" in target) == expected
    assert torch.equal(eager, compiled)


def test_a_graph_has_our_ops_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for form in ("", "decomposed", "op"):
        monkeypatch.setenv(ops.COMPILE_VARIABLE, form)
        found[form] = keeps_op("cuda")
    monkeypatch.delenv(ops.COMPILE_VARIABLE)
    assert (found, keeps_op("cuda")) == ({"": False, "decomposed": False, "op": True}, False)
