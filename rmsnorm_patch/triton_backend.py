"""The portable backend: Triton kernels for CUDA and ROCm devices, and for CPU tensors under TRITON_INTERPRET=1.

`bind(op, spec)` returns a callable with the signature of `ops.bind_*`. Per (dtype, N, weight dtype) it keeps the
schedule and the compile-time constants; per call it checks shapes, looks at strides and launches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from . import triton_loader, validate
from .errors import UnsupportedInput
from .semantics import NormSpec

MINIMUM_CAPABILITY = (8, 0)
_IMPLIED_EPS = NormSpec(eps=None).resolve_eps(torch.float32)


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the Triton kernels run on `device`, and why not."""
    device = torch.device(device)
    reason = triton_loader.triton_missing()
    if reason:
        return False, reason
    if device.type == "cpu":
        if triton_loader.interpreting():
            return True, "the CPU interpreter (TRITON_INTERPRET=1)"
        return False, "CPU tensors need TRITON_INTERPRET=1"
    if device.type != "cuda":
        return False, f"no kernels for devices of type {device.type}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return False, f"needs sm_80 or newer, device has sm_{capability[0]}{capability[1]}"
    return True, ""


def bind(op: str, spec: NormSpec) -> Callable[..., Any]:
    """The callable for `op` ("rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_") with the numerics of `spec`."""
    return _bind(op, spec.variant)


@cache
def _bind(op: str, spec: NormSpec) -> Callable[..., Any]:
    return {"rms_norm": RMSNorm, "fused_add_rms_norm": FusedAddRMSNorm}.get(op, FusedAddRMSNormInPlace)(op, spec)


def warmup(
    op: str,
    spec: NormSpec,
    n: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    device: torch.device | str = "cuda",
) -> None:
    """Compile what `op` needs for rows of `n` columns: one call on zeros; afterwards a CUDA graph can capture it."""
    x = torch.zeros(2, n, dtype=dtype, device=device)
    weight = None if weight_dtype is None else torch.zeros(n, dtype=weight_dtype, device=device)
    operands = (x,) if op == "rms_norm" else (x, torch.zeros_like(x))
    bind(op, spec)(*operands, weight, 1e-6)


class Rows(NamedTuple):
    """Where the rows of a tensor lie, in elements: row r starts at (r // inner) * stride + (r % inner) * inner_stride;
    `inner` is 1 where one stride is enough."""

    inner: int
    stride: int
    inner_stride: int


class Layout(NamedTuple):
    """Compile-time constants of one (dtype, N, weight dtype), and what the host must know of them."""

    columns: int
    vec: int
    rows_per_program: int
    long: bool
    constants: dict[str, Any]
    out_dtype: torch.dtype


class _Op:
    def __init__(self, op: str, spec: NormSpec) -> None:
        self.op = op
        self.spec = spec
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def _layout(self, x: torch.Tensor, weight: torch.Tensor | None) -> Layout:
        key = (x.dtype, x.shape[-1], None if weight is None else weight.dtype)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = make_layout(self.spec, *key, warp_size=_warp_size(x.device))
        return layout

    def _launch(
        self, name: str, x: torch.Tensor, layout: Layout, num_rows: int, args: tuple[Any, ...], **constants: Any
    ) -> None:
        if not x.is_cuda and not triton_loader.interpreting():
            raise UnsupportedInput(
                self.op,
                f"x on {x.device} for backend='triton'",
                "CUDA and ROCm tensors; CPU tensors under TRITON_INTERPRET=1",
                "use backend='auto', which runs the reference on a CPU",
            )
        module = triton_loader.load(name, interpreted=not x.is_cuda)
        kernel = getattr(module, f"{name}_long" if layout.long else name)
        grid = (-(-num_rows // layout.rows_per_program), 1, 1)
        if x.is_cuda and torch.cuda.current_device() != x.get_device():
            with torch.cuda.device(x.get_device()):
                kernel[grid](*args, **layout.constants, **constants)
        else:
            kernel[grid](*args, **layout.constants, **constants)


class RMSNorm(_Op):
    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
        if not self.spec.has_weight:
            weight = None
        validate.check_rms_norm(x, weight, self.spec, self.op)
        layout = self._layout(x, weight)
        y = torch.empty(x.shape, dtype=layout.out_dtype, device=x.device)
        num_rows = x.numel() // layout.columns
        if num_rows == 0:
            return y
        (x,), (rows,) = place_rows(layout, self.spec, x)
        weight = _aligned(weight, layout)
        eps = _IMPLIED_EPS if eps is None else float(eps)
        args = (x, x if weight is None else weight, y, eps, num_rows, rows.inner)
        strides = (rows.stride // layout.vec, rows.inner_stride // layout.vec)
        self._launch("rms_norm", x, layout, num_rows, args + strides, NESTED=rows.inner > 1)
        return y


class FusedAddRMSNorm(_Op):
    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.spec.has_weight:
            weight = None
        validate.check_fused_add(x, residual, weight, self.spec, self.op)
        layout = self._layout(x, weight)
        y = torch.empty(x.shape, dtype=layout.out_dtype, device=x.device)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            self._run(layout, x, residual, weight, y, total, eps)
        return y, total

    def _run(
        self,
        layout: Layout,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        y: torch.Tensor | None,
        total: torch.Tensor | None,
        eps: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch; without `y` and `total` in place. Returns x and residual, or the copies that were taken of them."""
        num_rows = x.numel() // layout.columns
        (x, residual), (x_rows, residual_rows) = place_rows(layout, self.spec, x, residual)
        weight = _aligned(weight, layout)
        eps = _IMPLIED_EPS if eps is None else float(eps)
        in_place = y is None
        args = (x, residual, x if weight is None else weight, x if y is None else y)
        args += (residual if total is None else total, eps, num_rows, x_rows.inner)
        args += tuple(stride // layout.vec for rows in (x_rows, residual_rows) for stride in rows[1:])
        constants = {"NESTED": x_rows.inner > 1, "ROUND_SUM": self.spec.sum == "rounded", "IN_PLACE": in_place}
        self._launch("fused_add_rms_norm", x, layout, num_rows, args, **constants)
        return x, residual


class FusedAddRMSNormInPlace(FusedAddRMSNorm):
    def __call__(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> None:
        if not self.spec.has_weight:
            weight = None
        validate.check_in_place(x, residual, weight, self.spec, self.op)
        if not x.numel():
            return
        layout = self._layout(x, weight)
        if layout.long and self.spec.sum == "fp32":
            # The long kernel would overwrite the residual before other threads have read it a second time.
            normed, total = bind("fused_add_rms_norm", self.spec)(x, residual, weight, eps)
        else:
            normed, total = self._run(layout, x, residual, weight, None, None, eps)
        if normed is not x:
            x.copy_(normed)
        if total is not residual:
            residual.copy_(total)


def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def make_layout(
    spec: NormSpec, dtype: torch.dtype, n: int, weight_dtype: torch.dtype | None, warp_size: int = 32
) -> Layout:
    """Schedule and compile-time constants for rows of `n` elements of `dtype`."""
    schedules = triton_loader.load("schedule", interpreted=False)
    columns = spec.group or n
    schedule = schedules.schedule(columns, dtype.itemsize, warp_size)
    vec = schedules.vector_elements(columns, dtype.itemsize)
    out_dtype = spec.output_dtype(dtype, weight_dtype)
    rounded = spec.rounded_dtype(dtype, weight_dtype)
    product = rounded
    if weight_dtype is not None:
        product = torch.promote_types(rounded, torch.float32 if spec.weight_offset == "fp32" else weight_dtype)
    constants = {
        "N": columns,
        "WIDTH": spec.width or columns,
        "VEC": vec,
        "ROWS": schedule.rows,
        "BLOCK": schedule.block,
        "CHUNKS": schedule.chunks,
        "GROUPED": spec.group is not None and weight_dtype is not None,
        "HAS_WEIGHT": weight_dtype is not None,
        "OFFSET": spec.weight_offset,
        "ROUNDED": triton_dtype(rounded),
        "PRODUCT": triton_dtype(product),
        "OUT": triton_dtype(out_dtype),
        "num_warps": schedule.num_warps,
    }
    return Layout(columns, vec, schedule.rows, schedule.long, constants, out_dtype)


def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def place_rows(
    layout: Layout, spec: NormSpec, *tensors: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[Rows, ...]]:
    """The rows of each tensor with one common `inner`; a tensor that two strides cannot describe, or that is less
    aligned than its row length promises, is copied."""
    placed = [_rows(x, layout, spec) for x in tensors]
    inner = max((rows.inner for rows in placed if rows is not None), default=1)
    result = []
    for x, rows in zip(tensors, placed, strict=True):
        if rows is None or (rows.inner != inner and rows.inner != 1):
            x = x.contiguous().clone() if x.is_contiguous() else x.contiguous()
            rows = Rows(1, layout.columns, 0)
        if rows.inner != inner:
            rows = Rows(inner, rows.stride * inner, rows.stride)
        result.append((x, rows))
    return tuple(x for x, _ in result), tuple(rows for _, rows in result)


def _rows(x: torch.Tensor, layout: Layout, spec: NormSpec) -> Rows | None:
    if layout.vec > 1 and x.data_ptr() % 16:
        return None
    if x.is_contiguous():
        if spec.group is None or spec.group == x.shape[-1]:
            return Rows(1, layout.columns, 0)
        return Rows(x.shape[-1] // spec.group, x.shape[-1], spec.group)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    dims: list[tuple[int, int]] = []
    if spec.group is not None and spec.group != x.shape[-1]:
        dims.append((x.shape[-1] // spec.group, spec.group))
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    if len(dims) > 2 or any(stride % layout.vec for _, stride in dims):
        return None
    if len(dims) == 2:
        return Rows(dims[0][0], dims[1][1], dims[0][1])
    return Rows(1, dims[0][1] if dims else layout.columns, 0)


def _aligned(weight: torch.Tensor | None, layout: Layout) -> torch.Tensor | None:
    if weight is None:
        return None
    weight = weight.contiguous()
    return weight.clone() if layout.vec > 1 and weight.data_ptr() % 16 else weight
