"""The columns of the end-to-end comparison: one model, its weights shared by every variant."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn as nn

SHAPES = {
    "llama-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "llama-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "tiny": dict(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
}  # fmt: skip


def build(shape: str, device: str, layers: int | None = None) -> nn.Module:
    """A Llama of the named shape with random weights, bf16, in eval mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)
    if layers:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def share_weights(model: nn.Module) -> nn.Module:
    """A second module tree over the very same parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def functional_norm(model: nn.Module) -> None:
    """`F.rms_norm` in place of every norm's own forward, by the same class swap that we use (no extra host cost)."""
    cls = type(_norms(model)[0])

    def forward(self, hidden_states):
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    swapped = type(cls.__name__, (cls,), {"forward": forward})
    for norm in _norms(model):
        norm.__class__ = swapped


def liger_norm(model: nn.Module) -> None:
    """Liger's RMSNorm as its own monkey patch installs it on a Llama instance, and on that one alone."""
    if not next(model.parameters()).is_cuda:
        raise ImportError("Liger's kernels need a GPU")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaRMSNorm
    apply_liger_kernel_to_llama(
        rope=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, model=model
    )
    modeling_llama.LlamaRMSNorm = own  # Liger also replaces the class for every model built later


def removed_norm(model: nn.Module) -> None:
    """No norm at all, the adds stay: the ceiling for anything that only makes norms faster."""
    cls = type(_norms(model)[0])
    swapped = type(cls.__name__, (cls,), {"forward": lambda self, hidden_states: hidden_states})
    for norm in _norms(model):
        norm.__class__ = swapped


def patched(model: nn.Module) -> None:
    import rmsnorm_patch

    rmsnorm_patch.apply(model)


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "stock": lambda model: None,
    "F.rms_norm": functional_norm,
    "liger": liger_norm,
    "patched": patched,
    "removed": removed_norm,
}


def variants(model: nn.Module, wanted: list[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Name -> model for every variant that this machine can build, and why the others are missing."""
    made, missing = {}, {}
    for name in wanted:
        other = share_weights(model)
        try:
            VARIANTS[name](other)
        except ImportError as error:
            missing[name] = str(error)
            continue
        made[name] = other
    return made, missing
