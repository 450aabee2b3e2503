"""The ops on CUDA kernels: `bind(op, spec)` gives a callable that compiles what it needs on first use.

A call goes one of two ways. The plain case (contiguous tensors, known dtypes and N, this device current) is served by
launcher.c without Python code. Everything else comes to `Op.__call__`: it checks, copies what no kernel can address,
builds missing kernels, launches, and registers the plan for the next plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from ...backends.cuda.schedules import Config, Op, schedules, sm
from ...errors import KernelBuildError, UnsupportedInput
from ...numerics import operands as validate
from ...numerics.contract import FUSED_ADD, PLAIN_OPS
from ...numerics.spec import NormSpec
from .. import launch_mode
from ..bindings import kept
from . import driver, jit, launcher, nvrtc

MAX_ALIGN = 32
DLPACK_CUDA = 2
"""CUDA in DLPack's numbering of devices."""


@lru_cache(maxsize=64)
def available(device: torch.device | None = None) -> tuple[bool, str]:
    """Whether CUDA kernels can be built for this device (default: the current one), and why not."""
    if torch.version.hip is not None:
        return False, "an AMD device: CUDA kernels need an NVIDIA GPU"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    if nvrtc.find() is None:
        return False, "NVRTC is not installed (pip install nvidia-cuda-nvrtc)"
    arch = sm(torch.cuda.get_device_capability(device))
    if arch < 80:
        return False, f"needs sm_80 or newer, device has sm_{arch}"
    return True, ""


def bind(op: Op, spec: NormSpec, enable_pdl: bool | None = None) -> Callable[..., Any]:
    """f(x, weight, eps), or f(x, residual, weight, eps) for the fused ops; results as `ops.bind_*` documents them.
    enable_pdl: as `launch_mode.dependent` takes it.

    x, residual: [..., N], fp16/bf16/fp32 on one CUDA device, any strides; weight: [N] or None. Raises
    UnsupportedInput for what cannot be served and KernelBuildError where a kernel cannot be built or launched.
    """
    return _bound(op, spec.variant, launch_mode.dependent(enable_pdl))[1]


def table(op: Op, spec: NormSpec, enable_pdl: bool | None = None) -> object | None:
    """What launcher.c knows of the op, for `rewrite.native`; None where it is not launcher.c that serves."""
    bound, _ = _bound(op, spec.variant, launch_mode.dependent(enable_pdl))
    return bound.table if bound.functions.kind == "c" else None


def started_from_python(op: Op, spec: NormSpec) -> str:
    """Why it is not launcher.c that serves the op; "" if it is."""
    functions = _bound(op, spec.variant, launch_mode.dependent())[0].functions
    return functions.reason if functions.kind == "python" else ""


def warmup(
    op: Op,
    spec: NormSpec,
    n: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    device: torch.device | str = "cuda",
    enable_pdl: bool | None = None,
) -> None:
    """Compile and load every kernel that `op` uses for contiguous rows of `n` columns; launches nothing."""
    x = torch.empty(1, n, dtype=dtype, device=device)
    weight = None if weight_dtype is None or not spec.has_weight else torch.empty(n, dtype=weight_dtype, device=device)
    bound, _ = _bound(op, spec.variant, launch_mode.dependent(enable_pdl))
    validate.check_rms_norm(x, weight, spec, op)
    bound.prepare(x, weight)


@kept
def _bound(op: Op, spec: NormSpec, dependent: bool) -> tuple[BoundOp, Callable[..., Any]]:
    bound = BoundOp(op, spec, dependent)
    empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # Inductor's: skips the dispatcher
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    made = None
    if empty_strided is not None and exchange is not None:
        bound.functions = launcher.functions()
        made = bound.functions.make_callable(
            PLAIN_OPS[op].code,
            spec.has_weight,
            bound,
            torch.Tensor,
            torch.nn.Parameter,
            empty_strided,
            _wrote,
            exchange,
            DLPACK_CUDA,
        )
    if made is None:
        bound.functions = launcher.python_functions("torch before 2.10 lacks what launcher.c asks it for")
        made = bound.functions.make_callable(PLAIN_OPS[op].code, spec.has_weight, bound)
    bound.table, call = made
    return bound, call


def _wrote(x: torch.Tensor, residual: torch.Tensor) -> None:
    """Tell autograd's version counters that both were written, as any in-place op does."""
    for tensor in (x, residual):
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


@dataclass(frozen=True)
class Rows:
    """A tensor [..., N] as rows: row r starts at (r // inner) * outer + (r % inner) * stride elements (one level: inner
    is the number of rows)."""

    tensor: torch.Tensor
    stride: int
    inner: int
    outer: int

    @property
    def two_level(self) -> bool:
        return self.outer != 0


def rows_of(x: torch.Tensor) -> Rows:
    """The rows of `x`, of a contiguous copy where no kernel can address them in place."""
    n = x.shape[-1]
    if n > 1 and x.stride(-1) != 1:
        return rows_of(x.contiguous())
    levels: list[list[int]] = []  # [size, stride], outermost first, after merging what lies evenly
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if not levels:
        return Rows(x, n, 1, 0)
    if len(levels) == 1:
        return Rows(x, levels[0][1], levels[0][0], 0)
    if len(levels) == 2 and levels[0][1] != 0:
        return Rows(x, levels[1][1], levels[1][0], levels[0][1])
    return rows_of(x.contiguous())


def power_of_two(*values: int) -> int:
    """The largest power of two, at most MAX_ALIGN, that divides all of them."""
    bits = MAX_ALIGN
    for value in values:
        bits |= value
    return bits & -bits


class BoundOp:
    """One op and numerics variant, launched dependently or plainly; holds its kernels by (dtypes, N, device, alignment,
    addressing)."""

    def __init__(self, op: Op, spec: NormSpec, dependent: bool) -> None:
        self.op = op
        self.spec = spec
        self.dependent = dependent
        self.fused = PLAIN_OPS[op].fused_add
        self.in_place = PLAIN_OPS[op].in_place
        self._check_operands = PLAIN_OPS[op].check
        self.functions: launcher.Functions
        self.table: object = None
        self._kernels: dict[tuple[Any, ...], list[tuple[int, int]]] = {}

    def __repr__(self) -> str:
        return f"cuda_backend.BoundOp({self.op!r}, {self.spec!r}, dependent={self.dependent})"

    def __call__(self, x: torch.Tensor, *rest: Any) -> Any:
        residual = rest[0] if self.fused else None
        weight, eps = rest[-2:]
        weight = weight if self.spec.has_weight else None
        self._check(x, *((residual,) if self.fused else ()), weight)
        eps = self.default_eps(x.dtype) if eps is None else float(eps)
        if self.in_place and x.numel() and not (self._writable(x) and self._writable(residual)):
            return self._through_copies(x, residual, weight, eps)
        normed, total = self._outputs(x, residual, weight)
        if x.numel():
            self._launch(x, residual, weight, eps, normed, total)
        if self.in_place:
            _wrote(normed, total)  # type: ignore[arg-type]
            return None
        return (normed, total) if self.fused else normed

    def default_eps(self, x: torch.dtype) -> float:
        """What a call with eps=None adds."""
        return replace(self.spec, eps=None).resolve_eps(x)

    def _check(self, x: torch.Tensor, *others: torch.Tensor | None) -> None:
        self._check_operands(x, *others, self.spec, self.op)
        if not x.is_cuda:
            raise UnsupportedInput(
                self.op, f"x on {x.device}", "CUDA tensors for backend='cuda'", "use backend='auto' or 'reference'"
            )

    def _through_copies(self, x: torch.Tensor, residual: Any, weight: torch.Tensor | None, eps: float) -> None:
        normed, total = bind(FUSED_ADD.name, self.spec, self.dependent)(x, residual, weight, eps)
        residual.copy_(total)
        x.copy_(normed)

    def _rows(self, x: torch.Tensor) -> Rows:
        return rows_of(x if self.spec.group is None else x.unflatten(-1, (-1, self.spec.group)))

    def _writable(self, x: torch.Tensor | None) -> bool:
        """Whether the kernels can write a result to where `x` lies: they write rows of one level."""
        rows = self._rows(x)  # type: ignore[arg-type]
        return not rows.two_level and rows.tensor.data_ptr() == x.data_ptr()  # type: ignore[union-attr]

    def _outputs(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.in_place:
            return x, residual
        dtype = self.spec.output_dtype(x.dtype, None if weight is None else weight.dtype)
        normed = torch.empty(x.shape, dtype=dtype, device=x.device)
        return normed, torch.empty(x.shape, dtype=x.dtype, device=x.device) if self.fused else None

    def _launch(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        normed: torch.Tensor,
        total: torch.Tensor | None,
    ) -> None:
        columns = self.spec.group or x.shape[-1]
        m = x.numel() // columns
        rows = self._rows(x)
        other = self._rows(residual) if residual is not None else None
        if other is not None and rows.two_level and other.two_level and rows.inner != other.inner:
            other = self._rows(residual.contiguous())  # type: ignore[union-attr]
        two_level = rows.two_level or (other is not None and other.two_level)
        inner = rows.inner if rows.two_level or other is None else other.inner
        if weight is not None and not weight.is_contiguous():
            weight = weight.contiguous()
        size = x.element_size()
        written = (normed, total) if self.in_place else ()
        strides = [self._rows(tensor).stride for tensor in written] if written else [columns, columns]  # type: ignore[arg-type]
        offsets = [rows.tensor.data_ptr(), rows.stride * size, rows.outer * size]
        if other is not None:
            offsets += [other.tensor.data_ptr(), other.stride * size, other.outer * size]
        offsets += [normed.data_ptr() if normed.dtype == x.dtype else 0, *(stride * size for stride in strides)]
        align = power_of_two(*offsets)
        weight_align = power_of_two(weight.data_ptr()) if weight is not None else MAX_ALIGN
        chain = self._chain(x, weight, align, weight_align, two_level)
        handle = next((handle for last, handle in chain if m <= last), chain[-1][1])
        arguments = [
            rows.tensor.data_ptr(),
            0 if other is None else other.tensor.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            normed.data_ptr(),
            0 if total is None else total.data_ptr(),
            m,
            rows.stride,
            0 if other is None else other.stride,
            strides[0],
            strides[1],
        ]
        if two_level:
            arguments += [inner, _outer(rows, inner), 0 if other is None else _outer(other, inner)]
        index = x.get_device()
        code = self.functions.launch(handle, torch._C._cuda_getCurrentRawStream(index), eps, *arguments)
        if code:
            raise self._launch_error(code, x, chain)

    def _launch_error(self, code: int, x: torch.Tensor, chain: list[tuple[int, int]]) -> KernelBuildError:
        got = f"M={x.numel() // x.shape[-1]} rows" if code == launcher.TOO_MANY_ROWS else driver.error_name(code)
        return KernelBuildError(
            site=f"{self.op}: launch on {x.device}, x {tuple(x.shape)} {x.dtype}",
            got=got,
            supported="a grid of at most 2^31 - 1 blocks on a working device",
            next_step="split the call, or use backend='triton'; an error of an earlier kernel can surface here",
        )

    def _chain(
        self, x: torch.Tensor, weight: torch.Tensor | None, align: int, weight_align: int, two_level: bool
    ) -> list[tuple[int, int]]:
        """[(largest m, launcher handle)], ascending, for these types; compiled now if they are new."""
        n, index = self.spec.group or x.shape[-1], x.get_device()
        weight_dtype = None if weight is None else weight.dtype
        configs = configs_for(self.op, x.dtype, n, index)
        if not configs:
            raise KernelBuildError(
                site=f"{self.op}: N={n}, {x.dtype}",
                got=f"sm_{_capability(index)}",
                supported="see kernels/registry.toml",
                next_step="use backend='auto' or 'triton'",
            )
        vec, size = configs[0].vec, x.element_size()
        weight_size = size if weight is None else weight.element_size()
        align = min(align, vec * size)
        full_weight_align = min(vec * weight_size, MAX_ALIGN)
        weight_align = min(weight_align, full_weight_align)
        key = (x.dtype, weight_dtype, x.shape[-1], index, align, weight_align, two_level)
        chain = self._kernels.get(key)
        if chain is None:
            chain = self._build(configs, x, weight_dtype, align, weight_align, two_level)
            self._kernels[key] = chain
            if align == min(power_of_two(n * size), vec * size) and weight_align == full_weight_align:
                self._register(x, weight, chain[0][1], two_level)
        return chain

    def prepare(self, x: torch.Tensor, weight: torch.Tensor | None) -> list[tuple[int, int]]:
        """The kernels for contiguous rows like those of `x`, from an allocation of their own."""
        return self._chain(
            x, weight, power_of_two((self.spec.group or x.shape[-1]) * x.element_size()), MAX_ALIGN, False
        )

    def _build(
        self,
        configs: tuple[Config, ...],
        x: torch.Tensor,
        weight_dtype: torch.dtype | None,
        align: int,
        weight_align: int,
        two_level: bool,
    ) -> list[tuple[int, int]]:
        index, n = x.get_device(), self.spec.group or x.shape[-1]
        chain: list[tuple[int, int]] = []
        following = 0
        for config in reversed(configs):
            build = jit.Build(
                config=config,
                spec=self.spec,
                fused_add=self.fused,
                n=n,
                weight_rows=x.shape[-1] // n,
                x_dtype=x.dtype,
                weight_dtype=weight_dtype,
                align=align,
                weight_align=weight_align,
                two_level=two_level,
                arch=_capability(index),
            )
            function = _function(build, index)
            following = self.functions.new_kernel(
                function,
                driver.primary_context(index),
                n,
                config.m[1],
                config.rows_per_cta,
                config.cluster,
                config.threads,
                int(self.dependent and build.arch >= 90),
                align,
                weight_align,
                following,
            )
            chain.insert(0, (config.m[1], following))
        return chain

    def _register(self, x: torch.Tensor, weight: torch.Tensor | None, handle: int, two_level: bool) -> None:
        """Let launcher.c serve such calls from now on, rows as aligned as contiguous ones are."""
        weight_dtype = None if weight is None else weight.dtype
        # A two-level kernel belongs to the plan of contiguous rows.
        one_level = self.prepare(x, weight)[0][1] if two_level else handle
        self.functions.add_plan(
            self.table,
            one_level,
            handle if two_level else 0,
            x.dtype,
            weight_dtype,
            self.spec.output_dtype(x.dtype, weight_dtype),
            x.shape[-1],
            x.get_device(),
            x.element_size(),
            0 if weight is None else weight.element_size(),
            self.default_eps(x.dtype),
            launcher.dlpack_code(x.dtype),
            launcher.dlpack_code(weight_dtype),
        )


def _outer(rows: Rows, inner: int) -> int:
    return rows.outer if rows.two_level else rows.stride * inner


@lru_cache(maxsize=64)
def _capability(index: int) -> int:
    return sm(torch.cuda.get_device_capability(index))


@kept
def configs_for(op: Op, x_dtype: torch.dtype, n: int, index: int) -> tuple[Config, ...]:
    """The schedules of `op` for rows of `n` columns on device `index`; empty where no kernel serves them."""
    return schedules(op, x_dtype, n, _capability(index), torch.cuda.get_device_name(index))


@cache
def _function(build: jit.Build, device: int) -> int:
    """Address of the loaded kernel on this device; the same for every op that needs the same build."""
    site = f"kernels/cuda/{build.config.source} on cuda:{device} (sm_{build.arch})"
    code = jit.machine_code(build)
    return driver.load(code, build.config.entry, device, site, build.config.cluster)
