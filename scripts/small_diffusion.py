"""Small diffusion transformers and embedding models with random weights, and what to run them on.

Every structural default is the class's own; only sizes are cut down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

WIDTH, HEADS, HEAD_DIM, TEXT = 32, 4, 8, 9


@dataclass(frozen=True)
class Small:
    """A model and one call of it. call: (model) -> tensors that a user reads."""

    model: nn.Module
    call: Callable[[nn.Module], list[torch.Tensor]]


def _noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _built(cls: Any, dtype: torch.dtype, **fields: Any) -> nn.Module:
    """Random weights of a fixed seed, those of norms away from 1, eval mode."""
    torch.manual_seed(0)
    model = cls(**fields).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def _denoiser(cls_name: str, fields: dict[str, Any], inputs: dict[str, Any]) -> Callable[[torch.dtype], Small]:
    def build(dtype: torch.dtype) -> Small:
        import diffusers

        model = _built(getattr(diffusers, cls_name), dtype, **fields)
        given = {
            name: _noise(*value, dtype=dtype) if isinstance(value, tuple) else value for name, value in inputs.items()
        }
        return Small(model, lambda m: [m(**given, return_dict=False)[0]])

    return build


_TIME = torch.tensor([3])
_MASK = torch.ones(1, TEXT, dtype=torch.bool)
_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}

DENOISERS: dict[str, Callable[[torch.dtype], Small]] = {
    "Flux": _denoiser(
        "FluxTransformer2DModel",
        {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": WIDTH,
         "pooled_projection_dim": WIDTH, "axes_dims_rope": (2, 2, 4), **_HEADS},
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, TEXT, WIDTH), "pooled_projections": (1, WIDTH),
         "timestep": _TIME / 1000, "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(TEXT, 3)},
    ),
    "Stable Diffusion 3.5": _denoiser(
        "SD3Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": WIDTH,
         "caption_projection_dim": WIDTH, "pooled_projection_dim": WIDTH, "pos_embed_max_size": 8,
         "qk_norm": "rms_norm", **_HEADS},
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, TEXT, WIDTH), "pooled_projections": (1, WIDTH),
         "timestep": _TIME},
    ),
    "LTX-Video": _denoiser(
        "LTXVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, "num_layers": 2, "caption_channels": WIDTH,
         **_HEADS},
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, TEXT, WIDTH), "encoder_attention_mask": _MASK,
         "timestep": _TIME, "num_frames": 1, "height": 4, "width": 4},
    ),
    "Wan": _denoiser(
        "WanTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2,
         "rope_max_seq_len": 32, "num_attention_heads": HEADS, "attention_head_dim": 12},
        {"hidden_states": (1, 4, 2, 8, 8), "timestep": _TIME, "encoder_hidden_states": (1, TEXT, WIDTH)},
    ),
    "Lumina 2": _denoiser(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 2, 2),
         "axes_lens": (32, 32, 32), "cap_feat_dim": WIDTH},
        {"hidden_states": (1, 4, 8, 8), "timestep": _TIME, "encoder_hidden_states": (1, TEXT, WIDTH),
         "encoder_attention_mask": _MASK},
    ),
    "HunyuanVideo": _denoiser(
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1,
         "text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "rope_axes_dim": (2, 2, 4), **_HEADS},
        {"hidden_states": (1, 4, 2, 8, 8), "timestep": _TIME, "encoder_hidden_states": (1, TEXT, WIDTH),
         "encoder_attention_mask": _MASK, "pooled_projections": (1, WIDTH), "guidance": torch.tensor([1000.0])},
    ),
}  # fmt: skip
"""Name -> builder of a diffusers transformer."""

_TEXT_SIZES = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip


def _embedder(model_type: str, pooling: str, **fields: Any) -> Callable[[torch.dtype], Small]:
    """A text encoder of sentence-transformers: transformer, pooling, length 1; on two sentences of token ids."""

    def build(dtype: torch.dtype) -> Small:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Normalize, Pooling
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(model_type, **{**_TEXT_SIZES, **fields})
        encoder = _built(AutoModel.from_config, dtype, config=config)
        modules = [_Encoder(encoder), Pooling(config.hidden_size, pooling_mode=pooling), Normalize()]
        ids = torch.arange(3, 17).repeat(2, 1) * 7 % 250
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        model = SentenceTransformer(modules=modules, device="cpu").eval()
        return Small(model, lambda m: [m(dict(given))["sentence_embedding"]])

    return build


class _Encoder(nn.Module):
    """The first module of a SentenceTransformer, over a model that is made and not loaded from a folder."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        given = {name: features[name] for name in ("input_ids", "attention_mask")}
        features["token_embeddings"] = self.auto_model(**given).last_hidden_state
        return features


EMBEDDERS: dict[str, Callable[[torch.dtype], Small]] = {
    "Qwen3-Embedding": _embedder("qwen3", "lasttoken"),
    "EmbeddingGemma": _embedder("gemma3_text", "mean", use_bidirectional_attention=True),
    "E5-Mistral": _embedder("mistral", "lasttoken"),
}
"""Name -> builder of a SentenceTransformer whose encoder has RMSNorm."""
