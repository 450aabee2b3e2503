"""The models of the vLLM benchmark: their config.json, and what their engines are started with."""

from __future__ import annotations

from typing import Any

from .quantised import CONFIGS

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SMALL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
TINY = {**LLAMA_8B, "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "rms_norm_eps": 1e-6,
}
QWEN3_MOE = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048},
    **{"intermediate_size": 6144, "num_hidden_layers": 12, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    **{"decoder_sparse_step": 1, "mlp_only_layers": []},
}
"""A quarter of the layers of Qwen3-30B-A3B."""
GEMMA3_4B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
GLM4_9B = {
    **LLAMA_8B,
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "pad_token_id": 0,
}
OLMO2_1B = {
    **LLAMA_8B,
    **SMALL,
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "vocab_size": 100352,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-8b": (LLAMA_8B, {}),
    "llama-1b": ({**LLAMA_8B, **SMALL}, {}),
    "qwen3-8b": ({**LLAMA_8B, **QWEN3}, {}),
    "gemma3-4b": (GEMMA3_4B, {}),
    "glm4-9b": (GLM4_9B, {}),
    "olmo2-1b": (OLMO2_1B, {}),
    "llama-8b-fp8": (LLAMA_8B, {"quantization": "fp8"}),
    "qwen3-moe-fp8": ({**LLAMA_8B, **QWEN3_MOE}, {"quantization": "fp8"}),
    "llama-8b-tp2": (LLAMA_8B, {"tensor_parallel_size": 2}),
    "tiny": (TINY, {}),
    "tiny-gemma3": ({**GEMMA3_4B, **{key: value for key, value in TINY.items() if value != LLAMA_8B[key]}}, {}),
    "tiny-fp8": (TINY, {"quantization": "fp8"}),
}
"""Shape -> config.json and further arguments of the engine. "fp8" quantises at load, a scale a row; the schemes of
`quantised.CONFIGS` stand in config.json, as in a checkpoint that is quantised."""
for _name, _config in (("llama-8b", LLAMA_8B), ("tiny", TINY)):
    for _scheme, _quantisation in CONFIGS.items():
        SHAPES[f"{_name}-{_scheme}"] = ({**_config, "quantization_config": _quantisation}, {})
_FLASHINFER, _DEEPGEMM = "FlashInferFp8DeepGEMMDynamicBlockScaledKernel", "DeepGemmFp8BlockScaledMMKernel"
ENVIRONMENT: dict[str, dict[str, str]] = {}
"""Shape -> variables of its process: which of vLLM's products of blocks are not to be taken, and whether a request has
the same bits in every batch."""
for _name in ("llama-8b-block", "tiny-block"):
    for _product, _others in (("deepgemm", (_FLASHINFER,)), ("cutlass", (_FLASHINFER, _DEEPGEMM))):
        SHAPES[f"{_name}-{_product}"] = SHAPES[_name]
        ENVIRONMENT[f"{_name}-{_product}"] = {"VLLM_DISABLED_KERNELS": ",".join(_others)}
for _name in ("llama-8b", "tiny"):
    SHAPES[f"{_name}-invariant"] = SHAPES[_name]
    ENVIRONMENT[f"{_name}-invariant"] = {"VLLM_BATCH_INVARIANT": "1"}
