"""Quantisations whose engines were measured and gained nothing from norms of ours: `auto` leaves them to vLLM.

docs/vllm_quantised.md has the figures. A scheme that is not named here was seen to gain, or was not measured.
"""

from __future__ import annotations

from typing import Any

GIVEN_SCALE = "products read rows with a given scale"
BLOCKS_INSIDE = "products quantise blocks themselves"


def without_gain(quantisation: Any, blocks: bool = False) -> str:
    """What products of `quantisation`, a QuantizationConfig of vLLM or None, do where norms of ours gained nothing;
    "" elsewhere. blocks: norms quantise blocks for such products (`passes.block_products`)."""
    if quantisation is None:
        return ""
    if _has_given_scales(quantisation):
        return GIVEN_SCALE
    inside = not blocks and getattr(quantisation, "weight_block_size", None) and _quantises_inside()
    return BLOCKS_INSIDE if inside else ""


def _has_given_scales(quantisation: Any) -> bool:
    if getattr(quantisation, "activation_scheme", "") == "static":
        return True
    schemes = getattr(quantisation, "target_scheme_map", None) or {}
    inputs = [scheme.get("input_activations") for scheme in schemes.values() if scheme]
    return bool(inputs) and all(each is not None and not each.dynamic for each in inputs)


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
