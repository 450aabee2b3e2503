"""The comparison of an engine's logprobs with those of transformers, on a shipped checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def compare_logprobs(script):
    return script("compare_logprobs")


def test_what_transformers_would_have_decoded_is_equal_and_nothing_else(compare_logprobs, repository):
    folder = repository / "integration_tests" / "data" / "tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    decoded = {"tokens": [], "logprobs": []}
    for prompt in compare_logprobs.PROMPTS:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
        at = range(len(prompt), len(tokens))
        decoded["tokens"].append(tokens[len(prompt) :])
        decoded["logprobs"].append([float(logits[i - 1, tokens[i]]) for i in at])
    same = compare_logprobs.compare(model, decoded)
    assert same == {"tokens": 12, "greedy_equal": 12, "logprobs_equal": 12, "largest_difference": 0.0}
    decoded["logprobs"][1][2] += 0.25
    decoded["tokens"][0][5] ^= 1
    other = compare_logprobs.compare(model, decoded)
    assert (other["greedy_equal"], other["logprobs_equal"]) == (11, 10)
    assert other["largest_difference"] >= 0.25
    table = compare_logprobs.table([{"model": "tiny", "numerics": "engine", **same, "norms": []}])
    assert table.splitlines()[-1] == "| tiny | engine | 12 | 100.0% | 100.0% | 0.000 |"
