"""What vLLM's op for blocks of FP8 calls on a Hopper, in plain PyTorch for the CPU, and the op where there is no vLLM.

`CALLS` has a line for each product: the library, and whether its rows came quantised.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
from rmsnorm_patch.vllm_plugin.passes import block_rows

CALLS: list[tuple[str, bool]] = []
GROUP = 128


def _multiplied(rows: Any, scales: Any, weight: Any, weight_scales: Any) -> torch.Tensor:
    left = rows.float() * scales.repeat_interleave(GROUP, 1)
    right = weight.float() * weight_scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return (left @ right.t()).to(torch.bfloat16)


def flashinfer_fp8_blockscale_gemm(
    input: Any, weight: Any, weight_scale: Any, out_dtype: Any, input_scale: Any = None
) -> torch.Tensor:
    """Of rows of either kind; scales are read by their address alone, in columns of a multiple of four floats."""
    given = input.dtype == torch.float8_e4m3fn
    CALLS.append(("flashinfer", given))
    if not given:
        input, input_scale = quantise(input, QuantSpec("fp8_block", arithmetic="flashinfer", layout="tma_aligned"))
    m, groups = input.shape[0], input.shape[1] // GROUP
    column = -(m // -4) * 4
    where = input_scale.as_strided((m, groups), (1, column), input_scale.storage_offset())
    return _multiplied(input, where, weight, weight_scale)


def fp8_gemm_nt(left: Any, right: Any, out: torch.Tensor, is_deep_gemm_e8m0_used: bool) -> None:
    CALLS.append(("deepgemm", left[0].dtype == torch.float8_e4m3fn))
    out.copy_(_multiplied(*left, *right))


def per_token_group_quant_fp8(x: Any, group_size: int, column_major_scales: bool, use_ue8m0: bool) -> Any:
    assert (group_size, column_major_scales) == (GROUP, True)
    return quantise(x, QuantSpec("fp8_block", "rounded", "separate", "column_major", use_ue8m0))


NAMES = (flashinfer_fp8_blockscale_gemm, fp8_gemm_nt, per_token_group_quant_fp8)


def _stand_in(
    input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, group_size: int, use_deep_gemm_e8m0: bool
) -> torch.Tensor:
    """As vLLM 0.33's."""
    if input.shape[0] < 32:
        return flashinfer_fp8_blockscale_gemm(input, weight, weight_scale, torch.bfloat16)
    rows, scales = per_token_group_quant_fp8(input, group_size, True, use_deep_gemm_e8m0)
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=torch.bfloat16)
    fp8_gemm_nt((rows, scales), (weight, weight_scale), out, use_deep_gemm_e8m0)
    return out


_SCHEMA = "(Tensor input, Tensor weight, Tensor weight_scale, SymInt group_size, bool use_deep_gemm_e8m0) -> Tensor"


def without_vllm() -> Any:
    """(library, module): the op, kept as long as the first is; the second in place of vLLM's module."""
    library = torch.library.Library("vllm", "FRAGMENT")
    library.define(block_rows.NAME + _SCHEMA)
    library.impl(block_rows.NAME, _stand_in, "CPU")

    def fake(input: Any, weight: Any, *_: Any) -> torch.Tensor:
        return torch.empty(input.shape[0], weight.shape[0], dtype=torch.bfloat16, device=input.device)

    torch.library.register_fake(f"vllm::{block_rows.NAME}", fake, lib=library)
    return library, SimpleNamespace(**{function.__name__: function for function in NAMES})


def of_vllm() -> Any:
    """vLLM's own op, which calls what is here."""
    from vllm.model_executor.kernels.linear.scaled_mm import flashinfer

    for function in NAMES:
        setattr(flashinfer, function.__name__, function)
    return flashinfer


def weights(n: int = 384, k: int = 256, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [N, K], and scales that are powers of two, as DeepGEMM's may be."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    return weight, torch.exp2(torch.randint(-6, 0, (-(n // -GROUP), k // GROUP), generator=generator).float())
