"""SGLang plugin: installed beside SGLang, our kernels stand in for its four norm functions.

SGLang calls `register` in each of its processes through the entry point group `sglang.srt.plugins`. It puts the hooks
in place afterwards: in its norm module, and wherever the functions were imported to. SGLang's layers keep their own
checks, so that a norm they compute otherwise (batch-invariant, quantised, of another width) never comes here.

A kernel serves once it has agreed with SGLang's own function on rows of the shape at hand. What it does not serve, and
what a compiler traces, SGLang's own function computes. RMSNORM_PATCH_SGLANG=off leaves everything to SGLang.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import torch

from .. import ops
from ..errors import RMSNormPatchError, UnsupportedInput
from ..numerics.contract import FUSED_ADD_IN_PLACE, PLAIN_OPS, RMS_NORM
from ..numerics.spec import GEMMA, NormSpec
from ..ops import dispatch
from .sglang import GEMMA_SPEC, SPEC

GROUP = "sglang.srt.plugins"
VARIABLE = "RMSNORM_PATCH_SGLANG"
MODULE = "sglang.srt.layers.layernorm"
FUNCTIONS: dict[str, tuple[str, NormSpec]] = {
    "rmsnorm": (RMS_NORM.name, SPEC),
    "fused_add_rmsnorm": (FUSED_ADD_IN_PLACE.name, SPEC),
    "gemma_rmsnorm": (RMS_NORM.name, GEMMA),
    "gemma_fused_add_rmsnorm": (FUSED_ADD_IN_PLACE.name, GEMMA_SPEC),
}
"""Functions of `MODULE` -> our op and its numerics."""
PARAMETERS = {
    RMS_NORM.name: ("input", "weight", "eps", "out", "enable_pdl"),
    FUSED_ADD_IN_PLACE.name: ("input", "residual", "weight", "eps", "enable_pdl"),
}
"""SGLang's own parameters; a release with others keeps its functions."""
DTYPES = (torch.bfloat16, torch.float16)
ROWS = (1, 3)
"""Rows of the trial calls: a schedule is compiled per row length, for all row counts of one reduction tree."""

Tried = tuple[str, torch.dtype, int, torch.device, str]
"""Function, rows, and what RMSNORM_PATCH_BACKEND says, by which the op is bound that serves."""
_trusted: dict[Tried, bool] = {}
logger = logging.getLogger("rmsnorm_patch.sglang")


@dataclass(frozen=True)
class Outlook:
    """What an engine started now would get. version: SGLang's, None = not installed; reason: why its norms are served,
    or why not."""

    version: str | None
    served: bool
    reason: str


def read() -> Literal["auto", "off"]:
    """Whether `RMSNORM_PATCH_SGLANG` lets engines be served; UnsupportedInput for a value that means nothing."""
    value = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if value not in ("auto", "off"):
        raise UnsupportedInput(VARIABLE, repr(value), "'auto', 'off' or unset", "correct the variable")
    return "off" if value == "off" else "auto"


def register() -> None:
    """Entry point. Never raises; imports nothing of SGLang's where it hooks nothing."""
    try:
        if why := _why_not():
            logger.info("rmsnorm_patch: SGLang keeps its own norms: %s", why)
        else:
            _hook_all()
    except Exception as error:
        logger.warning("rmsnorm_patch: SGLang keeps its own norms: %s: %s", type(error).__name__, error)


def _why_not() -> str:
    """Why this process leaves all norms to SGLang; "" if it does not."""
    if read() == "off":
        return f"{VARIABLE}=off"
    return "" if torch.version.cuda and torch.cuda.is_available() else "no NVIDIA GPU"


def describe() -> Outlook:
    """For `rmsnorm-patch env`: what an engine of this installation gets, without importing SGLang."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return Outlook(None, False, "SGLang is not installed")
    try:
        why = _why_not()
    except UnsupportedInput as error:
        why = str(error)
    if not why and not _has_hooks():
        why = f"SGLang {version} has no hooks for plugins"
    if not why and not _is_allowed():
        why = "SGLANG_PLUGINS does not name rmsnorm_patch"
    return Outlook(version, not why, why or "where a trial agrees; the scheduler's log names each function")


def _has_hooks() -> bool:
    found = util.find_spec("sglang")
    folders = (found and found.submodule_search_locations) or ()
    return any((Path(folder) / "srt" / "plugins" / "hook_registry.py").is_file() for folder in folders)


def _is_allowed() -> bool:
    names = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    return not names or "rmsnorm_patch" in names


def _hook_all() -> None:
    from sglang.srt.layers import layernorm
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, (op, spec) in FUNCTIONS.items():
        own = getattr(layernorm, name, None)
        found = () if own is None else tuple(inspect.signature(own).parameters)
        if found != PARAMETERS[op]:
            logger.warning("rmsnorm_patch: SGLang keeps its own %s: its parameters are %s", name, found)
            continue
        make = hook_of_add if PLAIN_OPS[op].fused_add else hook_of_norm
        HookRegistry.register(f"{MODULE}.{name}", make(name, spec), HookType.AROUND)


def hook_of_norm(name: str, spec: NormSpec) -> Callable[..., torch.Tensor]:
    """f(SGLang's function, input [..., N], weight [N], ...) -> normed."""

    def norm(
        own: Callable[..., Any],
        input: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        out: torch.Tensor | None = None,
        enable_pdl: bool | None = None,
    ) -> torch.Tensor:
        if ops.is_traced() or out is not None or not _serves(name, own, input, weight):
            return own(input, weight, eps, out, enable_pdl)
        return ops.bind_rms_norm(spec, enable_pdl=enable_pdl)(input, weight, eps)

    return norm


def hook_of_add(name: str, spec: NormSpec) -> Callable[..., None]:
    """f(SGLang's function, input [M, N], residual [M, N], weight [N], ...): residual <- sum, input <- normed."""

    def add(
        own: Callable[..., Any],
        input: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        enable_pdl: bool | None = None,
    ) -> None:
        same = residual.dtype == input.dtype and residual.shape == input.shape
        if ops.is_traced() or not same or not _serves(name, own, input, weight):
            own(input, residual, weight, eps, enable_pdl)
        else:
            ops.bind_fused_add_rms_norm_(spec, enable_pdl=enable_pdl)(input, residual, weight, eps)

    return add


def _serves(name: str, own: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether our kernel takes a call of these tensors. The first one of a shape is tried, unless a graph is being
    captured: then SGLang's function is, and nothing is remembered."""
    key = name, x.dtype, x.shape[-1], x.device, dispatch.variable_for("auto")
    trusted = _trusted.get(key)
    if trusted is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        trusted = _trusted[key] = _try(name, own, x)
    return trusted and weight.dtype == x.dtype and weight.shape == x.shape[-1:] and x.numel() > 0


def _try(name: str, own: Callable[..., Any], x: torch.Tensor) -> bool:
    op = FUNCTIONS[name][0]
    why = disagreement(name, own, x.dtype, x.shape[-1], x.device) if x.dtype in DTYPES else f"its rows are {x.dtype}"
    if why:
        logger.warning("rmsnorm_patch: %s of %d columns stays SGLang's own: %s", name, x.shape[-1], why)
    else:
        logger.info("rmsnorm_patch: %s of %d columns is served by %s", name, x.shape[-1], op)
    return not why


@torch.no_grad()
def disagreement(name: str, own: Callable[..., Any], dtype: torch.dtype, n: int, device: torch.device) -> str:
    """Run SGLang's function and our kernel on a few rows: "" where they agree, else what is wrong."""
    op, spec = FUNCTIONS[name]
    row = PLAIN_OPS[op]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    weight = normal(n)
    for rows in ROWS:
        tensors = tuple(normal(rows, n) for _ in range(row.operands))
        again = tuple(tensor.clone() for tensor in tensors)
        want = row.results(own(*again, weight, 1e-6), again)
        try:
            got = row.results(ops.bind(op, spec)(*tensors, weight, 1e-6), tensors)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RMSNormPatchError, RuntimeError, OSError) as error:
            return f"its kernel does not run here ({error})"
        for left, right in zip(got, want, strict=True):
            if not torch.allclose(left.float(), right.float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6):
                return "the two disagree on this device"
    return ""
