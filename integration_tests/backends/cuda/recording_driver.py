"""What tests of the launcher share: a driver that writes down what it is handed, and an op over it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from rmsnorm_patch.backends.cuda import arguments, jit, launcher
from rmsnorm_patch.numerics.contract import PLAIN_OPS

N = 64
BF16 = torch.bfloat16
PLAIN = jit.source_of("rms_norm_rows.cu").arguments
PAIR = jit.source_of("rms_norm_pair.cu").arguments
ROTATED = jit.source_of("rms_norm_rotated.cu").arguments
PARTIALS = jit.source_of("rms_norm_partials.cu").arguments
LAUNCH = "grid block shared_bytes count id0 value0 id1 value1 stream function launches pushes".split()  # noqa: SIM905
STREAM, FUNCTION, CONTEXT = 0x5000, 0x7000, 1
CLUSTER, PROGRAMMATIC = 4, 6
DLPACK_CPU = 1


class Driver:
    """The recording driver: `last` is the latest launch by field name."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.recorded.restype = ctypes.c_int64
        self.library.recorded_arguments.restype = ctypes.c_void_p
        self.library.set_context.argtypes = [ctypes.c_int64]

    def expect(self, taken: arguments.Arguments) -> None:
        """What the kernels that are launched from now on declare."""
        self.arguments = taken
        self.library.expect(taken.size)

    @property
    def last(self) -> dict[str, float]:
        found = self.arguments.unpack(ctypes.string_at(self.library.recorded_arguments(), self.arguments.size))
        return {**found, **{name: self.library.recorded(i) for i, name in enumerate(LAUNCH)}}


def kernel(functions: launcher.Functions, **changes: Any) -> int:
    values = {
        "function": FUNCTION,
        "context": CONTEXT,
        "n": N,
        "m_max": 2**63 - 1,
        "rows_per_cta": 4,
        "cluster": 1,
        "threads": 256,
        "dependent": 1,
        "align": 16,
        "weight_align": 16,
        "next": 0,
        "arguments": PLAIN,
    }
    return functions.new_kernel(*{**values, **changes}.values())


class Op:
    """One op's callable over `functions`, for bf16 rows of N; `slow` collects what it was not sure of."""

    def __init__(self, functions: launcher.Functions, op: str, has_weight: bool = True, **known: int) -> None:
        self.slow_calls: list[tuple] = []
        self.bumped: list[tuple] = []

        def slow(*operands):
            self.slow_calls.append(operands)
            return "slow"

        self.table, self.call = functions.make_callable(
            PLAIN_OPS[op].code,
            has_weight,
            slow,
            torch.Tensor,
            torch.nn.Parameter,
            torch._C._dynamo.guards._empty_strided_cpu,
            lambda *tensors: self.bumped.append(tensors),
            torch.Tensor.__dlpack_c_exchange_api__,
            DLPACK_CPU,
        )
        self.functions = functions
        handle, two_level = known.pop("kernel", None) or kernel(functions), known.pop("two_level", 0)
        weight_dtype = BF16 if has_weight else None
        device = 0 if functions.kind == "c" else -1  # DLPack's index of the CPU, and torch's
        codes = launcher.dlpack_code(BF16), launcher.dlpack_code(weight_dtype)
        n = known.pop("n", N)
        functions.add_row_kind(self.table, handle, two_level, BF16, weight_dtype, BF16, n, device, 2, 2, 2.5, *codes)


def rows(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, N, dtype=BF16)


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(N, dtype=BF16))
