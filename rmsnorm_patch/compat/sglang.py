"""The one function of SGLang's kernel package that we stand in for: the residual-add and its norm, in place."""

from __future__ import annotations

import torch

from .. import ops
from ..errors import UnsupportedInput
from ..numerics import operands
from ..numerics.spec import NormSpec

SPEC = NormSpec(round_before_weight="none", output="input", sum="fp32")
"""SGLang's arithmetic: the norm reads the unrounded sum, the weight is multiplied in fp32, one rounding at the end."""
GEMMA_SPEC = NormSpec(round_before_weight="none", weight_offset="fp32", output="input", sum="fp32")
"""The same of its functions for Gemma, whose weight is `1 + w`."""
SITE = "fused_add_rmsnorm"


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """residual <- input + residual, input <- norm(that sum) * weight, with SGLang's signature and in place.

    input, residual: [num_tokens, hidden_size], fp16, bf16 or fp32, of one dtype, rows contiguous and any stride between
        them; weight: [hidden_size] of the same dtype. All on one device. A call with no tokens does nothing.
    eps: added to the mean square. enable_pdl: False launches behind the kernel in front; None and True as
        RMSNORM_PATCH_PDL says, on devices that know such launches.

    The sum is stored rounded, the norm reads it unrounded (`SPEC`). Under CUDA graphs call it once before capture.
    Raises UnsupportedInput for anything else; nothing is then written.
    """
    for name, tensor, dims in (("input", input, 2), ("residual", residual, 2), ("weight", weight, 1)):
        if tensor.dim() != dims:
            shape = "[num_tokens, hidden_size]" if dims == 2 else "[hidden_size]"
            raise UnsupportedInput(
                SITE, f"{name} of shape {tuple(tensor.shape)}", shape, f"reshape {name} to {dims} dimensions"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise UnsupportedInput(
                SITE, f"{name} with strides {tensor.stride()}", "rows that are contiguous", f"pass {name}.contiguous()"
            )
    if weight.dtype != input.dtype:
        raise UnsupportedInput(
            SITE, f"weight of {weight.dtype} for input of {input.dtype}", "one dtype", "cast the weight once, at load"
        )
    operands.check_in_place(input, residual, weight, SPEC, SITE)
    if input.shape[0]:
        ops.bind_fused_add_rms_norm_(SPEC, enable_pdl=enable_pdl)(input, residual, weight, float(eps))
