"""The portable backend: Triton kernels for CUDA and ROCm devices, and for CPU tensors under TRITON_INTERPRET=1.

`bind(op, spec)` returns a callable with the signature of `ops.bind_*`. Per (dtype, N, weight dtype) it keeps the
schedule, the compile-time constants and the compiled kernel; per call it checks shapes, looks at strides and launches.
It calls the compiled kernel directly: `kernel[grid](...)` hashes two dozen arguments, most of a call's host cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...errors import UnsupportedInput
from ...numerics import operands
from ...numerics.contract import FUSED_ADD, IMPLIED_EPS, PLAIN_OPS, RMS_NORM
from ...numerics.spec import NormSpec
from ..bindings import by_variant
from . import loader, schedules

MINIMUM_CAPABILITY = (8, 0)
COMPILE_OPTIONS = {"enable_fp_fusion": True}
"""Of every kernel. Triton's own default follows its release and TRITON_DEFAULT_FP_FUSION: bits would follow them."""


def missing() -> str:
    """Why triton cannot be imported; "" if it can."""
    return loader.triton_missing()


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the Triton kernels run on `device`, and why not."""
    device = torch.device(device)
    reason = loader.triton_missing()
    if reason:
        return False, reason
    if device.type == "cpu":
        if loader.interpreting():
            return True, "the CPU interpreter (TRITON_INTERPRET=1)"
        return False, "CPU tensors need TRITON_INTERPRET=1"
    if device.type != "cuda":
        return False, f"no kernels for devices of type {device.type}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return False, f"needs sm_80 or newer, device has sm_{capability[0]}{capability[1]}"
    return True, ""


def bind(op: str, spec: NormSpec, dependent: bool | None = None) -> Callable[..., Any]:
    """The callable for `op`, the name of a row of `numerics.contract`, with the numerics of `spec`. dependent: as
    `launch_mode.decided` takes it."""
    return _bound(op, spec, dependent=dependent)


@by_variant
def _bound(op: str, spec: NormSpec, dependent: bool) -> Callable[..., Any]:
    row = PLAIN_OPS[op]
    fused = FusedAddRMSNormInPlace if row.in_place else FusedAddRMSNorm
    return (fused if row.fused_add else RMSNorm)(op, spec, dependent)


def warmup(
    op: str,
    spec: NormSpec,
    n: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    device: torch.device | str = "cuda",
    dependent: bool | None = None,
    residual_dtype: torch.dtype | None = None,
) -> None:
    """Compile what `op` needs for rows of `n` columns: one call on zeros; afterwards a CUDA graph can capture it.

    residual_dtype: None: that of `x`, `dtype`.
    """
    x = torch.zeros(2, n, dtype=dtype, device=device)
    weight = None if weight_dtype is None else torch.zeros(n, dtype=weight_dtype, device=device)
    added = [torch.zeros_like(x, dtype=residual_dtype) for _ in range(PLAIN_OPS[op].operands - 1)]
    bind(op, spec, dependent)(x, *added, weight, 1e-6)


class Rows(NamedTuple):
    """Where the rows of a tensor lie, in elements: row r starts at (r // inner) * stride + (r % inner) * inner_stride;
    `inner` is 1 where one stride is enough."""

    inner: int
    stride: int
    inner_stride: int


class Target(NamedTuple):
    """What the kernels must know of a device.

    packed: 16-bit rows stay 16-bit in registers (by PTX, so NVIDIA alone). dependent: a launch may start before the
    kernel in front of it has ended (sm_90 and newer, unless plain launches were asked for).
    """

    warp_size: int = 32
    packed: bool = False
    dependent: bool = False

    @classmethod
    def of(cls, device: torch.device, dependent: bool = True) -> Target:
        """Asks a GPU for its properties. dependent: False launches plainly whatever the device."""
        if device.type != "cuda":
            return cls()
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return cls(properties.warp_size)
        return cls.nvidia(properties.major, dependent)

    @classmethod
    def nvidia(cls, major: int, dependent: bool = True) -> Target:
        return cls(32, packed=True, dependent=dependent and major >= 9)


class Layout:
    """What one (dtype, N, weight dtype) fixes: the kernel's compile-time constants, and its compiled variants."""

    def __init__(
        self,
        op: str,
        spec: NormSpec,
        dtype: torch.dtype,
        n: int,
        weight_dtype: torch.dtype | None,
        target: Target,
    ) -> None:
        """dtype: of x, or of the sum where x is added to a residual of another dtype."""
        self.columns = spec.group or n
        """Elements that share one rstd: what the kernels call a row."""
        plain, halves = not PLAIN_OPS[op].fused_add, dtype.itemsize == 2
        self.wide_sum = halves and not plain and spec.sum == "fp32"
        """Whether what is kept of a 16-bit row is its fp32 sum."""
        kernel = (RMS_NORM if plain else FUSED_ADD).name
        self.schedule = schedules.schedule(kernel, self.columns, dtype.itemsize, target.warp_size, self.wide_sum)
        self.vec = schedules.vector_elements(self.columns, dtype.itemsize)
        self.nvidia = target.packed
        self.groups = n // self.columns
        dense = (self.columns // self.vec, 0)
        self.dense = (1, *dense), (1, *dense, *dense)
        """`inner` and strides of one and of two contiguous tensors, as the kernels take them."""
        self.out_dtype = spec.output_dtype(dtype, weight_dtype)
        rounded = spec.rounded_dtype(dtype, weight_dtype)
        product = rounded
        if weight_dtype is not None:
            product = torch.promote_types(rounded, torch.float32 if spec.weight_offset == "fp32" else weight_dtype)
        self.constants = {
            "N": self.columns,
            "WIDTH": spec.width or self.columns,
            "VEC": self.vec,
            "ROWS": self.schedule.rows,
            "BLOCK": self.schedule.block,
            "CHUNKS": self.schedule.chunks,
            "STREAMED": self.schedule.streamed,
            "AHEAD": self.schedule.ahead,
            "GROUPS": self.groups,
            "HAS_WEIGHT": weight_dtype is not None,
            "OFFSET": spec.weight_offset,
            "ROUNDED": triton_dtype(rounded),
            "PRODUCT": triton_dtype(product),
            "OUT": triton_dtype(self.out_dtype),
            "PACKED": target.packed and halves,
            "DEPENDENT": target.dependent,
            "PREFETCH": self.schedule.prefetch,
            "PREFETCH_WEIGHT": self.schedule.prefetch_weight,
        }
        if not plain:
            self.constants.update(BATCH=self.schedule.batch, LAUNCH_LATE=self.schedule.launch_late)
        self.options: dict[str, Any] = {"num_warps": self.schedule.num_warps, **COMPILE_OPTIONS}
        if target.dependent:
            self.options["launch_pdl"] = True
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


class _Op:
    """One op of one spec; subclasses are called like `ops.bind_*`."""

    def __init__(self, op: str, spec: NormSpec, dependent: bool) -> None:
        self.op = op
        self.spec = spec
        self.dependent = dependent
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def _layout(self, x: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> Layout:
        """dtype: as in Layout."""
        weight_dtype = None if weight is None else weight.dtype
        layout = Layout(self.op, self.spec, dtype, x.shape[-1], weight_dtype, Target.of(x.device, self.dependent))
        return self._layouts.setdefault((dtype, x.shape[-1:], weight_dtype, x.device), layout)

    def _launch(
        self,
        name: str,
        layout: Layout,
        tensors: tuple[torch.Tensor, ...],
        eps: float | None,
        numbers: tuple[int, ...],
        constants: dict[str, Any],
    ) -> None:
        """Launch on `tensors`' device and its current stream; `numbers` (rows, inner, strides) follow eps."""
        x = tensors[0]
        args = (*tensors, IMPLIED_EPS if eps is None else float(eps), *numbers)
        grid = (-(-numbers[0] // layout.schedule.rows), 1, 1)
        device = x.get_device()
        if x.is_cuda and torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return self._launch(name, layout, tensors, eps, numbers, constants)
        # What Triton specialises on: alignment (where the layout does not demand it) and the width of integers.
        aligned = layout.vec > 1 or tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        dtypes = x.dtype, tensors[1].dtype
        variant = (device, aligned, max(numbers) > 0x7FFFFFFF, dtypes, *constants.values())
        known = layout.compiled.get(variant)
        if known is not None:
            kernel, rest = known
            kernel[grid](*args, *rest, stream=torch._C._cuda_getCurrentRawStream(device))
            return None
        usable, reason = available(x.device)
        if not usable:
            raise UnsupportedInput(
                self.op,
                f"x on {x.device} for backend='triton': {reason}",
                "CUDA devices from sm_80 on and ROCm devices; CPU tensors under TRITON_INTERPRET=1",
                "use backend='auto', which takes the reference where no kernel runs",
            )
        module = loader.load(name, interpreted=not x.is_cuda)
        function = getattr(module, name)
        values = {**layout.constants, **constants}
        kernel = function[grid](*args, **values, **layout.options)
        if kernel is not None and max(numbers) <= 0x7FFFFFFF:
            layout.compiled[variant] = kernel, tuple(values[name] for name in function.arg_names[len(args) :])
        return None


class RMSNorm(_Op):
    """f(x, weight, eps) -> normed, contiguous. x: [..., N]; weight: [N] or None. Raises UnsupportedInput."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
        if not self.spec.has_weight:
            weight = None
        layout = self._layouts.get((x.dtype, x.shape[-1:], None if weight is None else weight.dtype, x.device))
        if layout is None or not operands.weight_fits(x, weight):
            operands.check_rms_norm(x, weight, self.spec, self.op)
            layout = self._layout(x, weight, x.dtype)
        y = new_result(x, layout.out_dtype)
        if not x.numel():
            return y
        places, nested = layout.dense[0], False
        if not _is_dense(layout, x):
            (x,), (rows,) = place_rows(layout, x)
            places, nested = (rows.inner, rows.stride // layout.vec, rows.inner_stride // layout.vec), rows.inner > 1
        tensors = (x, x if weight is None else aligned(weight, layout), y)
        numbers = (x.numel() // layout.columns, *places)
        self._launch(RMS_NORM.name, layout, tensors, eps, numbers, {"NESTED": nested})
        return y


class FusedAddRMSNorm(_Op):
    """f(x, residual, weight, eps) -> (normed, sum), of two dtypes too. Raises UnsupportedInput."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.spec.has_weight:
            weight = None
        dtype = operands.sum_dtype(x, residual)
        layout = self._layouts.get((dtype, x.shape[-1:], None if weight is None else weight.dtype, x.device))
        if layout is None or not (operands.weight_fits(x, weight) and operands.alike(x, residual)):
            operands.check_mixed_add(x, residual, weight, self.spec, self.op)
            layout = self._layout(x, weight, dtype)
        y = new_result(x, layout.out_dtype)
        total = new_result(x, dtype)
        if x.numel():
            self._run(layout, x, residual, weight, (y, total), eps)
        return y, total

    def _run(
        self,
        layout: Layout,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        outputs: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch; in place where `outputs` is None. Returns x and residual, or the copies that were taken of them."""
        places: tuple[int, ...] = layout.dense[1]
        nested = False
        if not (_is_dense(layout, x) and _is_dense(layout, residual)):
            (x, residual), rows = place_rows(layout, x, residual)
            strides = (stride // layout.vec for placed in rows for stride in placed[1:])
            places, nested = (rows[0].inner, *strides), rows[0].inner > 1
        tensors = (x, residual, x if weight is None else aligned(weight, layout), *(outputs or (x, residual)))
        constants = {
            "NESTED": nested,
            "ROUND_SUM": self.spec.sum == "rounded",
            "IN_PLACE": outputs is None,
        }
        numbers = (x.numel() // layout.columns, *places)
        self._launch(FUSED_ADD.name, layout, tensors, eps, numbers, constants)
        return x, residual


class FusedAddRMSNormInPlace(FusedAddRMSNorm):
    """f(x, residual, weight, eps) -> None; residual <- sum, x <- normed. Raises UnsupportedInput."""

    def __call__(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> None:
        if not self.spec.has_weight:
            weight = None
        operands.check_in_place(x, residual, weight, self.spec, self.op)
        if not x.numel():
            return
        layout = self._layouts.get((x.dtype, x.shape[-1:], None if weight is None else weight.dtype, x.device))
        if layout is None:
            layout = self._layout(x, weight, x.dtype)
        if layout.schedule.streamed and self.spec.sum == "fp32":
            # The kernel would overwrite the residual before other threads have read it a second time.
            normed, total = bind(FUSED_ADD.name, self.spec, self.dependent)(x, residual, weight, eps)
        else:
            normed, total = self._run(layout, x, residual, weight, None, eps)
        if normed is not x:
            x.copy_(normed)
        if total is not residual:
            residual.copy_(total)
        operands.count_write(x, residual)


def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def new_result(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, of the shape and on the device of `x`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _is_dense(layout: Layout, x: torch.Tensor) -> bool:
    """Contiguous and as aligned as the vector width needs: the usual case, decided without looking at strides."""
    return x.is_contiguous() and (layout.vec == 1 or x.data_ptr() % 16 == 0)


def place_rows(layout: Layout, *tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[Rows, ...]]:
    """The rows of each tensor with one common `inner`; a tensor that two strides cannot describe, or that is less
    aligned than its row length promises, is copied."""
    placed = [_rows(x, layout) for x in tensors]
    inner = max((rows.inner for rows in placed if rows is not None), default=1)
    result = []
    for x, rows in zip(tensors, placed, strict=True):
        if rows is None or (rows.inner != inner and rows.inner != 1):
            x, rows = x.clone(memory_format=torch.contiguous_format), Rows(1, layout.columns, 0)
        if rows.inner != inner:
            rows = Rows(inner, rows.stride * inner, rows.stride)
        result.append((x, rows))
    return tuple(x for x, _ in result), tuple(rows for _, rows in result)


def _rows(x: torch.Tensor, layout: Layout) -> Rows | None:
    if layout.vec > 1 and x.data_ptr() % 16:
        return None
    if x.is_contiguous():
        return Rows(1, layout.columns, 0)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    dims: list[tuple[int, int]] = []
    if layout.groups > 1:
        dims.append((layout.groups, layout.columns))
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


def aligned(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The weight, contiguous and as aligned as the layout's vectors are: a copy where it is not."""
    weight = weight.contiguous()
    return weight.clone() if layout.vec > 1 and weight.data_ptr() % 16 else weight
