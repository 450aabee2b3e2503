"""The CUDA kernel: one read of the row, its squares, its largest value, its bytes (`rms_norm_quantised.cu`).

Its reduction tree is that of the norms for the same length, so that every byte and scale is that of quantising what
they write.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import NamedTuple

import torch

from ...backends.bindings import by_variant
from ...backends.cuda import launcher
from ...backends.cuda.kernel_set import KernelSet, configs_for
from ...backends.cuda.rows import Rows, address_of, one_level, outer_stride, power_of_two, rows_of
from ...backends.cuda.schedules import Config, Op, no_kernel, sm
from ...numerics.contract import FUSED_ADD_IN_PLACE, RMS_NORM
from ...numerics.quantisation import QuantSpec, new_scales
from ...numerics.spec import NormSpec

OP: Op = "rms_norm_quantised"
"""Whose rules the kernel has, where there are some for a length."""
SOURCE = "rms_norm_quantised.cu"
FP8_CAPABILITY = 89
"""The first with an instruction that converts to e4m3."""
_SCHEMES = {"fp8_static": 0, "fp8_token": 1, "int8_token": 1, "fp8_block": 2}
_STEPS = ("divide", "inverse", "limit_over_largest", "inverse_first")
_NOT_A_NUMBER = ("limit", "negative_limit", "nan", "nan_apart")


class Operands(NamedTuple):
    """x: [..., N] on one device, any strides; residual: alike, or None; weight: [N] or None; given: fp32 [1], the scale
    or an upper bound, or None."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    given: torch.Tensor | None
    eps: float


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(rows, scales, normed): scales of no elements where the scale is given, normed of none unless it is asked for."""


def norm_of(fused_add: bool) -> Op:
    """The op whose schedules, and with them trees, the kernel has."""
    return FUSED_ADD_IN_PLACE.name if fused_add else RMS_NORM.name


def cannot_serve(
    fused_add: bool, quant: QuantSpec, dtype: torch.dtype, n: int, capability: int, configs: tuple[Config, ...]
) -> str:
    """Why no kernel serves such rows on a device of that capability, whose norms have `configs`; "" if one does."""
    if quant.dtype != torch.int8 and capability < FP8_CAPABILITY:
        return f"fp8 needs sm_{FP8_CAPABILITY} or newer, device has sm_{capability}"
    if not configs:
        return no_kernel(norm_of(fused_add), dtype, n, capability)
    if configs[0].source != "rms_norm_rows.cu":
        return f"N={n} is longer than the registers of one multiprocessor (sm_{capability})"
    if quant.scheme == "fp8_block" and configs[0].vec * 32 < 128:
        return f"the groups of N={n} columns do not lie in one warp each: N must be a multiple of 4"
    return ""


def serves(fused_add: bool, quant: QuantSpec, x: torch.Tensor) -> str:
    """`cannot_serve` for the rows and the device of a CUDA tensor."""
    capability = sm(torch.cuda.get_device_capability(x.device))
    configs = configs_for(norm_of(fused_add), x.dtype, x.shape[-1], x.get_device())
    return cannot_serve(fused_add, quant, x.dtype, x.shape[-1], capability, configs)


def defines(quant: QuantSpec, bounded: bool, both: bool) -> dict[str, int]:
    """The macros of quantise.cuh."""
    arithmetic = quant.arithmetics
    return {
        "SCHEME": _SCHEMES[quant.scheme],
        "QUANTISED_T": int(quant.dtype == torch.int8),
        "FROM_F32": int(quant.value == "fp32"),
        "STEP": _STEPS.index(arithmetic.step),
        "NOT_A_NUMBER": _NOT_A_NUMBER.index(arithmetic.not_a_number),
        "LARGEST_AT_LEAST": _bits(arithmetic.largest_at_least),
        "SCALE_AT_LEAST": _bits(arithmetic.scale_at_least),
        "ROUNDED_SCALE_AT_LEAST": _bits(arithmetic.rounded_scale_at_least),
        "POWER_OF_TWO": int(quant.power_of_two),
        "HAS_BOUND": int(bounded and quant.scheme != "fp8_static"),
        "BOTH": int(both),
    }


def _bits(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def schedules(
    own: tuple[Config, ...], configs: tuple[Config, ...], quant: QuantSpec, bounded: bool, both: bool
) -> tuple[Config, ...]:
    """The kernel's schedules: `own` of its rules, or those of the norm, `configs`, which say what the tree is."""
    macros = defines(quant, bounded, both)
    return tuple(
        replace(
            config,
            kernel="rms_norm_quantised",
            source=SOURCE,
            entry="rms_norm_quantised",
            defines=tuple((dict(config.defines) | macros).items()),
        )
        for config in (own if own and own[0].tree == configs[0].tree else configs)
    )


def bound(
    spec: NormSpec, quant: QuantSpec, fused_add: bool, bounded: bool, both: bool, dependent: bool | None = None
) -> BoundQuantised:
    """The kernels of one numerics variant. bounded: `given` comes with each call. both: the unquantised rows too.
    dependent: as `launch_mode.decided` takes it."""
    return _bound(quant, fused_add, bounded, both, spec, dependent=dependent)


@by_variant
def _bound(
    quant: QuantSpec, fused_add: bool, bounded: bool, both: bool, spec: NormSpec, dependent: bool
) -> BoundQuantised:
    return BoundQuantised(spec, quant, fused_add, bounded, both, dependent, launcher.functions())


class BoundQuantised:
    """f(operands) -> results; residual <- x + residual. The caller checks."""

    def __init__(
        self,
        spec: NormSpec,
        quant: QuantSpec,
        fused_add: bool,
        bounded: bool,
        both: bool,
        dependent: bool,
        functions: launcher.Functions,
    ) -> None:
        self.spec = spec
        self.quant = quant
        self.both = both
        self.bounded = bounded
        self.kernels = KernelSet(norm_of(fused_add), spec, dependent, fused_add, functions, self._select)

    def __repr__(self) -> str:
        return f"BoundQuantised({self.spec!r}, {self.quant!r}, both={self.both})"

    def _select(self, configs: tuple[Config, ...], x: torch.Tensor) -> tuple[Config, ...]:
        own = configs_for(OP, x.dtype, x.shape[-1], x.get_device())
        return schedules(own, configs, self.quant, self.bounded, self.both)

    def __call__(self, operands: Operands) -> Results:
        x, residual = operands.x, operands.residual
        results = new_results(x, operands.weight, self.spec, self.quant, self.both)
        if not x.numel():
            return results
        total = None if residual is None else one_level(residual)
        self._launch(operands, total, results)
        if residual is not None and total is not None and total.tensor.data_ptr() != residual.data_ptr():
            residual.copy_(total.tensor.view(residual.shape))
        return results

    def _launch(self, operands: Operands, total: Rows | None, results: Results) -> None:
        """total: where the residual's rows lie, which the kernel reads and overwrites."""
        x, _, weight, given, eps = operands
        quantised, scales, normed = results
        n, size, where = x.shape[-1], x.element_size(), rows_of(x)
        m = x.numel() // n
        align = power_of_two(n * size, *where.offsets(size), *(() if total is None else total.offsets(size)))
        weight = None if weight is None else weight.contiguous()
        chain, _ = self.kernels.chain(x, weight, align, power_of_two(address_of(weight)), where.two_level)
        inner = where.inner if where.two_level else m
        stride = 0 if total is None else total.stride
        by_row, by_group = scale_strides(scales, self.quant)
        address = address_of(None if total is None else total.tensor)
        self.kernels.launch(
            chain,
            (m,),
            x,
            x=where.tensor.data_ptr(),
            residual=address,
            weight=address_of(weight),
            given=address_of(given),
            quantised=quantised.data_ptr(),
            scales=scales.data_ptr() if scales.numel() else 0,
            normed=normed.data_ptr() if self.both else 0,
            total=address,
            m=m,
            x_row_stride=where.stride,
            total_row_stride=stride,
            scale_row_stride=by_row,
            scale_group_stride=by_group,
            inner_rows=inner,
            x_outer_stride=outer_stride(where, inner),
            total_outer_stride=stride * inner,
            eps=eps,
        )


def new_results(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, quant: QuantSpec, both: bool) -> Results:
    """Unwritten results for `x`: rows and normed contiguous; normed of no elements unless `both`."""
    dtype = spec.output_dtype(x.dtype, None if weight is None else weight.dtype)
    rows = x.new_empty(x.shape, dtype=quant.dtype)
    return rows, new_scales(x, quant), x.new_empty(x.shape if both else (0,), dtype=dtype)


def scale_strides(scales: torch.Tensor, quant: QuantSpec) -> tuple[int, int]:
    """Floats from row to row and from group to group: the rows of a column lie one after another in every layout."""
    if not scales.numel():
        return 0, 0
    return (scales.shape[-1], 1) if quant.layout == "row_major" else (1, scales.stride(-1))
