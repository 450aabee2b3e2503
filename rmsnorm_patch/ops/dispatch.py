"""Which backend serves a call, and why: by (op, spec, dtypes, N) and the device, which may be asked, and never by M."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from ..backends.cuda.schedules import Config, Op, no_kernel, schedules, sm, within
from ..backends.names import BACKENDS, Backend
from ..errors import KernelBuildError, UnsupportedInput
from ..numerics.spec import SUPPORTED_DTYPES, NormSpec

BUILT_CAPABILITIES = (80, 89, 90, 100, 103, 120)
"""Compute capabilities whose machine code the tests compile and read; others run what the rules give them."""

BACKEND_VARIABLE = "RMSNORM_PATCH_BACKEND"


@dataclass(frozen=True)
class Choice:
    """What serves a call; `config` is set for backend "cuda" only."""

    backend: Literal["cuda", "triton", "reference"]
    kernel: str
    config: Config | None
    reason: str


def variable_for(backend: str) -> str:
    """What RMSNORM_PATCH_BACKEND says of ops that are bound now: a part of the key under which they are kept. "" where
    a `backend` is named, which it then says nothing of."""
    return os.environ.get(BACKEND_VARIABLE, "") if backend == "auto" else ""


def requested_backend(argument: str | None = None, variable: str | None = None) -> Backend:
    """The backend asked for by `argument`, else by RMSNORM_PATCH_BACKEND, else "auto". variable: what that said when an
    op was bound; None reads it."""
    site, value = "backend", argument
    if argument in (None, "auto"):
        site, value = BACKEND_VARIABLE, (variable_for("auto") if variable is None else variable) or "auto"
    for known in BACKENDS:
        if value == known:
            return known
    raise UnsupportedInput(
        site=site, got=repr(value), supported=", ".join(BACKENDS), next_step=f"set {site} to one of these"
    )


@lru_cache(maxsize=1)
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fallback(reason: str) -> Choice:
    if triton_installed():
        return Choice("triton", "triton", None, f"Triton: {reason}")
    return Choice("reference", "reference", None, f"PyTorch, since Triton is not installed: {reason}")


def _check_dtypes(op: Op, x_dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    for name, dtype in (("x", x_dtype), ("weight", weight_dtype)):
        if dtype is not None and dtype not in SUPPORTED_DTYPES:
            raise UnsupportedInput(
                site=f"{op}: {name}",
                got=str(dtype),
                supported=", ".join(map(str, SUPPORTED_DTYPES)),
                next_step=f"cast {name}, or leave this module unpatched",
            )


def choose(
    op: Op,
    spec: NormSpec,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    m: int,
    n: int,
    capability: int | tuple[int, int] | None = None,
    *,
    residual_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    device_name: str | None = None,
    cuda_unavailable: str = "",
    backend: Backend = "auto",
    variable: str | None = None,
) -> Choice:
    """The kernel for `m` rows of `n` columns on `device`, or on a device of this compute capability (None: no GPU).

    residual_dtype: of what is added to x; None: x's.
    cuda_unavailable: why CUDA kernels cannot be built here ("" if they can); asked of the backend for a `device`.
    A forced `backend` that cannot serve the call raises KernelBuildError; "auto" is what RMSNORM_PATCH_BACKEND says, or
    falls back and says why. variable: as `requested_backend` takes it.
    """
    backend = requested_backend(backend, variable)
    _check_dtypes(op, x_dtype, weight_dtype)
    n = spec.group or n  # a grouped norm is one of shorter rows
    if device is not None and device.type == "cuda":
        capability, device_name, cuda_unavailable = _describe(device)
    elif device is not None and device.type != "cpu":
        return _fallback(f"device type {device.type!r} has no CUDA kernels")
    if n < 1:
        raise UnsupportedInput(f"{op}: x", f"N={n}", "N >= 1", "check the shape of x")
    if backend == "reference":
        return Choice("reference", "reference", None, "backend 'reference' was asked for")
    if backend == "triton":
        return Choice("triton", "triton", None, "backend 'triton' was asked for")
    refused = cuda_unavailable
    configs: tuple[Config, ...] = ()
    if capability is None:
        refused = refused or "not an NVIDIA GPU"
    elif residual_dtype not in (None, x_dtype):
        refused = refused or f"x of {x_dtype} and a residual of {residual_dtype}: CUDA kernels add equal dtypes"
    elif not refused:
        configs = schedules(op, x_dtype, n, capability, device_name)
        if not configs:
            refused = no_kernel(op, x_dtype, n, sm(capability))
    if refused:
        if backend == "cuda":
            raise KernelBuildError(op, refused, "sm_80 and newer with NVRTC", "use backend 'auto' or 'triton'")
        if capability is None and refused == "not an NVIDIA GPU":
            return Choice("reference", "reference", None, "CPU tensors take the original arithmetic")
        return _fallback(refused)
    config = next(config for config in configs if within(max(m, 1), config.m))
    return Choice("cuda", config.kernel, config, _reason(config, sm(capability or 0)))


def _module(backend: str) -> Any:
    """The backend's module: imported when it is first needed, since Triton may be missing and takes a second."""
    if backend == "cuda":
        from ..backends.cuda import backend as cuda_backend

        return cuda_backend
    from ..backends.triton import backend as triton_backend

    return triton_backend


def available(backend: str, device: torch.device) -> tuple[bool, str]:
    """Whether "cuda" or "triton" runs on `device`, and why not, or in which way."""
    if backend == "cuda" and device.type != "cuda":
        return False, "not a CUDA device"
    return _module(backend).available(device)  # type: ignore[no-any-return]


def cannot_run(backend: str, device: torch.device) -> tuple[str, str]:
    """(why a forced `backend` does not run on `device`, what to do about it); ("", "") where it runs."""
    if backend in ("auto", "reference"):
        return "", ""
    module = _module(backend)
    if backend == "cuda":
        runs, why = module.available(device if device.type == "cuda" else None)
        if runs and device.type != "cuda":
            return "CUDA kernels run on CUDA devices", "move the model to one with model.to('cuda')"
        return ("", "") if runs else (why, "run it where torch, an NVIDIA GPU and NVRTC are")
    runs, why = module.available(device)
    if runs:
        return "", ""
    if module.missing():
        return why, "install triton (pip install triton)"
    if device.type == "cpu":
        return why, "set TRITON_INTERPRET=1 before the process starts, or move the model to a GPU"
    return why, "move the model to a device with kernels"


def serving(op: str, backend: str, device: torch.device, refused: Callable[[], str], supported: str) -> str:
    """ "cuda", "triton" or "reference": what serves an op whose CUDA kernel says itself what it takes.

    backend: as asked for, or "auto"; RMSNORM_PATCH_BACKEND is not read. refused: why that kernel does not serve the
    call, asked where CUDA kernels run on `device`; "" if it does. supported: for the error.
    Raises KernelBuildError where a forced backend does not serve.
    """
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return "reference"
    why = ""
    if backend != "triton":
        runs, why = available("cuda", device)
        why = refused() if runs else why
        if not why:
            return "cuda"
        if backend == "cuda":
            raise KernelBuildError(op, why, supported, "use backend='auto'")
    if triton_installed():
        runs, why = available("triton", device)
        if runs:
            return "triton"
    if backend == "triton":
        raise KernelBuildError(op, why or "no Triton", "devices with Triton kernels", "use backend='auto'")
    return "reference"


def bind_on(backend: str, op: Op, spec: NormSpec, dependent: bool) -> tuple[Callable[..., Any], object | None]:
    """The backend's callable for a plain op, and launcher.c's table of it where launcher.c serves it."""
    module = _module(backend)
    table = module.table(op, spec, dependent) if backend == "cuda" else None
    return module.bind(op, spec, dependent), table


def warmup(
    backend: str,
    op: Op,
    spec: NormSpec,
    n: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    device: torch.device,
    residual_dtype: torch.dtype | None = None,
) -> None:
    """Compile what `op` needs on `backend` for contiguous rows of `n` columns. residual_dtype: where it is not `dtype`,
    which only Triton serves."""
    more = {} if residual_dtype in (None, dtype) else {"residual_dtype": residual_dtype}
    _module(backend).warmup(op, spec, n, dtype, weight_dtype, device, **more)


def started_from_python(op: Op, spec: NormSpec) -> str:
    """Why it is not launcher.c that starts the op's CUDA kernels; "" if it is."""
    return _module("cuda").started_from_python(op, spec)  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _describe(device: torch.device) -> tuple[int | None, str, str]:
    """(sm, name, why CUDA kernels cannot be built for it or "")."""
    _, refused = available("cuda", device)
    arch = sm(torch.cuda.get_device_capability(device)) if torch.version.hip is None else None
    return arch, torch.cuda.get_device_name(device), refused


def _reason(config: Config, arch: int) -> str:
    reason = config.reason or "first rule that matches"
    if arch in BUILT_CAPABILITIES:
        return reason
    older = max((built for built in BUILT_CAPABILITIES if built < arch), default=BUILT_CAPABILITIES[0])
    built = ", ".join(f"sm_{built}" for built in BUILT_CAPABILITIES)
    return f"{reason}; sm_{arch} is not among the proved {built}: rules of sm_{older}, compiled for this device"
