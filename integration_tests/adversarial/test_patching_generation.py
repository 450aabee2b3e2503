"""Greedy, sampled, beam and assisted generation, dynamic and static caches: the same tokens."""

from __future__ import annotations

import pytest
import torch

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 4},
    "beam sampled": {"num_beams": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def _generate(model, ids, **options):
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, **{"do_sample": False, **options},
    )  # fmt: skip
    return out.sequences, torch.stack(out.scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_same_tokens_and_scores(small_model, ids, model_type, way, dtype):
    model = small_model(model_type, dtype)
    if "lookup" in way:
        ids = ids[:1]
    sequences, scores = _generate(model, ids, **WAYS[way])
    rmsnorm_patch.apply(model)
    events = []
    with observe.observing(events.append):
        ours, our_scores = _generate(model, ids, **WAYS[way])
    assert torch.equal(ours, sequences)
    assert torch.equal(our_scores, scores)
    assert sum(event.kind == "taken" for event in events) >= 2 * 4


def test_assisted_generation_with_both_models_patched(small_model, ids):
    model, assistant = small_model("llama"), small_model("llama", seed=0, num_hidden_layers=1)
    ids = ids[:1]
    expected = _generate(model, ids, assistant_model=assistant)
    rmsnorm_patch.apply(model)
    rmsnorm_patch.apply(assistant)
    got = _generate(model, ids, assistant_model=assistant)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_left_padding_and_a_continued_cache(small_model, ids):
    model = small_model("llama")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def two_turns():
        with torch.no_grad():
            first = model(ids, attention_mask=mask, use_cache=True)
            return first.logits, model(ids[:, :2], past_key_values=first.past_key_values).logits

    expected = two_turns()
    rmsnorm_patch.apply(model)
    got = two_turns()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
