"""launcher.c on the CPU: a driver that computes (cpu_driver.c), and plans for it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import jit, launcher
from rmsnorm_patch.fused.query_key_norm.kernel import TWO_NORMS, BoundPair
from rmsnorm_patch.numerics.spec import NormSpec

FUNCTION, TWO_SETS, CONTEXT = 0x7000, 0x7001, 1
PLAIN = jit.source_of("rms_norm_rows.cu").arguments
PAIR = jit.source_of("rms_norm_pair.cu").arguments


class Driver:
    """What the driver at `path` has launched since this was made."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.eps_of.restype = ctypes.c_float
        self.library.set_result(0)
        self.before = self.library.launched()

    @property
    def launches(self) -> int:
        return self.library.launched() - self.before

    def eps(self) -> list[float]:
        return [self.library.eps_of(self.before + i) for i in range(self.launches)]


def table_of(op: Any, spec: NormSpec, n: int) -> Any:
    """launcher.c's table of `op`, with a plan for fp32 rows of `n` columns."""
    bound, _ = cuda_backend._bound(op, spec, enable_pdl=True)
    functions, fp32 = bound.functions, torch.float32
    handle = functions.new_kernel(FUNCTION, CONTEXT, n, 2**63 - 1, 1, 1, 32, 0, 4, 4, 0, PLAIN)
    code = launcher.dlpack_code(fp32)
    functions.add_plan(bound.table, handle, 0, fp32, fp32, fp32, n, 0, 4, 4, 1e-6, code, code)
    return bound.table


def table_of_two(spec: NormSpec, n: int) -> Any:
    """The same for the norms of a query and a key, in rows of one level and of two."""
    functions, fp32 = launcher.functions(), torch.float32
    bound = BoundPair(spec, True, functions)
    made = cuda_backend.made_in_c(TWO_NORMS, spec, bound)
    assert made is not None
    handle = functions.new_kernel(TWO_SETS, CONTEXT, n, 2**63 - 1, 1, 1, 32, 0, 4, 4, 0, PAIR)
    code = launcher.dlpack_code(fp32)
    functions.add_plan(made[0], handle, handle, fp32, fp32, fp32, n, 0, 4, 4, 1e-6, code, code)
    return made[0]


def held(watched: Iterable[object], collect_garbage: Callable[[], None]) -> tuple[int, list[int]]:
    """How many objects there are, and how many references to each of `watched`."""
    collect_garbage()
    return len(gc.get_objects()), [sys.getrefcount(each) for each in watched]
