"""launcher.c on the CPU: a driver that computes (cpu_driver.c), and kernels for it."""

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
from rmsnorm_patch.fused.norm_add import kernel as norm_add
from rmsnorm_patch.fused.query_key_norm.kernel import TWO_NORMS, BoundPair
from rmsnorm_patch.fused.query_key_norm.rotated import ROTATED, BoundRotated
from rmsnorm_patch.numerics.spec import NormSpec

FUNCTION, TWO_SETS, ROTATED_SETS, CONTEXT = 0x7000, 0x7003, 0x7004, 1
PLAIN = jit.source_of("rms_norm_rows.cu").arguments
PAIR = jit.source_of("rms_norm_pair.cu").arguments
TURNED = jit.source_of("rms_norm_rotated.cu").arguments


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
    """launcher.c's table of `op`, with a kernel for fp32 rows of `n` columns."""
    bound, _ = cuda_backend._bound(op, spec, dependent=True)
    _add_row_kind(bound, bound.functions.new_kernel(FUNCTION, CONTEXT, n, 2**63 - 1, 1, 1, 32, 0, 4, 4, 0, PLAIN), n)
    return bound.table


def _add_row_kind(bound: Any, handle: int, n: int) -> None:
    fp32 = torch.float32
    code = launcher.dlpack_code(fp32)
    bound.functions.add_row_kind(bound.table, handle, 0, fp32, fp32, fp32, n, 0, 4, 4, 1e-6, code, code)


class _NoSlowPath:
    """What launcher.c would hand a call to that it is not sure of."""

    def __init__(self, functions: launcher.Functions) -> None:
        self.functions = functions
        self.table: object = None


def norm_add_table(op: str, spec: NormSpec, n: int) -> Any:
    """The same of an op of `fused.norm_add`."""
    code = norm_add.CODES[op]
    bound, _ = cuda_backend.started(code, spec, _NoSlowPath)
    arguments, which = jit.source_of("rms_norm_add.cu").arguments, FUNCTION + code - 2
    handle = bound.functions.new_kernel(which, CONTEXT, n, 2**63 - 1, 1, 1, 32, 0, 4, 4, 0, arguments)
    _add_row_kind(bound, handle, n)
    return bound.table


def table_of_two(spec: NormSpec, n: int) -> Any:
    """The same for the norms of a query and a key, in rows of one level and of two."""
    bound, _ = cuda_backend.started(TWO_NORMS, spec, lambda functions: BoundPair(spec, True, functions))
    return _two_levels(bound, (TWO_SETS, TWO_SETS), PAIR, n)


def table_of_rotated(spec: NormSpec, n: int) -> Any:
    """The same with their rotation."""
    bound, _ = cuda_backend.started(ROTATED, spec, lambda functions: BoundRotated(spec, True, functions))
    return _two_levels(bound, (ROTATED_SETS, ROTATED_SETS + 1), TURNED, n)


def _two_levels(bound: Any, of: tuple[int, int], arguments: Any, n: int) -> Any:
    """of: the functions for rows of one level and of two."""
    one, two = (
        bound.functions.new_kernel(function, CONTEXT, n, 2**63 - 1, 1, 1, 32, 0, 4, 4, 0, arguments) for function in of
    )
    code, fp32 = launcher.dlpack_code(torch.float32), torch.float32
    bound.functions.add_row_kind(bound.table, one, two, fp32, fp32, fp32, n, 0, 4, 4, 1e-6, code, code)
    return bound.table


def held(watched: Iterable[object], collect_garbage: Callable[[], None]) -> tuple[int, list[int]]:
    """How many objects there are, and how many references to each of `watched`."""
    collect_garbage()
    return len(gc.get_objects()), [sys.getrefcount(each) for each in watched]
