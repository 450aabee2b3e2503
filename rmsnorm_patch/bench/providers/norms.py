"""Providers of the two norms of a hidden state, alone and behind a residual-add."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..rows import FUSED, PLAIN
from .table import ProviderCall, ours, provider


@ours("ours", FUSED)
def _ours(spec):
    from ... import ops

    return ops.bind_fused_add_rms_norm(spec, "cuda")


@ours("ours_inplace", FUSED, in_place=True)
def _ours_inplace(spec):
    from ... import ops

    return ops.bind_fused_add_rms_norm_(spec, "cuda")


@ours("ours_triton", FUSED)
def _ours_triton(spec):
    from ... import ops

    return ops.bind_fused_add_rms_norm(spec, "triton")


def after_add(norm: ProviderCall) -> ProviderCall:
    """The add, then norm(x, weight, eps)."""

    def call(x, residual, weight, eps):
        total = x + residual
        return norm(total, weight, eps), total

    return call


def eager_norm(x, weight, eps):
    """Hugging Face's Llama: x * rstd is rounded before the weight."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def one_rounding(x, weight, eps: float):
    h = x.float()
    return (weight.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def functional_norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def compiled(body: ProviderCall) -> ProviderCall:
    return torch.compile(body, fullgraph=True, dynamic=False)


@provider("eager", FUSED)
def _eager():
    return after_add(eager_norm)


@provider("F.rms_norm", FUSED)
def _functional():
    return after_add(functional_norm)


@provider("inductor", FUSED)
def _inductor():
    return compiled(after_add(one_rounding))


@provider("liger", FUSED)
def _liger():
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight, eps: LigerFusedAddRMSNormFunction.apply(
        x, residual, weight, eps, 0.0, "llama", False
    )


@provider("quack", FUSED)
def _quack():
    from quack.rmsnorm import rmsnorm_fwd

    def call(x, residual, weight, eps):
        out = rmsnorm_fwd(x, weight, residual=residual, eps=eps)
        return out[0], out[1]

    return call


def _flashinfer(use_cuda: bool):
    import flashinfer.norm as norm

    def call(x, residual, weight, eps):
        norm._USE_CUDA_NORM = use_cuda
        norm.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    return call


@provider("flashinfer", FUSED, in_place=True)
def _flashinfer_default():
    return _flashinfer(False)


@provider("flashinfer_cuda", FUSED, in_place=True)
def _flashinfer_cuda():
    return _flashinfer(True)


def vllm_op(name: str) -> ProviderCall:
    """An op of vLLM's compiled library, without importing vLLM: that would change Inductor's settings."""
    spec = importlib.util.find_spec("vllm")
    folders = (spec.submodule_search_locations if spec else None) or ()
    libraries = [library for folder in folders for library in sorted(Path(folder).glob("_C*.so"))]
    if not libraries:
        raise ImportError("vLLM's library is not installed")
    for library in libraries:
        torch.ops.load_library(library)
    return getattr(torch.ops._C, name)


@provider("vllm", FUSED, in_place=True)
def _vllm():
    op = vllm_op("fused_add_rms_norm")

    def call(x, residual, weight, eps):
        op(x, residual, weight, eps)
        return x, residual

    return call


@ours("ours", PLAIN)
def _ours_norm(spec):
    from ... import ops

    return ops.bind_rms_norm(spec, "cuda")


@ours("ours_triton", PLAIN)
def _ours_triton_norm(spec):
    from ... import ops

    return ops.bind_rms_norm(spec, "triton")


@provider("eager", PLAIN)
def _eager_norm():
    return eager_norm


@provider("F.rms_norm", PLAIN)
def _functional_norm():
    return functional_norm


@provider("inductor", PLAIN)
def _inductor_norm():
    return compiled(one_rounding)


@provider("liger", PLAIN)
def liger_norm():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


@provider("quack", PLAIN)
def _quack_norm():
    from quack.rmsnorm import rmsnorm_fwd

    return lambda x, weight, eps: rmsnorm_fwd(x, weight, eps=eps)[0]


def flashinfer_norm(use_cuda: bool) -> ProviderCall:
    import flashinfer.norm as norm

    def call(x, weight, eps):
        norm._USE_CUDA_NORM = use_cuda
        return norm.rmsnorm(x, weight, eps)

    return call


@provider("flashinfer", PLAIN)
def _flashinfer_norm():
    return flashinfer_norm(False)


@provider("flashinfer_cuda", PLAIN)
def _flashinfer_cuda_norm():
    return flashinfer_norm(True)


@provider("vllm", PLAIN)
def _vllm_norm():
    op = vllm_op("rms_norm")

    def call(x, weight, eps):
        out = torch.empty_like(x)
        op(out, x, weight, eps)
        return out

    return call
