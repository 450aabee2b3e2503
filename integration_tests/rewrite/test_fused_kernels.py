"""The fused call itself, with a real kernel: Triton's, in its CPU interpreter (a process of its own: Triton reads the
switch when it is imported)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import collections, json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

fields = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, head_dim=16, pad_token_id=0)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sys.argv[1], **fields), dtype=torch.bfloat16).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    tokens = torch.arange(1, 6)[None]
    before = model(tokens).logits
    rmsnorm_patch.apply(model, backend="triton")
    events = []
    with observe.observing(events.append):
        after = model(tokens).logits
worst, sums = 0.0, True
for event in events:
    if event.kind != "taken":
        behind = event.kind == "norm_add"  # its operands are what is normed, and what that is added to
        total = event.operands[0] if behind else sum(event.operands[1:], event.operands[0])
        expected = type(event.norm).__mro__[1].forward(event.norm, total)
        ulps = (event.normed.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max().item()
        worst = max(worst, ulps)
        added = event.normed + event.operands[1] if behind else total
        sums = sums and (event.total is None or torch.equal(event.total, added))
ran = collections.Counter(f"{event.kind}/{event.backend}" for event in events)
print(json.dumps({"ran": ran, "ulps": worst, "sums": sums, "agree": torch.equal(before.argmax(-1), after.argmax(-1))}))
"""


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_triton_pairs_fire_and_agree(model_type: str, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model_type],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    sandwich = {"norm_add/triton": 4} if model_type == "gemma2" else {}
    assert found["ran"] == {
        **sandwich,
        "norm/triton": 1,
        "in_layer/triton": 2,
        "cross_layer/triton": 2,
        "taken/triton": 2,
    }
    assert found["sums"], "a residual sum differs from the model's own add"
    assert found["ulps"] <= 1
    assert found["agree"]


COMPILED = """
import json
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import rmsnorm_patch

fields = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, head_dim=16, pad_token_id=0)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=torch.bfloat16).eval()
rmsnorm_patch.apply(model, backend="triton")
targets = []

def record(graph, inputs):
    targets.extend(str(node.target) for node in graph.graph.nodes)
    return graph.forward

tokens = torch.arange(1, 6)[None]
with torch.no_grad():
    eager = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, backend=record, fullgraph=True)(tokens, use_cache=False).logits
ops = [target for target in targets if "rmsnorm_patch" in target]
print(json.dumps({"same": torch.equal(eager, compiled), "ops": sorted(ops)}))
"""


def test_compiled_graphs_hold_the_fused_op(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1", "RMSNORM_PATCH_COMPILE": "op"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # entry norms and the final norm stand alone in a graph; each layer's second norm is fused with its add
    expected = 2 * ["rmsnorm_patch.fused_add_rms_norm.default"] + 3 * ["rmsnorm_patch.rms_norm.default"]
    assert found == {"same": True, "ops": expected}


def test_a_graph_has_our_ops_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_patch import ops
    from rmsnorm_patch.rewrite.traced import keeps_op

    found = {}
    for form in ("", "decomposed", "op"):
        monkeypatch.setenv(ops.COMPILE_VARIABLE, form)
        found[form] = keeps_op("cuda")
    monkeypatch.delenv(ops.COMPILE_VARIABLE)
    assert (found, keeps_op("cuda")) == ({"": False, "decomposed": False, "op": True}, False)
