"""The two ways to start a kernel: launcher.c, compiled on first use, or the same calls through ctypes.

`functions()` gives (new_kernel, launch, make_callable, add_plan) from C; `make_callable` and `add_plan` are None in the
ctypes form. `launch` has one signature in both; it is documented in launcher.c. RMSNORM_PATCH_LAUNCHER chooses.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import cache, driver
from .errors import KernelBuildError, UnsafeCacheError, UnsupportedInput

VARIABLE = "RMSNORM_PATCH_LAUNCHER"
CHOICES = ("auto", "c", "python")
TOO_MANY_ROWS = 1000001
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11")


@dataclass(frozen=True)
class Functions:
    """kind: "c" or "python"; reason: why it is not C, "" if it is."""

    new_kernel: Callable[..., int]
    launch: Callable[..., int]
    make_callable: Callable[..., Any] | None
    add_plan: Callable[..., Any] | None
    kind: str
    reason: str


@lru_cache(maxsize=1)
def functions() -> Functions:
    """The launcher of this process."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in CHOICES:
        raise UnsupportedInput(VARIABLE, repr(wanted), ", ".join(CHOICES), "set it to one of these, or unset it")
    if wanted == "python":
        return _python(f"{VARIABLE}=python")
    try:
        new_kernel, launch, make_callable, add_plan = _load(_shared_object())
    except UnsafeCacheError:
        raise
    except (OSError, KernelBuildError, subprocess.SubprocessError) as error:
        if wanted == "c":
            raise
        warnings.warn(
            f"rmsnorm_patch: the C launcher is not available ({error}); eager calls take a few microseconds more. "
            f"Install a C compiler, or set {VARIABLE}=python to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return _python(str(error))
    return Functions(new_kernel, launch, make_callable, add_plan, kind="c", reason="")


def compiler() -> list[str]:
    """The system's C compiler as a command, empty if there is none."""
    for candidate in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(candidate) if candidate else []
        if words and shutil.which(words[0]):
            return words
    return []


def _shared_object() -> bytes:
    if sys.platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise KernelBuildError("C launcher", platform.platform(), "Linux with a GIL build", "nothing: ctypes is used")
    source = Path(__file__).with_name("launcher.c").read_bytes()
    key = cache.key_of(launcher=hashlib.sha256(source).hexdigest(), flags=_FLAGS, machine=platform.machine())
    return cache.get_or_build(key, lambda: _compile(source), {"kernel": "launcher.c", "options": _FLAGS})


def _compile(source: bytes) -> bytes:
    command = compiler()
    if not command:
        raise KernelBuildError("C launcher", "no C compiler", "cc, gcc, clang or $CC", "install one of them")
    with tempfile.TemporaryDirectory(prefix="rmsnorm_patch-") as folder:
        path, result = Path(folder, "launcher.c"), Path(folder, "launcher.so")
        path.write_bytes(source)
        line = [*command, *_FLAGS, str(path), "-o", str(result), "-ldl"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise KernelBuildError(" ".join(line), done.stderr.strip(), "a C11 compiler", "set CC to another compiler")
        return result.read_bytes()


def _load(content: bytes) -> tuple[Any, ...]:
    """Load verified bytes: from an anonymous file, so that nothing can change them between check and load."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rmsnorm_patch_launcher")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            return _open(f"/proc/self/fd/{descriptor}")
        except OSError:
            pass  # some systems forbid executable anonymous files
        finally:
            os.close(descriptor)
    with tempfile.TemporaryDirectory(prefix="rmsnorm_patch-") as folder:
        path = Path(folder, "launcher.so")
        path.write_bytes(content)
        return _open(str(path))


def _open(path: str) -> tuple[Any, ...]:
    entry = ctypes.PyDLL(path).rp_functions
    entry.restype = ctypes.py_object
    entry.argtypes = [ctypes.c_char_p]
    loaded = entry(driver.LIBRARY.encode())
    if isinstance(loaded, str):
        raise KernelBuildError("NVIDIA driver", f"no {loaded}", "driver 525 or newer", "update the driver")
    return loaded


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_CLUSTER, _PROGRAMMATIC = 4, 6
_WORDS = struct.Struct("=21Qfxxxx")


class _Kernel:
    """One kernel with its launch structures; `lock` makes them safe to share between threads."""

    def __init__(self, values: tuple[int, ...]) -> None:
        (self.function, self.context, self.n, self.m_max, self.rows_per_cta, self.cluster, threads) = values[:7]
        self.shared_bytes, self.max_groups, self.dependent, self.align, self.weight_align, self.next = values[7:]
        self.lock = threading.Lock()
        self.args = ctypes.create_string_buffer(_WORDS.size)
        self.params = (ctypes.c_void_p * 1)(ctypes.addressof(self.args))
        self.attributes = (_Attribute * 2)()
        self.config = _Config(shared_bytes=self.shared_bytes, attributes=self.attributes)
        self.config.grid[:] = (1, 1, 1)
        self.config.block[:] = (threads, 1, 1)
        # With a cluster its attribute comes first; the programmatic one is last, so `count` switches it on and off.
        self.fixed = 0
        if self.cluster > 1:
            self.attributes[0].id = _CLUSTER
            self.attributes[0].value[:3] = (self.cluster, 1, 1)
            self.fixed = 1
        self.attributes[self.fixed].id = _PROGRAMMATIC
        self.attributes[self.fixed].value[0] = 1
        self.grid_x = ctypes.cast(ctypes.addressof(self.config), ctypes.POINTER(ctypes.c_uint))
        self.call = (ctypes.byref(self.config), ctypes.c_void_p(self.function), self.params, None)

    def groups(self, m: int, m2: int) -> int:
        groups = -(-m // self.rows_per_cta) + -(-m2 // self.rows_per_cta)
        return min(groups, self.max_groups) if self.max_groups else groups


_kernels: list[_Kernel] = []


def _python(reason: str) -> Functions:
    library = driver.library()
    launch_kernel, get_context = library.cuLaunchKernelEx, library.cuCtxGetCurrent
    push, pop = library.cuCtxPushCurrent_v2, library.cuCtxPopCurrent_v2

    def new_kernel(*values: int) -> int:
        _kernels.append(_Kernel(values))
        return len(_kernels)

    def launch(handle: int, stream: int, dependent: bool, eps: float, *words: int) -> int:
        kernel = _kernels[handle - 1]
        if len(words) == 6:
            words = (*words, kernel.n, kernel.n, kernel.n, kernel.n)
        words = words + (0,) * (21 - len(words))
        groups = kernel.groups(words[5], words[16])
        if groups == 0:
            return 0
        if groups * kernel.cluster > 2**31 - 1:
            return TOO_MANY_ROWS
        current = ctypes.c_void_p()
        get_context(ctypes.byref(current))
        pushed = current.value != kernel.context
        if pushed and (code := push(ctypes.c_void_p(kernel.context))):
            return code
        with kernel.lock:
            _WORDS.pack_into(kernel.args, 0, *words, eps)
            kernel.config.stream = stream
            kernel.grid_x[0] = groups * kernel.cluster
            kernel.config.count = kernel.fixed + (1 if dependent and kernel.dependent else 0)
            code = launch_kernel(*kernel.call)
        if pushed:
            pop(ctypes.byref(current))
        return code

    return Functions(new_kernel, launch, None, None, kind="python", reason=reason)
