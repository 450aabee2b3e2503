"""Providers of "rms_norm_pair": the norms of q [tokens, heads, n] and k, views of one packed projection.

Only ours takes both in one launch; Inductor gets both norms in one compiled function, the rest two calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .providers import PAIR, ours, provider, vllm_op


def twice(norm: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A call for each of q and k; norm(x, weight, eps)."""
    return lambda q, k, q_weight, k_weight, eps: (norm(q, q_weight, eps), norm(k, k_weight, eps))


@ours("ours", PAIR)
def _ours(spec):
    from rmsnorm_patch import cuda_pair

    return cuda_pair.bind_rms_norm_pair(spec)


@ours("ours_two_launches", PAIR)
def _ours_two_launches(spec):
    from rmsnorm_patch import ops

    return twice(ops.bind_rms_norm(spec, "cuda"))


@ours("ours_triton", PAIR)
def _ours_triton(spec):
    from rmsnorm_patch import ops

    return twice(ops.bind_rms_norm(spec, "triton"))


def _one_rounding(x, weight, eps: float):
    h = x.float()
    return (weight.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


@provider("eager", PAIR)
def _eager():
    return twice(_one_rounding)


@provider("F.rms_norm", PAIR)
def _functional():
    return twice(lambda x, weight, eps: torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps))


@provider("inductor", PAIR)
def _inductor():
    def body(q, k, q_weight, k_weight, eps: float):
        return _one_rounding(q, q_weight, eps), _one_rounding(k, k_weight, eps)

    return torch.compile(body, fullgraph=True, dynamic=False)


@provider("liger", PAIR)
def _liger():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return twice(lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False))


@provider("quack", PAIR)
def _quack():
    """With a weight for each head quack takes strided [tokens, heads, n]; with one weight it would need a copy."""
    from quack.rmsnorm import rmsnorm_fwd

    return twice(lambda x, weight, eps: rmsnorm_fwd(x, weight.expand(x.shape[1], -1), eps=eps)[0])


def _flashinfer(use_cuda: bool):
    import flashinfer.norm as norm

    def call(x, weight, eps):
        norm._USE_CUDA_NORM = use_cuda
        return norm.rmsnorm(x, weight, eps)

    return twice(call)


@provider("flashinfer", PAIR)
def _flashinfer_default():
    return _flashinfer(False)


@provider("flashinfer_cuda", PAIR)
def _flashinfer_cuda():
    return _flashinfer(True)


@provider("vllm", PAIR)
def _vllm():
    op = vllm_op("rms_norm")

    def call(x, weight, eps):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        op(out, x, weight, eps)
        return out

    return twice(call)
