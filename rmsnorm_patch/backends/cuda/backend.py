"""The ops on CUDA kernels: `bind(op, spec)` gives a callable that compiles what it needs on first use.

A call goes one of two ways. The plain case (contiguous tensors, known dtypes and N, this device current) is served by
launcher.c without Python code. Everything else comes to `Op.__call__`: it checks, copies what no kernel can address,
builds missing kernels, launches, and tells the launcher of rows of that kind, for the next plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch

from ...errors import UnsupportedInput
from ...numerics import operands
from ...numerics.contract import FUSED_ADD, PLAIN_OPS
from ...numerics.spec import NormSpec
from ..bindings import by_variant
from . import launcher, nvrtc
from .kernel_set import Chain, KernelSet
from .rows import address_of, in_step, power_of_two, rows_of
from .schedules import Op, sm

DLPACK_CUDA = 2
"""CUDA in DLPack's numbering of devices."""
B = TypeVar("B", bound=Any)


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


def bind(op: Op, spec: NormSpec, dependent: bool | None = None) -> Callable[..., Any]:
    """f(x, weight, eps), or f(x, residual, weight, eps) for the fused ops; results as `ops.bind_*` documents them.
    dependent: as `launch_mode.decided` takes it.

    x, residual: [..., N], fp16/bf16/fp32 on one CUDA device, any strides; weight: [N] or None. Raises
    UnsupportedInput for what cannot be served and KernelBuildError where a kernel cannot be built or launched.
    """
    return _bound(op, spec, dependent=dependent)[1]


def table(op: Op, spec: NormSpec, dependent: bool | None = None) -> object | None:
    """What launcher.c knows of the op, for `rewrite.native`; None where it is not launcher.c that serves."""
    bound, _ = _bound(op, spec, dependent=dependent)
    return bound.table if bound.functions.kind == "c" else None


def started_from_python(op: Op, spec: NormSpec) -> str:
    """Why it is not launcher.c that serves the op; "" if it is."""
    functions = _bound(op, spec)[0].functions
    return functions.reason if functions.kind == "python" else ""


def warmup(
    op: Op,
    spec: NormSpec,
    n: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    device: torch.device | str = "cuda",
    dependent: bool | None = None,
) -> None:
    """Compile and load every kernel that `op` uses for contiguous rows of `n` columns; launches nothing."""
    x = torch.empty(1, n, dtype=dtype, device=device)
    weight = None if weight_dtype is None or not spec.has_weight else torch.empty(n, dtype=weight_dtype, device=device)
    bound, _ = _bound(op, spec, dependent=dependent)
    operands.check_rms_norm(x, weight, spec, op)
    bound.prepare(x, weight)


@by_variant
def _bound(op: Op, spec: NormSpec, dependent: bool) -> tuple[BoundOp, Callable[..., Any]]:
    return started(PLAIN_OPS[op].code, spec, lambda functions: BoundOp(op, spec, dependent, functions))


def started(code: int, spec: NormSpec, make: Callable[[launcher.Functions], B]) -> tuple[B, Callable[..., Any]]:
    """(what `make` makes for the launcher that starts its kernels, the callable that goes to it for all that launcher.c
    does not serve). code: the op's number in launcher.c. What is made gets its `table` here."""
    empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # Inductor's: skips the dispatcher
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    bound, made = None, None
    if empty_strided is not None and exchange is not None:
        bound = make(launcher.functions())
        made = bound.functions.make_callable(
            code,
            spec.has_weight,
            bound,
            torch.Tensor,
            torch.nn.Parameter,
            empty_strided,
            operands.count_write,
            exchange,
            DLPACK_CUDA,
        )
    if bound is None or made is None:
        bound = make(launcher.python_functions("torch before 2.10 lacks what launcher.c asks it for"))
        made = bound.functions.make_callable(code, spec.has_weight, bound)
    bound.table, call = made
    return bound, call


def default_eps(spec: NormSpec, x: torch.dtype) -> float:
    """What a call with eps=None adds."""
    return replace(spec, eps=None).resolve_eps(x)


class BoundOp:
    """One op and numerics variant, launched dependently or plainly, with its kernels and launcher.c's table of it."""

    def __init__(self, op: Op, spec: NormSpec, dependent: bool, functions: launcher.Functions) -> None:
        self.op = op
        self.spec = spec
        self.dependent = dependent
        self.fused = PLAIN_OPS[op].fused_add
        self.in_place = PLAIN_OPS[op].in_place
        self._check_operands = PLAIN_OPS[op].check
        self.functions = functions
        self.kernels = KernelSet(op, spec, dependent, self.fused, functions)
        self.table: object = None

    def __repr__(self) -> str:
        return f"BoundOp({self.op!r}, {self.spec!r}, dependent={self.dependent})"

    def __call__(self, x: torch.Tensor, *rest: Any) -> Any:
        residual = rest[0] if self.fused else None
        weight, eps = rest[-2:]
        weight = weight if self.spec.has_weight else None
        self._check(x, *((residual,) if self.fused else ()), weight)
        eps = default_eps(self.spec, x.dtype) if eps is None else float(eps)
        if self.in_place and x.numel() and not (self._writable(x) and self._writable(residual)):
            return self._through_copies(x, residual, weight, eps)
        normed, total = self._outputs(x, residual, weight)
        if x.numel():
            self._launch(x, residual, weight, eps, normed, total)
        if self.in_place:
            operands.count_write(normed, total)  # type: ignore[arg-type]
            return None
        return (normed, total) if self.fused else normed

    def _check(self, x: torch.Tensor, *others: torch.Tensor | None) -> None:
        self._check_operands(x, *others, self.spec, self.op)
        if not x.is_cuda:
            raise UnsupportedInput(
                self.op, f"x on {x.device}", "CUDA tensors for backend='cuda'", "use backend='auto' or 'reference'"
            )
        if self.fused and others[0] is not None and operands.mixes_dtypes(x, others[0]):
            raise UnsupportedInput(
                self.op,
                f"residual of dtype {others[0].dtype} and x of dtype {x.dtype}",
                "equal dtypes for backend='cuda'",
                "cast one of them, or use backend='auto', which takes Triton here",
            )

    def _through_copies(self, x: torch.Tensor, residual: Any, weight: torch.Tensor | None, eps: float) -> None:
        normed, total = bind(FUSED_ADD.name, self.spec, self.dependent)(x, residual, weight, eps)
        residual.copy_(total)
        x.copy_(normed)

    def _writable(self, x: torch.Tensor | None) -> bool:
        """Whether the kernels can write a result to where `x` lies: they write rows of one level."""
        rows = rows_of(x, self.spec.group)  # type: ignore[arg-type]
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
        step = in_step(x, residual, self.spec.group)
        rows, other = step.rows, step.other
        weight = None if weight is None else weight.contiguous()
        size = x.element_size()
        written = (normed, total) if self.in_place else ()
        strides = [rows_of(each, self.spec.group).stride for each in written] or [columns, columns]  # type: ignore[arg-type]
        offsets = [normed.data_ptr() if normed.dtype == x.dtype else 0, *(stride * size for stride in strides)]
        offsets += [*rows.offsets(size), *(() if other is None else other.offsets(size))]
        align, weight_align = power_of_two(*offsets), power_of_two(address_of(weight))
        chain = self.chain(x, weight, align, weight_align, step.two_level)
        self.kernels.launch(
            chain,
            (m,),
            x,
            x=rows.tensor.data_ptr(),
            residual=0 if other is None else other.tensor.data_ptr(),
            weight=address_of(weight),
            normed=normed.data_ptr(),
            total=address_of(total),
            m=m,
            x_row_stride=rows.stride,
            residual_row_stride=0 if other is None else other.stride,
            normed_row_stride=strides[0],
            total_row_stride=strides[1],
            inner_rows=step.inner_rows,
            x_outer_stride=step.outer_stride,
            residual_outer_stride=step.other_outer_stride,
            eps=eps,
        )

    def chain(
        self, x: torch.Tensor, weight: torch.Tensor | None, align: int, weight_align: int, two_level: bool
    ) -> Chain:
        """The kernels of a call; launcher.c serves the next plain one like it."""
        chain, plain = self.kernels.chain(x, weight, align, weight_align, two_level)
        if plain:
            add_row_kind(self.kernels, self.table, x, weight, chain, two_level)
        return chain

    def prepare(self, x: torch.Tensor, weight: torch.Tensor | None) -> Chain:
        """The kernels for contiguous rows like those of `x`, from an allocation of their own."""
        chain, plain = self.kernels.contiguous(x, weight)
        if plain:
            add_row_kind(self.kernels, self.table, x, weight, chain, False)
        return chain


def add_row_kind(
    kernels: KernelSet, table: object, x: torch.Tensor, weight: torch.Tensor | None, chain: Chain, two_level: bool
) -> None:
    """Let the launcher serve rows like those of `x`, as aligned as contiguous ones are, by the `chain` of the set from
    now on. two_level: its rows have two strides."""
    # A two-level kernel belongs to the same kind as contiguous rows.
    handle = chain.kernels[0].handle
    one_level = kernels.contiguous(x, weight)[0].kernels[0].handle if two_level else handle
    spec, weight_dtype = kernels.spec, None if weight is None else weight.dtype
    kernels.functions.add_row_kind(
        table,
        one_level,
        handle if two_level else 0,
        x.dtype,
        weight_dtype,
        spec.output_dtype(x.dtype, weight_dtype),
        x.shape[-1],
        x.get_device(),
        x.element_size(),
        0 if weight is None else weight.element_size(),
        default_eps(spec, x.dtype),
        launcher.dlpack_code(x.dtype),
        launcher.dlpack_code(weight_dtype),
    )
