"""A small configuration of any causal-LM type that transformers knows.

The type's own default configuration is taken and its sizes are cut down, so that every structural default (which norms,
which layer kinds, how many experts a token) is the type's own.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

VOCABULARY = 128
LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "n_words": VOCABULARY,
    "emb_dim": 64,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
}


DROP = object()
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_HEAD = {"head_dim": 16}
_SHARED = {"num_kv_shared_layers": 0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": {"first_k_dense_replace": 1},
    "bailing_hybrid": {**_LINEAR, "n_group": 1, "topk_group": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8, "n_inner": 96},
    "deepseek_v2": {"topk_group": DROP, "n_group": DROP, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "flint": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gemma3n_text": {**_SHARED, "intermediate_size": 96, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "num_layers": 3},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_LINEAR, "num_experts": 4, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8, "moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": _HEAD,
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": {"text_config": _LINEAR},
    "qwen4_exp_text": _LINEAR,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""What one type needs beside SIZES, or not (DROP)."""


def small_config(model_type: str) -> PretrainedConfig:
    """The type's default configuration, cut down. Raises what transformers raises where it cannot be built."""
    fields = _cut(AutoConfig.for_model(model_type).to_dict())
    fields.pop("model_type", None)
    for name, value in EXCEPTIONS.get(model_type, {}).items():
        fields[name] = {**fields[name], **value} if name.endswith("_config") else value
    return AutoConfig.for_model(model_type, **{k: v for k, v in fields.items() if v is not DROP})


def _cut(default: dict[str, Any]) -> dict[str, Any]:
    """The fields of SIZES that `default` has, in its sub-configurations too."""
    cut: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict) and name.endswith("_config") and value:
            cut[name] = _cut(value)
        elif name in SIZES and not isinstance(value, (list, dict)) and (value is not None or name.endswith("token_id")):
            cut[name] = SIZES[name]
    if "model_type" in default:
        cut["model_type"] = default["model_type"]
    if default.get("kv_lora_rank"):  # latent attention: a key and value head for every query head
        cut["num_key_value_heads"] = cut.get("num_attention_heads", 4)
        cut.pop("head_dim", None)
    if "encoder_layers" in default:
        cut.pop("num_hidden_layers", None)
    return cut
