"""What engines of a quantisation were seen to gain, which `auto` follows; docs/vllm_quantised.md has the figures.

A scheme whose norms are not named here was seen to gain from norms of ours, or was not measured. Of silu_and_mul those
are named that gained.
"""

from __future__ import annotations

from typing import Any

from ..numerics.quantisation import GROUP, Scheme

GIVEN_SCALE = "products read rows with a given scale"
BLOCKS_INSIDE = "products quantise blocks themselves"
SILU: frozenset[Scheme] = frozenset({"fp8_token"})
"""Rows that silu_and_mul was seen to gain from writing."""


def without_gain(quantisation: Any) -> str:
    """What products of `quantisation`, a QuantizationConfig of vLLM or None, do where norms of ours that write plain
    rows gained nothing; "" elsewhere."""
    if quantisation is None:
        return ""
    if _has_given_scales(quantisation):
        return GIVEN_SCALE
    return BLOCKS_INSIDE if _has_blocks(quantisation) and _quantises_inside() else ""


def _has_given_scales(quantisation: Any) -> bool:
    if getattr(quantisation, "activation_scheme", "") == "static":  # Fp8Config
        return True
    if getattr(quantisation, "quant_method", "") == "FP8":  # ModelOpt's name of this scheme
        return True
    inputs = _quark(quantisation, "input_tensors")
    if inputs:
        return not inputs.get("is_dynamic", True)
    schemes = getattr(quantisation, "target_scheme_map", None) or {}  # of compressed-tensors
    each_input = [scheme.get("input_activations") for scheme in schemes.values() if scheme]
    return bool(each_input) and all(each is not None and not each.dynamic for each in each_input)


def _has_blocks(quantisation: Any) -> bool:
    """What vLLM itself asks, and for configurations that do not answer, whether their weights have a scale a block."""
    if hasattr(quantisation, "weight_block_size"):
        return quantisation.weight_block_size is not None
    if hasattr(quantisation, "has_blocked_weights"):
        return bool(quantisation.has_blocked_weights())
    if _quark(quantisation, "weight").get("qscheme") == "per_block":
        return True
    linear = getattr(getattr(quantisation, "args", None), "linear", None)  # of a checkpoint quantised at load
    scale = getattr(getattr(linear, "weight", None), "scale", None)
    return getattr(scale, "group_shape", None) == (GROUP, GROUP)


def _quark(quantisation: Any, part: str) -> dict[str, Any]:
    """What Quark's configuration says of all layers' weights or inputs; empty for any other."""
    whole = getattr(quantisation, "quant_config", None)
    found = (whole.get("global_quant_config") or {}).get(part) if isinstance(whole, dict) else None
    return found if isinstance(found, dict) else {}


def _quantises_inside() -> bool:
    """Whether vLLM's first choice for blocks on a Hopper can be taken: FlashInfer's products for few rows, DeepGEMM's
    for many, in one op that reads bf16."""
    try:
        from vllm import envs
        from vllm.model_executor.kernels.linear.scaled_mm.flashinfer import (
            FlashInferFp8DeepGEMMDynamicBlockScaledKernel as Kernel,
        )
    except ImportError:  # releases before it
        return False
    return Kernel.__name__ not in envs.VLLM_DISABLED_KERNELS and bool(Kernel.is_supported()[0])
