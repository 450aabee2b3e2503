"""Who is timed: one function per provider and op; an import that fails drops the row with its reason.

A provider is a function of the op's tensors and eps: (x, residual, weight, eps) -> (normed, total) for
"fused_add_rms_norm", (x, weight, eps) -> normed for "rms_norm", (q, k, q_weight, k_weight, eps) -> (normed q, normed k)
for "rms_norm_pair". Ops that quantise are described in `bench/quantised.py`. `in_place` says that it overwrites
(x, residual) with (normed, total).
"""

from __future__ import annotations

from .loading import load
from .table import Provider

__all__ = ["Provider", "load"]
