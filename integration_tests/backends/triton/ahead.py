"""Triton kernels compiled ahead of time for devices that are not here. Neighbouring tests ask other things of a kernel:
what was compiled once, or read by NVIDIA's tool, is kept in this process."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmsnorm_patch.backends.triton import loader
from rmsnorm_patch.backends.triton.backend import Layout, Target

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def known(target: GPUTarget, dependent: bool = True) -> Target:
    """What the kernels must know of a device."""
    return Target(target.warp_size) if target.backend == "hip" else Target.nvidia(int(target.arch) // 10, dependent)


_KNOWN: dict[str, Any] = {}


def compiled(
    target: GPUTarget,
    kernel: str,
    layout: Layout,
    constants: Mapping[str, Any],
    dtype: torch.dtype,
    types: Mapping[str, str] | None = None,
    anew: bool = False,
) -> Any:
    """A kernel with these compile-time constants. Pointers are aligned and to `dtype`, each eps is fp32 and every other
    number int32, where `types` does not say otherwise. anew: whatever was compiled before."""
    function = getattr(loader.load(kernel, interpreted=False), kernel)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        pointer = name.endswith("_ptr")
        plain = f"*{NAMES[dtype]}" if pointer else "fp32" if name.endswith("eps") else "i32"
        signature[name] = "constexpr" if name in constants else (types or {}).get(name, plain)
        if pointer:
            attributes[(index,)] = [["tt.divisibility", 16]]
    asked = repr((target, kernel, signature, sorted(constants.items()), attributes, layout.options))
    if anew or asked not in _KNOWN:
        source = ASTSource(fn=function, signature=signature, constexprs=dict(constants), attrs=attributes)
        _KNOWN[asked] = triton.compile(source, target=target, options=layout.options)
    return _KNOWN[asked]


def check_waits_and_quotients(compiled: Any, target: GPUTarget, flashinfer: bool) -> None:
    """NVIDIA's code waits for its inputs once, from sm_90 on. Quotients are the approximate instructions that
    -use_fast_math gives FlashInfer, and rounded for any other scheme."""
    if target.backend != "cuda":
        return
    ptx = compiled.asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == (1 if int(target.arch) >= 90 else 0)
    assert [f"{word}.approx.ftz.f32" in ptx for word in ("div", "rcp")] == [flashinfer] * 2


@functools.cache
def _told(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def cuobjdump(compiled: Any, option: str) -> str:
    """What NVIDIA's tool says of the machine code."""
    return _told(compiled.asm["cubin"], option)


def usage(compiled: Any, what: str) -> int:
    """REG: registers a thread; STACK, LOCAL: bytes that it spills."""
    found = re.search(rf"{what}:(\d+)", cuobjdump(compiled, "--dump-resource-usage"))
    assert found is not None
    return int(found[1])
