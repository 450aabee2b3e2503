"""Small real models whose norm weights are far from 1 and from each other, and kernels to put under their patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn as nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, Qwen3Config

from rmsnorm_patch import plan, rewrite
from rmsnorm_patch.numerics.reference import scale
from rmsnorm_patch.numerics.spec import NormSpec

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda changes: LlamaConfig(**{**SIZES, **changes}),
    "qwen3": lambda changes: Qwen3Config(**{**SIZES, **changes}),
    "gemma2": lambda changes: Gemma2Config(**{**SIZES, **changes}),
    "mixtral": lambda changes: MixtralConfig(**{**SIZES, "num_local_experts": 4, **changes}),
}

Kernel = Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


def build(kind: str, dtype: torch.dtype, seed: int = 0, **changes: int) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](changes)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = (0.5 + torch.rand(parameter.shape, generator=generator)).to(dtype)
    return model


def prompts(batch: int = 2, length: int = 24, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def apply_as_kernel(model: nn.Module) -> rewrite.Report:
    """Patched so that every call goes to the bound op, on the CPU too; `kernel` says what that computes."""
    return rewrite.apply_plan(model, replace(plan(model), backend="triton"))


def honest(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float) -> torch.Tensor:
    """A correct kernel: the spec's arithmetic with a sum in another order and another inverse root."""
    h = x.float()
    lanes = h.pow(2).unflatten(-1, (-1, 8)).flip(-2).cumsum(-2)[..., -1, :]
    mean = lanes.cumsum(-1)[..., -1:] * (1.0 / h.shape[-1])
    return finish(h * (1.0 / torch.sqrt(mean + eps)), x.dtype, weight, spec)


def finish(h: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor | None, spec: NormSpec) -> torch.Tensor:
    return scale(h, dtype, weight, spec)


def as_kernel(norm: Callable[..., torch.Tensor]) -> Kernel:
    """A kernel of both ops around one norm function; the residual sum is right."""

    def run(op, spec, x, residual, weight, eps):  # type: ignore[no-untyped-def]
        if residual is None:
            return norm(x, weight, spec, eps)
        total = x + residual
        return norm(total, weight, spec, eps), total

    return run
