"""Triton kernels compiled ahead of time for devices that are not here. The caller says where Triton keeps its cache."""

from __future__ import annotations

import re
import subprocess
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


def compiled(
    target: GPUTarget,
    kernel: str,
    layout: Layout,
    constants: Mapping[str, Any],
    dtype: torch.dtype,
    types: Mapping[str, str] | None = None,
) -> Any:
    """A kernel with these compile-time constants. Pointers are aligned and to `dtype`, each eps is fp32 and every other
    number int32, where `types` does not say otherwise."""
    function = getattr(loader.load(kernel, interpreted=False), kernel)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        pointer = name.endswith("_ptr")
        plain = f"*{NAMES[dtype]}" if pointer else "fp32" if name.endswith("eps") else "i32"
        signature[name] = "constexpr" if name in constants else (types or {}).get(name, plain)
        if pointer:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=dict(constants), attrs=attributes)
    return triton.compile(source, target=target, options=layout.options)


def check_waits_and_quotients(compiled: Any, target: GPUTarget, flashinfer: bool) -> None:
    """NVIDIA's code waits for its inputs once, from sm_90 on. Quotients are the approximate instructions that
    -use_fast_math gives FlashInfer, and rounded for any other scheme."""
    if target.backend != "cuda":
        return
    ptx = compiled.asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == (1 if int(target.arch) >= 90 else 0)
    assert [f"{word}.approx.ftz.f32" in ptx for word in ("div", "rcp")] == [flashinfer] * 2


def cuobjdump(compiled: Any, folder: Path, option: str) -> str:
    """What NVIDIA's tool says of the machine code, which is put into `folder`."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def usage(compiled: Any, folder: Path, what: str) -> int:
    """REG: registers a thread; STACK, LOCAL: bytes that it spills."""
    found = re.search(rf"{what}:(\d+)", cuobjdump(compiled, folder, "--dump-resource-usage"))
    assert found is not None
    return int(found[1])
