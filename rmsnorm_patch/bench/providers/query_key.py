"""Providers of "rms_norm_pair": the norms of q [tokens, heads, n] and k, views of one packed projection.

Only ours takes both in one launch; Inductor gets both norms in one compiled function, the rest two calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..rows import PAIR
from .norms import compiled, flashinfer_norm, functional_norm, liger_norm, one_rounding, vllm_op
from .table import ours, provider


def twice(norm: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A call for each of q and k; norm(x, weight, eps)."""
    return lambda q, k, q_weight, k_weight, eps: (norm(q, q_weight, eps), norm(k, k_weight, eps))


@ours("ours", PAIR)
def _ours(spec):
    from ...fused.query_key_norm import kernel as query_key_norm_kernel

    return query_key_norm_kernel.bind_rms_norm_pair(spec)


@ours("ours_two_launches", PAIR)
def _ours_two_launches(spec):
    from ... import ops

    return twice(ops.bind_rms_norm(spec, "cuda"))


@ours("ours_triton", PAIR)
def _ours_triton(spec):
    from ... import ops

    return twice(ops.bind_rms_norm(spec, "triton"))


@provider("eager", PAIR)
def _eager():
    return twice(one_rounding)


@provider("F.rms_norm", PAIR)
def _functional():
    return twice(functional_norm)


@provider("inductor", PAIR)
def _inductor():
    return compiled(twice(one_rounding))


@provider("liger", PAIR)
def _liger():
    return twice(liger_norm())


@provider("quack", PAIR)
def _quack():
    """With a weight for each head quack takes strided [tokens, heads, n]; with one weight it would need a copy."""
    from quack.rmsnorm import rmsnorm_fwd

    return twice(lambda x, weight, eps: rmsnorm_fwd(x, weight.expand(x.shape[1], -1), eps=eps)[0])


@provider("flashinfer", PAIR)
def _flashinfer_default():
    return twice(flashinfer_norm(False))


@provider("flashinfer_cuda", PAIR)
def _flashinfer_cuda():
    return twice(flashinfer_norm(True))


@provider("vllm", PAIR)
def _vllm():
    op = vllm_op("rms_norm")

    def call(x, weight, eps):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        op(out, x, weight, eps)
        return out

    return twice(call)
