"""Fused RMSNorm and residual-add kernels for unmodified models, with a proof and an exact undo.

    plan   = rmsnorm_patch.plan(model)            # dry run: every norm and add -> norm pair, what will happen and why
    report = rmsnorm_patch.apply(model)           # in place, idempotent
    proof  = rmsnorm_patch.verify(model, inputs)  # raises VerificationFailed or returns a report
    status = rmsnorm_patch.status(model)          # at any time: how its calls went, and why any fell back
    rmsnorm_patch.revert(model)                   # the object it was
    with rmsnorm_patch.patched(model): ...

Importing this package imports nothing of weight: torch comes with the first of these functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backends.names import BACKENDS, Backend
from .errors import (
    KernelBuildError,
    NoCacheError,
    NothingProved,
    PatchConflict,
    RMSNormPatchError,
    UnsafeCacheError,
    UnsupportedInput,
    UnsupportedModel,
    VerificationFailed,
)
from .locks import Lock
from .scan.plan import NormSite, PairSite, Plan

if TYPE_CHECKING:
    from .api import apply, patched, plan, revert, status, verify, warmup
    from .numerics.spec import NormSpec
    from .rewrite.report import Report
    from .rewrite.status import Status

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "Backend",
    "KernelBuildError",
    "NoCacheError",
    "NormSite",
    "NormSpec",
    "NothingProved",
    "PairSite",
    "PatchConflict",
    "Plan",
    "RMSNormPatchError",
    "Report",
    "Status",
    "UnsafeCacheError",
    "UnsupportedInput",
    "UnsupportedModel",
    "VerificationFailed",
    "apply",
    "patched",
    "plan",
    "revert",
    "status",
    "verify",
    "warmup",
]

_IMPORTED_LATER = {
    **dict.fromkeys(("apply", "patched", "plan", "revert", "status", "verify", "warmup"), ".api"),
    "Report": ".rewrite.report",
    "Status": ".rewrite.status",
    "NormSpec": ".numerics.spec",
}
_ROOMS = {"observe": ".rewrite.observe", "cache": ".backends.cuda.cache"}
"""Modules that scripts around a model use, under short names."""

_IMPORTING = Lock(waits=True)  # a child forked in the middle of an import would wait for it for ever


def __getattr__(name: str) -> Any:
    where = _ROOMS.get(name) or _IMPORTED_LATER.get(name)
    if where is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _IMPORTING:
        module = import_module(where, __name__)
        value = globals()[name] = module if name in _ROOMS else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
