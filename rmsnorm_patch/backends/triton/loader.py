"""Loads `kernels/triton` by file path, as compiled kernels or as a copy for Triton's CPU interpreter.

`triton.jit` decides between the two when a function is decorated, so each copy is a synthetic package of its own over
the same files; both can live in one process.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ...kernel_files import kernels_dir
from ...locks import Lock

_LOCK = Lock(waits=True)  # a module half imported, and the switch of `knobs` set, could not be mended
_LOADED: dict[bool, dict[str, ModuleType]] = {}
"""By whether they are interpreted; only what is loaded to its end, which `sys.modules` does not say."""
_PACKAGES = {False: "_rmsnorm_patch_triton", True: "_rmsnorm_patch_triton_interpreted"}
MODULES = (
    "row_math",
    "quantise",
    "rms_norm",
    "fused_add_rms_norm",
    "rms_norm_quantised",
    "rms_norm_add",
    "rms_norm_gated",
    "silu_and_mul_quantised",
)


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for the CPU interpreter, now (the variable is read at every call)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def triton_missing() -> str:
    """Why triton cannot be used on any device, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return ""


def load(name: str, interpreted: bool) -> ModuleType:
    """The module `kernels/triton/<name>.py`; its kernels run on the CPU where `interpreted`."""
    modules = _LOADED.get(interpreted)
    if modules is None:
        with _LOCK:
            modules = _LOADED.get(interpreted) or _load_all(_PACKAGES[interpreted], interpreted)
            _LOADED[interpreted] = modules
    return modules[name]


def _load_all(package: str, interpreted: bool) -> dict[str, ModuleType]:
    from triton import knobs

    if package not in sys.modules:
        spec = importlib.machinery.ModuleSpec(package, loader=None, is_package=True)
        spec.submodule_search_locations = [str(kernels_dir() / "triton")]
        sys.modules[package] = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = interpreted
        loaded = {name: importlib.import_module(f"{package}.{name}") for name in MODULES}
    if interpreted:
        _correct_interpreter_casts()
    return loaded


def _correct_interpreter_casts() -> None:
    """fp32 -> bf16 rounds to nearest even, as every device does: the interpreter of triton 3.6 and 3.7 truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    inherited = type(interpreter_builder).cast_impl

    def cast_impl(source: Any, target: Any) -> Any:
        have, want = source.dtype.scalar, target.scalar
        if have == tl.float32 and want == tl.bfloat16:
            return TensorHandle(_round_to_bf16(source.data), want)
        if have == tl.bfloat16 and want == tl.float32:
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), want)
        return inherited(interpreter_builder, source, target)

    interpreter_builder.cast_impl = cast_impl


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16, uint16."""
    fp32 = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return fp32.to(torch.bfloat16).view(torch.uint16).numpy().reshape(np.shape(values))
