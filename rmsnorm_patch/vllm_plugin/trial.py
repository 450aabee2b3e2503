"""A kernel is trusted in a worker only after it has run there on the shape at hand and agreed with the reference.

A broken CUDA toolchain therefore costs a warning, not the engine: vLLM's own norm serves the call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from .. import ops
from ..backends.bindings import kept
from ..errors import RMSNormPatchError
from ..fused.norm_add import op as norm_add_op
from ..fused.norm_quantised import op as norm_quantised_op
from ..fused.silu_quantised import op as silu_op
from ..numerics.contract import PLAIN_OPS
from ..numerics.quantisation import FEW_ROWS, QuantSpec, rms_norm_quantised
from ..numerics.silu import Silu, silu_and_mul_quantised
from ..numerics.spec import SUPPORTED_DTYPES, NormSpec
from .log import warn_once

ROWS = (1, 3)
"""Rows of the trial calls: a schedule is compiled per row length, for all row counts of one reduction tree."""


_THREAD = threading.local()
"""Marked in the threads of trials: other threads serve forwards meanwhile."""


def is_trial() -> bool:
    """Whether this thread runs a trial, whose calls belong to no forward."""
    return getattr(_THREAD, "tries", False)


def _mark_thread() -> None:
    _THREAD.tries = True


def on_a_fresh_stack(op: str, run: Callable[..., str], *args: object) -> str:
    """What the trial `run` of an op says, run by a thread of its own.

    A compiler asks while it compiles, hundreds of calls deep and under modes of its own (fake tensors among them). A
    new thread has neither the calls nor the modes.
    """
    with ThreadPoolExecutor(1, f"trial of {op}", _mark_thread) as pool:
        return pool.submit(run, *args).result()


def declined(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, op: str) -> str:
    """Why a call with tensors like these is left to vLLM, or "". x and weight may be fake tensors."""
    return _declined(x.dtype, x.shape[-1], None if weight is None else weight.dtype, spec, op, x.device)


def any_declined(weight: torch.Tensor, dtype: torch.dtype, spec: NormSpec, names: Iterable[str]) -> bool:
    """Whether one of these ops of a norm with this weight, for rows of `dtype`, is left to vLLM."""
    x = torch.empty(0, weight.shape[-1], dtype=dtype, device=weight.device)
    return any(declined(x, weight if spec.has_weight else None, spec, op) for op in names)


@kept
def _declined(
    dtype: torch.dtype, n: int, weight_dtype: torch.dtype | None, spec: NormSpec, op: str, device: torch.device
) -> str:
    why = _why(dtype, n, weight_dtype, spec, op, device)
    if why:
        warn_once(f"{op} of {n} columns keeps vLLM's own norm: {why}")
    return why


def _why(
    dtype: torch.dtype, n: int, weight_dtype: torch.dtype | None, spec: NormSpec, op: str, device: torch.device
) -> str:
    if dtype not in SUPPORTED_DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, SUPPORTED_DTYPES))}"
    if weight_dtype not in (None, dtype):
        return f"weight of {weight_dtype} for input of {dtype}: vLLM's compiler fuses the weight's own arithmetic"
    if device.type == "cuda":
        return on_a_fresh_stack(op, _trial, dtype, n, weight_dtype, spec, op, device)
    return ""


def _trial(
    dtype: torch.dtype, n: int, weight_dtype: torch.dtype | None, spec: NormSpec, op: str, device: torch.device
) -> str:
    """Run the op on a few rows and hold it against the reference arithmetic."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    weight = None if weight_dtype is None else normal(n)
    row = PLAIN_OPS[op]
    for rows in ROWS:
        tensors = tuple(normal(rows, n) for _ in range(row.operands))
        again = tuple(tensor.clone() for tensor in tensors)
        try:
            got = row.results(ops.bind(op, spec)(*tensors, weight, 1e-6), tensors)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RMSNormPatchError, RuntimeError, OSError) as error:
            return f"its kernel does not run here ({error})"
        want = row.results(row.reference(*again, weight, spec, 1e-6), again)
        for left, right in zip(got, want, strict=True):
            if not torch.allclose(left.float(), right.float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6):
                return "its kernel disagrees with the reference on this device"
    return ""


def declined_norm_add(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, following: bool) -> str:
    """Why a norm of tensors like these stays apart from the add behind it, and from the norm of the sum where one is
    `following`; or "". x and weight may be fake tensors."""
    return _declined_norm_add(x.dtype, x.shape[-1], None if weight is None else weight.dtype, spec, following, x.device)


@kept
def _declined_norm_add(
    dtype: torch.dtype,
    n: int,
    weight_dtype: torch.dtype | None,
    spec: NormSpec,
    following: bool,
    device: torch.device,
) -> str:
    if device.type != "cuda":
        return ""
    op = norm_add_op.NORM_ADD_NORM if following else norm_add_op.NORM_ADD
    why = on_a_fresh_stack(op, _trial_norm_add, op, dtype, n, weight_dtype, spec, following, device)
    if why:
        warn_once(f"{op} of {n} columns stays apart: {why}")
    return why


def _trial_norm_add(
    op: str,
    dtype: torch.dtype,
    n: int,
    weight_dtype: torch.dtype | None,
    spec: NormSpec,
    following: bool,
    device: torch.device,
) -> str:
    """Run the op on a few rows and hold its bits against those of the separate ops."""
    bound, made = norm_add_op.bind(op, spec), torch.empty(0, n, dtype=dtype, device=device)
    weight = None if weight_dtype is None else torch.empty(n, dtype=weight_dtype, device=device)
    if why := bound.why_apart(made, weight):
        return why
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    weights = [None if weight_dtype is None else normal(n).to(weight_dtype) for _ in range(2)]
    for m in ROWS:
        x, residual = normal(m, n), normal(m, n)
        try:
            results = bound(x, residual, weights[0], 1e-6, *((weights[1], 1e-5) if following else ()))
            want = bound.fused(bound.plain(x, weights[0], 1e-6), residual, weights[1], 1e-5)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RMSNormPatchError, RuntimeError, OSError) as error:
            return f"its kernel does not run here ({error})"
        if not all(
            torch.equal(*pair)
            for pair in zip(results if following else (results,), want[-1 - following :], strict=True)
        ):
            return "its kernel disagrees with the separate ones on this device"
    return ""


def declined_quantised(
    x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, quant: QuantSpec, adds: bool, bounded: bool
) -> str:
    """Why no kernel writes quantised rows of tensors like these, or "". x and weight may be fake tensors; bounded: a
    scale or an upper bound is given."""
    weight_dtype = None if weight is None else weight.dtype
    return _declined_quantised(x.dtype, x.shape[-1], weight_dtype, spec, quant, adds, bounded, x.device)


@kept
def _declined_quantised(
    dtype: torch.dtype,
    n: int,
    weight_dtype: torch.dtype | None,
    spec: NormSpec,
    quant: QuantSpec,
    adds: bool,
    bounded: bool,
    device: torch.device,
) -> str:
    if spec.group is not None:
        return "the norm is one over groups"
    if device.type != "cuda":
        return ""
    op = norm_quantised_op.FUSED if adds else norm_quantised_op.PLAIN
    why = on_a_fresh_stack(op, _trial_quantised, op, dtype, n, weight_dtype, spec, quant, bounded, device)
    if why:
        warn_once(f"{op} of {n} columns, {quant.scheme}, is left to vLLM: {why}")
    return why


def _trial_quantised(
    op: str,
    dtype: torch.dtype,
    n: int,
    weight_dtype: torch.dtype | None,
    spec: NormSpec,
    quant: QuantSpec,
    bounded: bool,
    device: torch.device,
) -> str:
    """Run the op on a few rows and hold it against the definition; an rstd may differ in its last bits."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    weight = None if weight_dtype is None else normal(n)
    given = torch.full((1,), 0.02, device=device) if bounded else None
    for m in (*ROWS, FEW_ROWS) if quant.arithmetic == "by_rows" else ROWS:
        x, residual = normal(m, n), normal(m, n) if op == norm_quantised_op.FUSED else None
        want = rms_norm_quantised(x, residual, weight, spec, quant, 1e-6, given)
        tensors = (x,) if residual is None else (x, residual)
        rest = (*ops.spec_args(spec), *norm_quantised_op.quant_args(quant, both=True))
        try:
            run = getattr(torch.ops.rmsnorm_patch, op).default
            got = run(*tensors, weight, given, quant.scheme, 1e-6, *rest)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RMSNormPatchError, RuntimeError, OSError) as error:
            return f"its kernel does not run here ({error})"
        results = (*got, x if residual is None else residual)
        if not all(_is_close(left, right) for left, right in zip(results, want, strict=True)):
            return "its kernel disagrees with the reference on this device"
    return ""


def declined_silu(x: torch.Tensor, silu: Silu, quant: QuantSpec, bounded: bool) -> str:
    """Why no kernel writes quantised rows of silu(gate) * up for both of them in x, or "". x may be a fake tensor;
    bounded: a scale or an upper bound is given."""
    return _declined_silu(x.dtype, x.shape[-1], silu, quant, bounded, x.device)


@kept
def _declined_silu(
    dtype: torch.dtype, width: int, silu: Silu, quant: QuantSpec, bounded: bool, device: torch.device
) -> str:
    if device.type != "cuda":
        return ""
    why = on_a_fresh_stack(silu_op.NAME, _trial_silu, dtype, width, silu, quant, bounded, device)
    if why:
        warn_once(f"{silu_op.NAME} of {width // 2} columns, {quant.scheme}, is left to vLLM: {why}")
    return why


def _trial_silu(
    dtype: torch.dtype, width: int, silu: Silu, quant: QuantSpec, bounded: bool, device: torch.device
) -> str:
    """Run the op on a few rows and hold it against the definition; an exponential may differ in its last bits."""
    generator = torch.Generator(device).manual_seed(0)
    given = torch.full((1,), 0.02, device=device) if bounded else None
    for m in ROWS:
        x = torch.randn(m, width, generator=generator, device=device).to(dtype)
        want = silu_and_mul_quantised(x, silu, quant, given)
        try:
            run = torch.ops.rmsnorm_patch.silu_and_mul_quantised.default
            got = run(x, given, quant.scheme, *silu_op.silu_args(silu, quant))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RMSNormPatchError, RuntimeError, OSError) as error:
            return f"its kernel does not run here ({error})"
        if not all(_is_close(left, right) for left, right in zip(got, want, strict=True)):
            return "its kernel disagrees with the reference on this device"
    return ""


def _is_close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Within a step of the format: 1 of int8, an eighth of e4m3 and a subnormal's step; of a scale what a step of the
    norm's largest result is; of plain rows four bits."""
    if got.dtype == torch.int8:
        rtol, atol = 0.0, 1.0
    elif got.dtype == torch.float8_e4m3fn:
        rtol, atol = 0.125, 2.0**-9
    else:
        rtol, atol = (2.0**-7, 0.0) if got.dtype == torch.float32 else (4 * torch.finfo(got.dtype).eps, 1e-6)
    return torch.allclose(got.float(), want.float(), rtol=rtol, atol=atol)
