"""Real model types, patched with the reference backend: every pair fires, and every bit stays."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.patch_state import is_patched
from rmsnorm_patch.rewrite import observe

LAYERS = 3
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
    "first_k_dense_replace": 1,
}
# type: (config fields, norm attribute of the in-layer pair, entry norm attribute of the next layer, norm_add a layer)
PRE_NORM = ("post_attention_layernorm", "input_layernorm", 0)
SANDWICH = ("pre_feedforward_layernorm", "input_layernorm", 2)
TYPES = {
    "llama": ({}, *PRE_NORM),
    "mistral": ({}, *PRE_NORM),
    "qwen2": ({}, *PRE_NORM),
    "qwen3": ({}, *PRE_NORM),
    "mixtral": (MOE, *PRE_NORM),
    "qwen3_moe": (ROUTED, *PRE_NORM),
    "gemma2": ({}, *SANDWICH),
    "gemma3_text": ({}, *SANDWICH),
    "phi3": ({"head_dim": None}, *PRE_NORM),
    "granite": ({"residual_multiplier": 0.22, "head_dim": None}, *PRE_NORM),
    "glm4": ({}, "post_attention_layernorm", "input_layernorm", 2),
    "gpt_oss": (MOE, *PRE_NORM),
    "deepseek_v3": (DEEPSEEK, *PRE_NORM),
    "smollm3": ({}, *PRE_NORM),
}


def run(model: PreTrainedModel, tokens: torch.Tensor, **options: object) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True, **options)
    return [found.logits, *found.hidden_states]


def identical(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def greedy(model: PreTrainedModel, tokens: torch.Tensor, cache: str) -> torch.Tensor:
    return model.generate(
        tokens, max_new_tokens=6, do_sample=False, cache_implementation=cache, disable_compile=True, eos_token_id=-1
    )


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", TYPES)
def test_every_layer_has_its_pairs(small_model, model_type: str) -> None:
    fields, in_layer, entry, norm_add = TYPES[model_type]
    plan = rmsnorm_patch.plan(small_model(model_type, num_hidden_layers=LAYERS, **fields), backend="reference")
    fused = {kind: [(p.layer, p.norm) for p in plan.fused_pairs(kind)] for kind in ("in_layer", "cross_layer", "final")}
    layers = [f"model.layers.{i}" for i in range(LAYERS)]
    assert fused["in_layer"] == [(layer, f"{layer}.{in_layer}") for layer in layers]
    assert fused["cross_layer"] == [(a, f"{b}.{entry}") for a, b in pairwise(layers)]
    assert fused["final"] == [(layers[-1], "model.norm")]
    assert plan.counts().get("norm_add/fuse", 0) == norm_add * LAYERS
    assert plan.counts().get("norm_add/leave", 0) == 0
    assert all(pair.source.startswith("modeling_") for pair in plan.pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_bit_identical_with_every_cache(small_model, tokens, model_type: str, dtype: torch.dtype) -> None:
    model = small_model(model_type, dtype, num_hidden_layers=LAYERS, **TYPES[model_type][0])
    before = run(model, tokens)
    texts = {cache: greedy(model, tokens, cache) for cache in ("dynamic", "static")}
    plan = rmsnorm_patch.apply(model, backend="reference").plan
    ran: Counter[str] = Counter()
    with observe.observing(lambda event: ran.update([event.kind])):
        after = run(model, tokens)
    assert identical(before, after)
    pairs = 2 * LAYERS
    assert (ran["in_layer"], ran["cross_layer"], ran["taken"]) == (LAYERS, LAYERS, LAYERS)
    shared = 2 * len(list(plan.fused_query_key()))
    assert ran["together"] == shared
    assert ran["norm_add"] == len(list(plan.fused_pairs("norm_add")))
    assert ran["norm"] == len(list(plan.fused_norms())) - pairs - ran["norm_add"] - shared
    for cache, text in texts.items():
        assert torch.equal(greedy(model, tokens, cache), text), cache
    rmsnorm_patch.revert(model)
    assert identical(before, run(model, tokens))


def test_llama_is_one_norm_and_two_fused_calls_a_layer(small_model, tokens) -> None:
    model = small_model("llama", num_hidden_layers=5)
    rmsnorm_patch.apply(model, backend="reference")
    ran: Counter[str] = Counter()
    with observe.observing(lambda event: ran.update([event.kind])):
        run(model, tokens)
    assert ran == {"norm": 1, "in_layer": 5, "cross_layer": 5, "taken": 5}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        # norms stand behind the sub-layers: no norm reads a sum but the final one
        (
            "olmo2",
            {
                "final/fuse": 1,
                "norm_add/fuse": 2 * LAYERS,
                "norm/fuse": 4 * LAYERS + 1,
                "query_key/leave": LAYERS,  # q and k of different widths
            },
        ),
        ("cohere2", None),  # LayerNorm
        ("starcoder2", None),  # LayerNorm
    ],
)
def test_other_layouts_are_handled_as_they_are(small_model, tokens, model_type: str, expected: dict | None) -> None:
    model = small_model(model_type, num_hidden_layers=LAYERS)
    if expected is None:
        with pytest.raises(rmsnorm_patch.UnsupportedModel, match="RMSNorm"):
            rmsnorm_patch.apply(model, backend="reference")
        assert not any(is_patched(type(module)) for module in model.modules())
        return
    before = run(model, tokens)
    assert rmsnorm_patch.apply(model, backend="reference").counts() == expected
    assert identical(before, run(model, tokens))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hand_over_works_in_both_modes_without_grad(small_model, tokens, mode) -> None:
    model = small_model("llama", num_hidden_layers=LAYERS)
    rmsnorm_patch.apply(model, backend="reference")
    ran: Counter[str] = Counter()
    with mode(), observe.observing(lambda event: ran.update([event.kind])):
        model(tokens)
    assert ran["taken"] == LAYERS


def test_cosine_of_every_layer_is_one(small_model, tokens) -> None:
    """The last hidden state of a patched model equals the unpatched one's at every depth."""
    model = small_model("llama", torch.bfloat16, num_hidden_layers=8)
    before = run(model, tokens)[1:]
    rmsnorm_patch.apply(model, backend="reference")
    for left, right in zip(before, run(model, tokens)[1:], strict=True):
        cosine = torch.nn.functional.cosine_similarity(left.flatten().double(), right.flatten().double(), dim=0)
        assert cosine >= 1 - 1e-12


def test_gradients_are_the_unpatched_models(small_model, tokens) -> None:
    model = small_model("llama", num_hidden_layers=LAYERS).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    rmsnorm_patch.apply(model, backend="reference")
    assert identical(plain, gradients())
    model.gradient_checkpointing_enable()
    assert identical(plain, gradients())


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_compiles_and_exports_without_a_break(small_model, tokens, model_type: str) -> None:
    model = small_model(model_type)
    before = run(model, tokens)[0]
    rmsnorm_patch.apply(model, backend="reference")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(tokens, use_cache=False).logits, before)
        exported = torch.export.export(model, (tokens,), {"use_cache": False}).module()
        assert torch.equal(exported(tokens, use_cache=False).logits, before)
    torch._dynamo.reset()
