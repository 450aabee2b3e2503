"""Fused RMSNorm and residual-add kernels for unmodified models, with a proof and an exact undo.

    plan   = rmsnorm_patch.plan(model)            # dry run: every norm and add -> norm pair, what will happen and why
    report = rmsnorm_patch.apply(model)           # in place, idempotent
    proof  = rmsnorm_patch.verify(model, inputs)  # raises VerificationFailed or returns a report
    rmsnorm_patch.revert(model)                   # the object it was
    with rmsnorm_patch.patched(model): ...

Importing this package imports torch and nothing else of weight: no transformers, no triton, no CUDA context.
"""

from __future__ import annotations

from .api import apply, patched, plan, revert, verify, warmup
from .errors import (
    KernelBuildError,
    NothingProved,
    PatchConflict,
    RMSNormPatchError,
    UnsafeCacheError,
    UnsupportedInput,
    UnsupportedModel,
    VerificationFailed,
)
from .plan import BACKENDS, Backend, NormSite, PairSite, Plan
from .rewrite.report import Report
from .semantics import NormSpec

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "Backend",
    "KernelBuildError",
    "NormSite",
    "NormSpec",
    "NothingProved",
    "PairSite",
    "PatchConflict",
    "Plan",
    "RMSNormPatchError",
    "Report",
    "UnsafeCacheError",
    "UnsupportedInput",
    "UnsupportedModel",
    "VerificationFailed",
    "apply",
    "patched",
    "plan",
    "revert",
    "verify",
    "warmup",
]
