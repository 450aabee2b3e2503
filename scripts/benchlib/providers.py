"""Who is timed: one function per provider and op; an import that fails drops the row with its reason.

A provider is a function (x, residual, weight, eps) -> (normed, total) for "fused_add_rms_norm", in place or not, or
(x, weight, eps) -> normed for "rms_norm". `in_place` says that it overwrites (x, residual) with (normed, total).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[], Callable[..., Any]]


@dataclass(frozen=True)
class Provider:
    name: str
    op: str
    call: Callable[..., Any]
    in_place: bool = False


_MAKERS: dict[tuple[str, str], tuple[Make, bool]] = {}


def provider(name: str, op: str, in_place: bool = False):
    def register(make: Make) -> Make:
        _MAKERS[name, op] = (make, in_place)
        return make

    return register


def load(op: str, wanted: set[str] | None = None, extra: tuple[str, ...] = ()) -> tuple[list[Provider], dict[str, str]]:
    """The providers of `op` that this machine has, and why the others are missing.

    extra: "module:function" entries; the function takes the same arguments as a built-in provider.
    """
    found, missing = [], {}
    for (name, of), (make, in_place) in _MAKERS.items():
        if of != op or (wanted and name not in wanted):
            continue
        try:
            found.append(Provider(name, op, make(), in_place))
        except Exception as error:  # a peer that does not import or build on this machine is a missing row, not a crash
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for entry in extra:
        module, _, function = entry.partition(":")
        if not function:
            raise SystemExit(f"--provider {entry}: write it as module:function")
        sys.path.insert(0, os.getcwd())
        found.append(Provider(entry, op, getattr(importlib.import_module(module), function)))
    return found, missing


def _spec():
    """Rounded sum, one final rounding: what FlashInfer, quack and vLLM compute, so that the work is the same."""
    from rmsnorm_patch.semantics import FP32_WEIGHT_MULTIPLY

    return FP32_WEIGHT_MULTIPLY


@provider("ours", "fused_add_rms_norm")
def _ours():
    from rmsnorm_patch import ops

    return ops.bind_fused_add_rms_norm(_spec(), "cuda")


@provider("ours_inplace", "fused_add_rms_norm", in_place=True)
def _ours_inplace():
    from rmsnorm_patch import ops

    return ops.bind_fused_add_rms_norm_(_spec(), "cuda")


@provider("ours_triton", "fused_add_rms_norm")
def _ours_triton():
    from rmsnorm_patch import ops

    return ops.bind_fused_add_rms_norm(_spec(), "triton")


@provider("eager", "fused_add_rms_norm")
def _eager():
    def call(x, residual, weight, eps):
        total = x + residual
        h = total.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return weight * h.to(x.dtype), total

    return call


@provider("F.rms_norm", "fused_add_rms_norm")
def _functional():
    def call(x, residual, weight, eps):
        total = x + residual
        return torch.nn.functional.rms_norm(total, (total.shape[-1],), weight, eps), total

    return call


@provider("inductor", "fused_add_rms_norm")
def _inductor():
    def body(x, residual, weight, eps: float):
        total = x + residual
        h = total.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return (weight.float() * h).to(x.dtype), total

    return torch.compile(body, fullgraph=True, dynamic=False)


@provider("liger", "fused_add_rms_norm")
def _liger():
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight, eps: LigerFusedAddRMSNormFunction.apply(
        x, residual, weight, eps, 0.0, "llama", False
    )


@provider("quack", "fused_add_rms_norm")
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


@provider("flashinfer", "fused_add_rms_norm", in_place=True)
def _flashinfer_default():
    return _flashinfer(False)


@provider("flashinfer_cuda", "fused_add_rms_norm", in_place=True)
def _flashinfer_cuda():
    return _flashinfer(True)


@provider("vllm", "fused_add_rms_norm", in_place=True)
def _vllm():
    import vllm._C  # noqa: F401

    op = torch.ops._C.fused_add_rms_norm

    def call(x, residual, weight, eps):
        op(x, residual, weight, eps)
        return x, residual

    return call


@provider("ours", "rms_norm")
def _ours_norm():
    from rmsnorm_patch import ops

    return ops.bind_rms_norm(_spec(), "cuda")


@provider("ours_triton", "rms_norm")
def _ours_triton_norm():
    from rmsnorm_patch import ops

    return ops.bind_rms_norm(_spec(), "triton")


@provider("eager", "rms_norm")
def _eager_norm():
    def call(x, weight, eps):
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    return call


@provider("F.rms_norm", "rms_norm")
def _functional_norm():
    return lambda x, weight, eps: torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


@provider("inductor", "rms_norm")
def _inductor_norm():
    def body(x, weight, eps: float):
        h = x.float()
        return (weight.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)

    return torch.compile(body, fullgraph=True, dynamic=False)


@provider("liger", "rms_norm")
def _liger_norm():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


@provider("quack", "rms_norm")
def _quack_norm():
    from quack.rmsnorm import rmsnorm_fwd

    return lambda x, weight, eps: rmsnorm_fwd(x, weight, eps=eps)[0]


@provider("flashinfer", "rms_norm")
def _flashinfer_norm():
    import flashinfer.norm as norm

    def call(x, weight, eps):
        norm._USE_CUDA_NORM = False
        return norm.rmsnorm(x, weight, eps)

    return call


@provider("flashinfer_cuda", "rms_norm")
def _flashinfer_cuda_norm():
    import flashinfer.norm as norm

    def call(x, weight, eps):
        norm._USE_CUDA_NORM = True
        return norm.rmsnorm(x, weight, eps)

    return call


@provider("vllm", "rms_norm")
def _vllm_norm():
    import vllm._C  # noqa: F401

    op = torch.ops._C.rms_norm

    def call(x, weight, eps):
        out = torch.empty_like(x)
        op(out, x, weight, eps)
        return out

    return call
