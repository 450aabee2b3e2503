"""launcher.c without a C compiler: the driver's launch through ctypes, the checks of a plain call in Python.

A launch takes about twice the time of one from C; its structures are prepared once for each kernel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ....locks import Lock
from .. import driver
from ..arguments import Arguments

TOO_MANY_ROWS = 1000001
_FUSED_ADD_IN_PLACE = 2


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
_VALUES = {
    *("x", "residual", "weight", "normed", "total", "m"),
    *("x_row_stride", "residual_row_stride", "normed_row_stride", "total_row_stride"),
    *("inner_rows", "x_outer_stride", "residual_outer_stride", "eps"),
}
"""What a plain call knows, by the names that kernels/cuda/plain_ops.cuh gives the fields."""


class _Kernel:
    """One kernel with its launch structures; `lock` makes them safe to share between threads."""

    def __init__(self, values: tuple[int, ...], arguments: Arguments) -> None:
        (self.function, self.context, self.n, self.m_max, self.rows_per_cta, self.cluster, threads) = values[:7]
        self.dependent, self.align, self.weight_align, self.next = values[7:]
        self.arguments = arguments
        self.plain = set(arguments.names) <= _VALUES
        self.handle = 0
        self.lock = threading.Lock()
        self.bytes = ctypes.create_string_buffer(arguments.size)
        self.params = (ctypes.c_void_p * 1)(ctypes.addressof(self.bytes))
        self.attributes = (_Attribute * 2)()
        self.config = _Config(attributes=self.attributes)
        self.config.grid[:] = (1, 1, 1)
        self.config.block[:] = (threads, 1, 1)
        if self.cluster > 1:
            self._attribute(_CLUSTER, self.cluster, 1, 1)
        if self.dependent:
            self._attribute(_PROGRAMMATIC, 1)
        self.grid_x = ctypes.cast(ctypes.addressof(self.config), ctypes.POINTER(ctypes.c_uint))
        self.call = (ctypes.byref(self.config), ctypes.c_void_p(self.function), self.params, None)

    def _attribute(self, identity: int, *value: int) -> None:
        attribute = self.attributes[self.config.count]
        attribute.id = identity
        attribute.value[: len(value)] = value
        self.config.count += 1


@dataclass(frozen=True)
class _RowKind:
    handle: int
    out_dtype: torch.dtype
    default_eps: float


class PlainCall:
    """The op for contiguous tensors whose rows are of a known kind; everything else goes to `slow`."""

    def __init__(self, launch: Callable[..., int], op: int, has_weight: bool, slow: Callable[..., Any]) -> None:
        self.launch, self.has_weight, self.slow = launch, has_weight, slow
        self.fused, self.in_place = op > 0, op == _FUSED_ADD_IN_PLACE
        self.row_kinds: dict[tuple[torch.dtype, torch.dtype | None, int, int], _RowKind] = {}

    def __call__(self, *operands: Any) -> Any:
        # Whether what is written overlaps takes the slow path's closer look.
        if self.in_place or len(operands) != 3 + self.fused:
            return self.slow(*operands)
        x, residual = operands[0], operands[1] if self.fused else operands[0]
        weight, eps = operands[-2] if self.has_weight else None, operands[-1]
        shape, device = x.shape, x.get_device()
        if not shape or type(x) not in _PLAIN or type(residual) not in _PLAIN:
            return self.slow(*operands)
        row_kind = self.row_kinds.get((x.dtype, None if weight is None else weight.dtype, shape[-1], device))
        rows = x.numel() // (shape[-1] or 1)
        if (
            row_kind is None
            or rows == 0
            or not x.is_contiguous()
            or not residual.is_contiguous()
            or residual.shape != shape
            or residual.dtype != x.dtype
            or residual.get_device() != device
        ):
            return self.slow(*operands)
        address = 0
        if weight is not None:
            if (
                type(weight) not in _PLAIN
                or weight.shape != shape[-1:]
                or weight.get_device() != device
                or not weight.is_contiguous()
            ):
                return self.slow(*operands)
            address = weight.data_ptr()
        kernel = _kernels[row_kind.handle - 1]
        rows *= shape[-1] // kernel.n
        while rows > kernel.m_max and kernel.next:
            kernel = _kernels[kernel.next - 1]
        if (x.data_ptr() | residual.data_ptr()) & (kernel.align - 1) or address & (kernel.weight_align - 1):
            return self.slow(*operands)
        normed = torch.empty_like(x, dtype=row_kind.out_dtype)
        total = torch.empty_like(x) if self.fused else None
        values = {
            "x": x.data_ptr(),
            "residual": residual.data_ptr() if self.fused else 0,
            "weight": address,
            "normed": normed.data_ptr(),
            "total": 0 if total is None else total.data_ptr(),
            "m": rows,
            "x_row_stride": kernel.n,
            "residual_row_stride": kernel.n,
            "normed_row_stride": kernel.n,
            "total_row_stride": kernel.n,
            "inner_rows": 0,
            "x_outer_stride": 0,
            "residual_outer_stride": 0,
            "eps": row_kind.default_eps if eps is None else float(eps),
        }
        stream, groups = torch._C._cuda_getCurrentRawStream(device), -(-rows // kernel.rows_per_cta)
        code = self.launch(kernel.handle, stream, groups, kernel.arguments.pick(values))
        if code:
            return self.slow(*operands)
        return normed if total is None else (normed, total)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_kernels: list[_Kernel] = []
_LOCK = Lock()


def _followed(handle: int) -> Iterator[_Kernel]:
    """The kernel and those for more rows."""
    while handle:
        yield (kernel := _kernels[handle - 1])
        handle = kernel.next


def functions() -> tuple[Callable[..., Any], ...]:
    """(new_kernel, launch, make_callable, add_row_kind), as launcher.c has them."""
    library = driver.library()
    launch_kernel, get_context = library.cuLaunchKernelEx, library.cuCtxGetCurrent
    push, pop = library.cuCtxPushCurrent_v2, library.cuCtxPopCurrent_v2

    def new_kernel(*values: Any) -> int:
        *integers, arguments = values
        kernel = _Kernel(tuple(integers), arguments)
        with _LOCK:  # another thread may build one meanwhile, and each handle is one kernel's
            _kernels.append(kernel)
            kernel.handle = len(_kernels)
        return kernel.handle

    def launch(handle: int, stream: int, groups: int, arguments: bytes) -> int:
        kernel = _kernels[handle - 1]
        if groups == 0:
            return 0
        if groups * kernel.cluster > 2**31 - 1:
            return TOO_MANY_ROWS
        if len(arguments) != kernel.arguments.size:
            raise TypeError("the kernel's arguments have another size")
        current = ctypes.c_void_p()
        get_context(ctypes.byref(current))
        pushed = current.value != kernel.context
        if pushed and (code := push(ctypes.c_void_p(kernel.context))):
            return int(code)
        with kernel.lock:
            ctypes.memmove(kernel.bytes, arguments, len(arguments))
            kernel.config.stream = stream
            kernel.grid_x[0] = groups * kernel.cluster
            code = launch_kernel(*kernel.call)
        if pushed:
            pop(ctypes.byref(current))
        return int(code)

    def make_callable(op: int, has_weight: bool, slow: Callable[..., Any], *_: Any) -> tuple[PlainCall, ...]:
        call = PlainCall(launch, op, has_weight, slow)
        return call, call

    def add_row_kind(
        table: PlainCall,
        handle: int,
        two_level: int,
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None,
        out_dtype: torch.dtype,
        n: int,
        device: int,
        itemsize: int,
        weight_itemsize: int,
        default_eps: float,
        *codes: int,
    ) -> int:
        if not all(kernel.plain for kernel in _followed(handle)):
            return 0
        table.row_kinds.setdefault((dtype, weight_dtype, n, device), _RowKind(handle, out_dtype, default_eps))
        return 1

    return new_kernel, launch, make_callable, add_row_kind
