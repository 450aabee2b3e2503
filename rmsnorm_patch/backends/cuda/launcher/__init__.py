"""The two ways to start a kernel: launcher.c, compiled on first use, or the same calls through ctypes.

Both give the same four functions, documented in launcher.c; C has those of launcher_pair.h besides.
RMSNORM_PATCH_LAUNCHER chooses.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ....errors import KernelBuildError, UnsafeCacheError, UnsupportedInput
from .. import cache, driver
from . import in_python

VARIABLE = "RMSNORM_PATCH_LAUNCHER"
CHOICES = ("auto", "c", "python")
TOO_MANY_ROWS = in_python.TOO_MANY_ROWS
_SOURCES = (
    "launcher.c",
    "launcher_start.h",
    "launcher_tensor.h",
    "launcher_pair.h",
    "launcher_query_key.h",
    "launcher_hand_over.h",
    "launcher_abi.h",
)
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11")


@dataclass(frozen=True)
class Pairs:
    """What the layers of a patched model call (launcher_pair.h, launcher_query_key.h; `rewrite.native` is the Python
    side)."""

    set_surroundings: Callable[..., None]
    new_norm: Callable[..., Any]
    in_layer: Callable[..., Any]
    hand_over: Callable[..., Any]
    take: Callable[..., Any]
    alone: Callable[..., Any]
    query_key: Callable[..., Any]
    rotated: Callable[..., Any]
    norm_add: Callable[..., Any]
    norm_add_norm: Callable[..., Any]
    norm_hand_over: Callable[..., Any]


@dataclass(frozen=True)
class Functions:
    """kind: "c" or "python"; reason: why it is not C, "" if it is. pairs: None without C."""

    new_kernel: Callable[..., int]
    launch: Callable[..., int]
    make_callable: Callable[..., Any]
    add_row_kind: Callable[..., int]
    kind: str
    reason: str
    pairs: Pairs | None = None


@lru_cache(maxsize=1)
def functions() -> Functions:
    """The launcher of this process."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in CHOICES:
        raise UnsupportedInput(VARIABLE, repr(wanted), ", ".join(CHOICES), "set it to one of these, or unset it")
    if wanted == "python":
        return python_functions(f"{VARIABLE}=python")
    try:
        new_kernel, launch, make_callable, add_row_kind, *pairs = _load(_shared_object())
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
        return python_functions(str(error))
    return Functions(new_kernel, launch, make_callable, add_row_kind, "c", "", Pairs(*pairs))


def dlpack_code(dtype: torch.dtype | None) -> int:
    """DLPack's description of a dtype (type code, bits, lanes) as the integer that launcher.c compares; 0 for None."""
    if dtype is None:
        return 0
    kind = {torch.float32: 2, torch.float16: 2, torch.bfloat16: 4}[dtype]
    return kind | dtype.itemsize * 8 << 8 | 1 << 16


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
    sources = {name: Path(__file__).with_name(name).read_bytes() for name in _SOURCES}
    key = cache.key_of(
        launcher=hashlib.sha256(b"\0".join(sources.values())).hexdigest(), flags=_FLAGS, machine=platform.machine()
    )
    return cache.get_or_build(key, lambda: _compile(sources), {"kernel": "launcher.c", "options": _FLAGS})


def _compile(sources: dict[str, bytes]) -> bytes:
    command = compiler()
    if not command:
        raise KernelBuildError("C launcher", "no C compiler", "cc, gcc, clang or $CC", "install one of them")
    with tempfile.TemporaryDirectory(prefix="rmsnorm_patch-") as folder:
        for name, content in sources.items():
            Path(folder, name).write_bytes(content)
        path, result = Path(folder, _SOURCES[0]), Path(folder, "launcher.so")
        line = [*command, *_FLAGS, str(path), "-o", str(result), "-ldl"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise KernelBuildError(" ".join(line), done.stderr.strip(), "a C11 compiler", "set CC to another compiler")
        return result.read_bytes()


def _load(content: bytes) -> tuple[Any, ...]:
    """Load verified bytes: from an anonymous file, so that nothing can change them between check and load.

    The dynamic linker takes a path that it has opened before for the library that it opened there. Descriptors are used
    again, by other packages too, so that each load spells the path in a way of its own.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rmsnorm_patch_launcher")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            spelling = f"{secrets.randbits(64):b}".replace("0", "/").replace("1", "/.")
            return _open(f"/proc{spelling}/self/fd/{descriptor}")
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


def python_functions(reason: str) -> Functions:
    """The launcher through ctypes."""
    new_kernel, launch, make_callable, add_row_kind = in_python.functions()
    return Functions(new_kernel, launch, make_callable, add_row_kind, kind="python", reason=reason)
