"""The columns of the end-to-end comparison: one model, its weights shared by every variant."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
    "gemma2-9b": dict(
        model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
        max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-6,
    ),
    "tiny": dict(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "tiny-gemma2": dict(
        model_type="gemma2", vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}  # fmt: skip


def build(shape: str, device: str, layers: int | None = None) -> nn.Module:
    """A Llama, or what the named shape says, with random weights, bf16, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": "llama", "tie_word_embeddings": False, **SHAPES[shape]})
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


def _check_is_llama(model: nn.Module) -> None:
    """The other ways are for norms without 1 + w."""
    if model.config.model_type != "llama":
        raise ImportError(f"it is for Llama's norm, not for {model.config.model_type}'s")


def functional_norm(model: nn.Module) -> None:
    """`F.rms_norm` in place of every norm's own forward, by the same class swap that we use (no extra host cost)."""
    cls = type(_norms(model)[0])
    _check_is_llama(model)

    def forward(self, hidden_states):
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    swapped = type(cls.__name__, (cls,), {"forward": forward})
    for norm in _norms(model):
        norm.__class__ = swapped


REPLACED = "_fused_rms_norm"
"""The aten op behind `F.rms_norm` on a GPU. From 2.13 on torch has kernels of its own vendored quack for it. They need
nvidia-cutlass-dsl, in a version that torch knows, and apache-tvm-ffi."""
VENDORED = "F.rms_norm-quack"


def torch_overrides() -> Any:
    """torch's registry of kernels in place of aten's; None where nothing stands in place of `REPLACED`."""
    try:
        from torch._native import registry
    except ImportError:
        return None
    return registry if REPLACED in registry.get_dsl_operations("cutedsl") else None


def quack_norm(model: nn.Module) -> None:
    """`F.rms_norm` with the kernels that torch has in place of aten's."""
    if torch_overrides() is None:
        raise ImportError(
            "this torch has no kernel in place of aten's _fused_rms_norm; that needs 2.13, nvidia-cutlass-dsl and "
            "apache-tvm-ffi (TORCH_NATIVE_SKIP_VERSION_CHECK=1: whichever version)"
        )
    functional_norm(model)


@contextmanager
def kernels_of(variant: str) -> Iterator[None]:
    """What runs within has torch's replacements of aten's norm in the column of that name, and aten's in all others."""
    registry = torch_overrides() if variant != VENDORED else None
    if registry is not None:
        registry.deregister_op_overrides(disable_op_symbols=REPLACED)
    try:
        yield
    finally:
        if registry is not None:
            registry.reenable_op_overrides(enable_op_symbols=REPLACED)


def norm_kernels(variant: str, device: str) -> list[str]:
    """The names of the kernels that one `F.rms_norm` of the variant starts; none on the CPU."""
    if device != "cuda":
        return []
    x, weight = torch.randn(1, 4096, device="cuda").bfloat16(), torch.ones(4096, device="cuda").bfloat16()
    with kernels_of(variant):
        torch.nn.functional.rms_norm(x, (4096,), weight, 1e-5)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.nn.functional.rms_norm(x, (4096,), weight, 1e-5)
            torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == device]


def liger_norm(model: nn.Module) -> None:
    """Liger's RMSNorm as its own monkey patch installs it on a Llama instance, and on that one alone."""
    _check_is_llama(model)
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


def joined(model: nn.Module) -> None:
    """Patched; in captured graphs of torch.compile norms take over the split products in front of them."""
    import rmsnorm_patch

    rmsnorm_patch.apply(model, compiled="joined")


def patched_apart(model: nn.Module) -> None:
    """Patched, but adds behind norms (sandwich layouts) are calls of their own."""
    import rmsnorm_patch
    from rmsnorm_patch.rewrite import apply_plan

    plan = rmsnorm_patch.plan(model)
    apply_plan(model, dataclasses.replace(plan, pairs=tuple(p for p in plan.pairs if p.kind != "norm_add")))


def patched_unrotated(model: nn.Module) -> None:
    """Patched, but the rotation behind the norms of a query and its key is the model's own."""
    import rmsnorm_patch
    from rmsnorm_patch.rewrite import apply_plan

    plan = rmsnorm_patch.plan(model)
    apply_plan(
        model, dataclasses.replace(plan, query_key=tuple(dataclasses.replace(s, rotation=None) for s in plan.query_key))
    )


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "stock": lambda model: None,
    "F.rms_norm": functional_norm,
    VENDORED: quack_norm,
    "liger": liger_norm,
    "patched": patched,
    "removed": removed_norm,
    "patched-apart": patched_apart,
    "patched-unrotated": patched_unrotated,
    "joined": joined,
}
USUAL = ("stock", "F.rms_norm", "liger", "patched", "removed")
"""Those that are compared where none are named."""


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
