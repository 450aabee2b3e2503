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
from rmsnorm_patch import observe, reference

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
        total = sum(event.operands[1:], event.operands[0])
        expected = type(event.norm).__mro__[1].forward(event.norm, total)
        ulps = (event.normed.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max().item()
        worst = max(worst, ulps)
        sums = sums and (event.total is None or torch.equal(event.total, total))
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
    sandwich = 4 if model_type == "gemma2" else 0
    assert found["ran"] == {
        "norm/triton": 1 + sandwich,
        "in_layer/triton": 2,
        "cross_layer/triton": 2,
        "taken/triton": 2,
    }
    assert found["sums"], "a residual sum differs from the model's own add"
    assert found["ulps"] <= 1
    assert found["agree"]
