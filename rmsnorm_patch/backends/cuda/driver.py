"""The CUDA driver through ctypes: load machine code into a device's primary context. Not on any hot path."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import lru_cache

from ...errors import KernelBuildError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NON_PORTABLE_CLUSTER = 14  # CUfunction_attribute


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The driver; KernelBuildError where there is none."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise KernelBuildError(
            site=LIBRARY, got=str(error), supported="an NVIDIA driver", next_step="use backend='auto'"
        ) from error


def error_name(code: int) -> str:
    name = ctypes.c_char_p()
    library().cuGetErrorName(code, ctypes.byref(name))
    return f"{(name.value or b'unknown').decode()} ({code})"


def check(code: int, call: str, site: str, next_step: str = "use backend='triton', and report this message") -> None:
    if code:
        raise KernelBuildError(site=site, got=f"{call}: {error_name(code)}", supported="success", next_step=next_step)


@lru_cache(maxsize=64)
def primary_context(device: int) -> int:
    """Address of the context that torch uses on this device; retained for the life of the process."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(library().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet", f"cuda:{device}")
    check(
        library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain", f"cuda:{device}"
    )
    return context.value or 0


@contextlib.contextmanager
def _loading(device: int) -> Iterator[None]:
    """The device's context is current, and loading code is allowed although a stream of this process is captured."""
    driver = library()
    mode, previous = ctypes.c_int(_RELAXED), ctypes.c_void_p()
    check(driver.cuCtxPushCurrent_v2(ctypes.c_void_p(primary_context(device))), "cuCtxPushCurrent", f"cuda:{device}")
    try:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(previous))


def load(code: bytes, entry: str, device: int, site: str, cluster: int = 1) -> int:
    """Address of the CUfunction `entry` of a cubin or PTX on this device. The module is never unloaded."""
    driver = library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with _loading(device):
        check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData", site)
        check(driver.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), "cuModuleGetFunction", site)
        if cluster > 8:
            check(driver.cuFuncSetAttribute(function, _NON_PORTABLE_CLUSTER, 1), "cuFuncSetAttribute(cluster)", site)
    return function.value or 0
