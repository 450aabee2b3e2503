"""The norm as one would write it first, in CUDA: three kernels, each with a round trip through memory.

A provider of `rmsnorm-patch bench-kernels` and of profile_counts: `naive=benchlib.naive:rms_norm`.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from rmsnorm_patch.backends.cuda import driver, nvrtc

SOURCE = Path(__file__).with_suffix(".cu")
KERNELS = ("naive_block_sums", "naive_rms", "naive_scale")
THREADS = 256
"""Of a block, and what the source says."""


@lru_cache(maxsize=8)
def _kernels(index: int) -> dict[str, ctypes.c_void_p]:
    """The functions of the source on a device, by name."""
    major, minor = torch.cuda.get_device_capability(index)
    code = nvrtc.compile_source(SOURCE.name, SOURCE.read_text(), {}, (f"--gpu-architecture=sm_{major}{minor}",))
    return {name: ctypes.c_void_p(driver.load(code, name, index, SOURCE.name)) for name in KERNELS}


def _start(name: str, grid: tuple[int, int], *arguments: torch.Tensor | int | float) -> None:
    """One launch on the current stream."""
    index = torch.cuda.current_device()
    held = [_argument(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(argument) for argument in held))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    dimensions = (*grid, 1, THREADS, 1, 1)
    code = driver.library().cuLaunchKernel(_kernels(index)[name], *dimensions, 0, stream, pointers, None)
    driver.check(code, "cuLaunchKernel", name)


def _argument(value: torch.Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [M, N], weight [N], both fp32 and contiguous -> x / sqrt(mean(x^2) + eps) * weight, [M, N]."""
    m, n = x.shape
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise NotImplementedError(f"the naive kernels take fp32, got {x.dtype} and {weight.dtype}")
    blocks = -(-n // THREADS)
    sums, rms, out = x.new_empty(m, blocks), x.new_empty(m), torch.empty_like(x)
    _start("naive_block_sums", (blocks, m), x, sums, n)
    _start("naive_rms", (m, 1), sums, rms, blocks, n, eps)
    _start("naive_scale", (blocks, m), x, weight, rms, out, n)
    return out
