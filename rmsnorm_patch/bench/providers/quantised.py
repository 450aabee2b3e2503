"""Providers of the norm behind a residual-add whose rows are written quantised.

Each call gives (rows, scales, normed or None, sum); `scales` is of no meaning where the scale is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...numerics.quantisation import GROUP, QuantSpec, new_scales
from ..quantised import QUANTISED, SCALE, Written
from ..rows import FUSED
from .norms import compiled, vllm_op
from .table import ProviderCall, ours, provider

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LEAST = 1 / (448 * 512)


def _given(quant: QuantSpec) -> torch.Tensor | None:
    return torch.full((1,), SCALE, device=DEVICE) if quant.scheme == "fp8_static" else None


def _launched(run: Callable[..., Any], written: Written) -> ProviderCall:
    """A call of one of our kernels, which write the sum into the residual."""
    from ...fused.norm_quantised.kernel import Operands

    given = _given(written.quant)

    def call(x, residual, weight, eps):
        rows, scales, normed = run(Operands(x, residual, weight, given, eps))
        return rows, scales, normed if written.both else None, residual

    return call


def _ours(written: Written, spec: Any) -> ProviderCall:
    from ...fused.norm_quantised import kernel

    bounded = written.quant.scheme == "fp8_static"
    return _launched(kernel.bound(spec, written.quant, True, bounded, written.both), written)


def _ours_triton(written: Written, spec: Any) -> ProviderCall:
    from ...fused.norm_quantised import portable

    return _launched(portable.bound(spec, written.quant, True, written.both), written)


for _name, _written in QUANTISED.items():
    ours("ours", _name)(partial(_ours, _written))
    ours("ours_triton", _name)(partial(_ours_triton, _written))


def _normed(x, residual, weight, eps):  # type: ignore[no-untyped-def]
    """(the norm's fp32 value, the sum), as vLLM's compiled graphs have them."""
    h = x.float() + residual.float()
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return normed, h.to(x.dtype)


def _fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


@provider("inductor", f"{FUSED}_fp8_static")
def _inductor_static():
    given = _given(QuantSpec("fp8_static"))

    def body(x, residual, weight, eps):
        normed, total = _normed(x, residual, weight, eps)
        return _fp8(normed * given.reciprocal()), given, None, total

    return compiled(body)


@provider("inductor", f"{FUSED}_fp8_token")
def _inductor_token():
    def body(x, residual, weight, eps):
        normed, total = _normed(x, residual, weight, eps)
        scale = (normed.abs().amax(-1, keepdim=True) / 448.0).clamp(min=_LEAST)
        return _fp8(normed * scale.reciprocal()), scale, None, total

    return compiled(body)


@provider("inductor", f"{FUSED}_fp8_block")
def _inductor_block():
    def body(x, residual, weight, eps):
        normed, total = _normed(x, residual, weight, eps)
        grouped = normed.unflatten(-1, (-1, GROUP))
        scale = (grouped.abs().amax(-1, keepdim=True) / 448.0).clamp(min=_LEAST)
        return _fp8(grouped / scale).flatten(-2), scale.squeeze(-1), None, total

    return compiled(body)


@provider("inductor", f"{FUSED}_int8_token")
def _inductor_int8():
    def body(x, residual, weight, eps):
        normed, total = _normed(x, residual, weight, eps)
        scale = (normed.abs().amax(-1, keepdim=True) / 127.0).clamp(min=1e-7)
        return (normed / scale).round().clamp(-128, 127).to(torch.int8), scale, None, total

    return compiled(body)


@provider("vllm", f"{FUSED}_fp8_static")
def _vllm_static():
    op, given = vllm_op("fused_add_rms_norm_static_fp8_quant"), _given(QuantSpec("fp8_static"))

    def call(x, residual, weight, eps):
        rows = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        op(rows, x, residual, weight, given, eps)
        return rows, given, None, residual

    return call


def _vllm_token(dtype: torch.dtype) -> ProviderCall:
    op = vllm_op("rms_norm_dynamic_per_token_quant")

    def call(x, residual, weight, eps):
        rows, scales = torch.empty_like(x, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)
        op(rows, x, weight, scales, eps, None, residual)
        return rows, scales, None, residual

    return call


provider("vllm", f"{FUSED}_fp8_token")(partial(_vllm_token, torch.float8_e4m3fn))
provider("vllm", f"{FUSED}_int8_token")(partial(_vllm_token, torch.int8))


def _vllm_block(quant: QuantSpec) -> ProviderCall:
    op = vllm_op("rms_norm_per_block_quant")
    transposed = quant.layout != "row_major"

    def call(x, residual, weight, eps):
        rows, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), new_scales(x, quant)
        op(rows, x, weight, scales, eps, None, residual, GROUP, transposed)
        return rows, scales, None, residual

    return call


for _name in ("fp8_block", "fp8_block_columns"):
    provider("vllm", f"{FUSED}_{_name}")(partial(_vllm_block, QUANTISED[f"{FUSED}_{_name}"].quant))


def _flashinfer_static(use_cuda: bool) -> ProviderCall:
    from flashinfer import norm

    given = _given(QuantSpec("fp8_static"))

    def call(x, residual, weight, eps):
        norm._USE_CUDA_NORM = use_cuda
        rows = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        norm.fused_add_rmsnorm_quant(rows, x, residual, weight, given, eps)
        return rows, given, None, residual

    return call


provider("flashinfer", f"{FUSED}_fp8_static")(partial(_flashinfer_static, False))
provider("flashinfer_cuda", f"{FUSED}_fp8_static")(partial(_flashinfer_static, True))


@provider("flashinfer", f"{FUSED}_fp8_block_both")
def _flashinfer_block():
    """Its rows are quantised of the rounded ones, which it always writes too."""
    from flashinfer.norm import fused_add_rmsnorm_fp8_block_quant as op

    quant = QUANTISED[f"{FUSED}_fp8_block_both"].quant

    def call(x, residual, weight, eps):
        rows, normed, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty_like(x), new_scales(x, quant)
        columns = scales.as_strided((scales.shape[1], scales.stride(1)), (scales.stride(1), 1))
        op(rows, columns, normed, x, residual, weight, eps)
        return rows, scales, normed, residual

    return call
