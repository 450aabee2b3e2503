"""What quantised rows are: the schemes, the arithmetic of those who quantise today, and both in plain PyTorch.

`quantise` is the definition that kernels are held against, byte for byte and scale for scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..errors import UnsupportedInput
from . import reference
from .spec import NormSpec

Scheme = Literal["fp8_static", "fp8_token", "fp8_block", "int8_token"]
Value = Literal["fp32", "rounded"]
Arithmetic = Literal["fused", "separate", "native", "flashinfer", "by_rows"]
Layout = Literal["row_major", "column_major", "tma_aligned"]

SCHEMES: tuple[Scheme, ...] = ("fp8_static", "fp8_token", "fp8_block", "int8_token")
VALUES: tuple[Value, ...] = ("fp32", "rounded")
ARITHMETICS: tuple[Arithmetic, ...] = ("fused", "separate", "native", "flashinfer", "by_rows")
LAYOUTS: tuple[Layout, ...] = ("row_major", "column_major", "tma_aligned")

GROUP = 128
"""Columns that share a scale in fp8_block."""
TMA_ROWS = 4
"""Column-major scales that a TMA descriptor can address have columns of a multiple of this many floats (16 bytes)."""
FEW_ROWS = 32
"""Below this many rows "by_rows" is "flashinfer"."""
FP8_LIMIT, INT8_LIMIT = 448.0, 127.0
_FP8_NAN = 0x7F

Step = Literal["divide", "inverse", "limit_over_largest", "inverse_first"]
NotANumber = Literal["limit", "negative_limit", "nan", "nan_apart"]


@dataclass(frozen=True)
class Arithmetics:
    """What one scheme's scale and step are in one of the arithmetics; bounds are fp32 numbers, 0 where there is none.

    step: value / scale, value * (1 / scale), or value * (limit / largest); "inverse_first" = the last, with 1 for an
    infinite factor, whose inverse the scale is. not_a_number: what a NaN becomes in fp8; "nan" makes its scale one,
    "nan_apart" does not. largest_at_least, scale_at_least: lower bounds in front of the rounding of the scale
    to a power of two; rounded_scale_at_least: one behind it.
    """

    step: Step
    not_a_number: NotANumber
    largest_at_least: float = 0.0
    scale_at_least: float = 0.0
    rounded_scale_at_least: float = 0.0


def _fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


_LEAST_SCALE = _fp32(1.0 / (FP8_LIMIT * 512.0))
_LEAST_LARGEST = _fp32(1e-10)
_LEAST_INT8_SCALE = torch.finfo(torch.float32).eps

_TABLE: dict[tuple[Scheme, Arithmetic], Arithmetics] = {
    ("fp8_static", "fused"): Arithmetics("inverse", "limit"),
    ("fp8_static", "separate"): Arithmetics("inverse", "limit"),
    ("fp8_static", "native"): Arithmetics("inverse", "nan"),
    ("fp8_token", "fused"): Arithmetics("divide", "limit", scale_at_least=_LEAST_SCALE),
    ("fp8_token", "separate"): Arithmetics("divide", "limit", scale_at_least=_LEAST_SCALE),
    ("fp8_token", "native"): Arithmetics("inverse", "nan", scale_at_least=_LEAST_SCALE),
    ("fp8_block", "fused"): Arithmetics("divide", "limit", scale_at_least=_LEAST_SCALE),
    ("fp8_block", "separate"): Arithmetics("divide", "negative_limit", largest_at_least=_LEAST_LARGEST),
    ("fp8_block", "native"): Arithmetics("divide", "nan", rounded_scale_at_least=_LEAST_SCALE),
    ("fp8_block", "flashinfer"): Arithmetics("inverse_first", "nan_apart"),
    ("int8_token", "fused"): Arithmetics("inverse", "limit", scale_at_least=_LEAST_INT8_SCALE),
    ("int8_token", "separate"): Arithmetics("limit_over_largest", "limit"),
}


@dataclass(frozen=True)
class QuantSpec:
    """One way of quantising the rows of a norm.

    scheme: "fp8_static": e4m3, one scale for all, given. "fp8_token": e4m3, a scale a row. "fp8_block": e4m3, a scale
        for each 128 columns of a row, fewer at its end. "int8_token": int8, a scale a row. Scales are fp32; a row is
        about its bytes times its scales.
    value: what is quantised: "rounded" = the norm's result as the unquantised op writes it (vLLM's C++ ops, and what
        reads a bf16 row); "fp32" = what the norm has before its last rounding (Inductor, FlashInfer).
    arithmetic: "fused" = vLLM's `rms_norm_static_fp8_quant`, `rms_norm_dynamic_per_token_quant`,
        `rms_norm_per_block_quant`; "separate" = its quantisations that stand alone (`static_scaled_fp8_quant`,
        `dynamic_per_token_scaled_fp8_quant`, `per_token_group_fp8_quant`, `dynamic_scaled_int8_quant`); "native" =
        its `QuantFP8.forward_native`, which Inductor compiles; "flashinfer" = what FlashInfer's block product does to
        bf16 rows: its two quotients are the device's approximate ones, here rounded ones, which differ in last bits;
        "by_rows" = "flashinfer" below 32 rows, else "separate". They differ in zero rows, NaN and in last bits.
    layout: of the scales [M, groups] of fp8_block: "row_major", "column_major" (stride 1 from row to row), or
        "tma_aligned" (column-major, columns padded to a multiple of 4 floats).
    power_of_two: fp8_block: a scale is rounded up to a power of two; with "by_rows" only from 32 rows on.
    """

    scheme: Scheme
    value: Value = "rounded"
    arithmetic: Arithmetic = "fused"
    layout: Layout = "row_major"
    power_of_two: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("scheme", self.scheme, SCHEMES),
            ("value", self.value, VALUES),
            ("arithmetic", self.arithmetic, ARITHMETICS),
            ("layout", self.layout, LAYOUTS),
        ):
            if value not in allowed:
                raise ValueError(f"QuantSpec.{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")
        able: list[str] = [arithmetic for scheme, arithmetic in _TABLE if scheme == self.scheme]
        if self.scheme == "fp8_block":
            able.append("by_rows")
        if self.arithmetic not in able:
            names = ", ".join(map(repr, able))
            raise ValueError(f"QuantSpec.arithmetic: got {self.arithmetic!r} for {self.scheme}; allowed: {names}")
        if self.power_of_two and self.arithmetic == "flashinfer":
            raise ValueError(
                "QuantSpec.power_of_two: got True for 'flashinfer'; allowed: False (its scales are inverses)"
            )
        if self.scheme != "fp8_block" and (self.layout != "row_major" or self.power_of_two):
            raise ValueError(
                f"QuantSpec.layout, power_of_two: got {self.layout!r}, {self.power_of_two} for {self.scheme}; "
                "allowed: 'row_major', False (they are of fp8_block)"
            )

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.scheme == "int8_token" else torch.float8_e4m3fn

    @property
    def limit(self) -> float:
        """The largest magnitude of a quantised value."""
        return INT8_LIMIT if self.scheme == "int8_token" else FP8_LIMIT

    def of_rows(self, count: int) -> QuantSpec:
        """The same with the arithmetic that so many rows have."""
        if self.arithmetic != "by_rows":
            return self
        if count < FEW_ROWS:
            return replace(self, arithmetic="flashinfer", power_of_two=False)
        return replace(self, arithmetic="separate")

    @property
    def arithmetics(self) -> Arithmetics:
        """Its arithmetic, in full; of "by_rows" `of_rows` has one. A power of two has one more bound in
        `per_token_group_fp8_quant`."""
        found = _TABLE[self.scheme, self.arithmetic]
        if self.power_of_two and self.arithmetic == "separate":
            return Arithmetics(found.step, found.not_a_number, found.largest_at_least, _LEAST_LARGEST)
        return found

    def groups(self, n: int) -> int:
        """Scales of a row of `n` columns; 0 where the scale is given."""
        return {"fp8_static": 0, "fp8_block": -(-n // GROUP)}.get(self.scheme, 1)


def rows_of(x: torch.Tensor) -> int:
    """How many rows [..., N] holds."""
    return x.numel() // max(x.shape[-1], 1)


def new_scales(x: torch.Tensor, quant: QuantSpec) -> torch.Tensor:
    """Unwritten fp32 scales for the rows of `x` [..., N]: [..., groups], laid out as `quant` says; of no elements where
    the scale is given. Rows of more than one leading dimension are one after another in a column."""
    groups = quant.groups(x.shape[-1])
    if groups == 0:
        return x.new_empty(0, dtype=torch.float32)
    shape = (*x.shape[:-1], groups)
    if quant.layout == "row_major":
        return x.new_empty(shape, dtype=torch.float32)
    rows = x.numel() // x.shape[-1]
    # Rounded up as vLLM does it: a compiler must see of two symbols that they are equal, or it copies.
    column = -(rows // -TMA_ROWS) * TMA_ROWS if quant.layout == "tma_aligned" else rows
    strides = [1]
    for size in reversed(shape[1:-1]):
        strides.insert(0, strides[0] * size)
    return x.new_empty_strided(shape, (*strides[: len(shape) - 1], column), dtype=torch.float32)


def check_given(x: torch.Tensor, given: torch.Tensor | None, quant: QuantSpec, op: str) -> None:
    """Raise UnsupportedInput unless `given` is what `quantise` takes for rows beside x."""
    scheme = quant.scheme
    wanted = {
        "fp8_static": "the scale: fp32, one element, on x's device",
        "fp8_token": "None, or an upper bound: fp32, one element, on x's device",
    }.get(scheme, "None")
    if given is None:
        fits = scheme != "fp8_static"
    else:
        fits = scheme in ("fp8_static", "fp8_token") and given.dtype == torch.float32
        fits = fits and given.numel() == 1 and given.device == x.device
    if not fits:
        got = "None" if given is None else f"{tuple(given.shape)} {given.dtype} on {given.device}"
        raise UnsupportedInput(op, f"given={got} for {scheme}", wanted, "correct the argument")


def quantise(
    values: torch.Tensor, quant: QuantSpec, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [..., N] of `quant.dtype`, scales as `new_scales` shapes them) of `values` [..., N] (fp32, fp16 or bf16).

    given: fp32 [1]: the scale of fp8_static; an upper bound of the largest magnitude of fp8_token, or None.
    """
    values = values.to(torch.float32)
    quant = quant.of_rows(rows_of(values))
    arithmetic = quant.arithmetics
    scales = new_scales(values, quant)
    if quant.scheme == "fp8_static":
        assert given is not None, "`check` of the op has seen to it"
        return _to_fp8(values * (1.0 / given), arithmetic.not_a_number), scales
    n, size = values.shape[-1], GROUP if quant.scheme == "fp8_block" else max(values.shape[-1], 1)
    grouped = torch.nn.functional.pad(values, (0, -n % size)).unflatten(-1, (-1, size))
    largest = _largest(grouped, arithmetic.not_a_number)
    if given is not None:
        largest = torch.where(largest > given, given, largest)
    scale = _scale(largest, quant)
    if arithmetic.step == "limit_over_largest":
        steps = grouped * torch.where(largest == 0, 0.0, torch.div(_limit(largest, quant), largest))
    elif arithmetic.step == "inverse_first":
        steps = grouped * _factor(largest, quant)
    else:
        steps = grouped / scale if arithmetic.step == "divide" else grouped * (1.0 / scale)
    steps = steps.flatten(-2)[..., :n]
    scales.copy_(scale.squeeze(-1))
    return (_to_int8(steps) if quant.dtype == torch.int8 else _to_fp8(steps, arithmetic.not_a_number)), scales


def _largest(grouped: torch.Tensor, not_a_number: NotANumber) -> torch.Tensor:
    """[..., groups, 1]: the largest magnitude, among the numbers alone unless NaN stays NaN."""
    magnitudes = grouped.abs()
    if not_a_number != "nan":
        magnitudes = torch.where(magnitudes.isnan(), 0.0, magnitudes)
    return magnitudes.amax(-1, keepdim=True)


def _factor(largest: torch.Tensor, quant: QuantSpec) -> torch.Tensor:
    """What FlashInfer multiplies with."""
    factor = torch.div(_limit(largest, quant), largest)
    return torch.where(factor.isinf(), 1.0, factor)


def _scale(largest: torch.Tensor, quant: QuantSpec) -> torch.Tensor:
    arithmetic = quant.arithmetics
    if arithmetic.step == "inverse_first":
        return 1.0 / _factor(largest, quant)
    scale = _at_least(largest, arithmetic.largest_at_least) / _limit(largest, quant)
    scale = _at_least(scale, arithmetic.scale_at_least)
    if quant.power_of_two:
        bits = scale.view(torch.int32)
        up = ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
        scale = torch.where(scale.isfinite(), up, scale)
    return _at_least(scale, arithmetic.rounded_scale_at_least)


def _limit(like: torch.Tensor, quant: QuantSpec) -> torch.Tensor:
    """On the device: PyTorch multiplies by the inverse of a divisor that is a number, or a tensor on the CPU."""
    return like.new_full((), quant.limit)


def _at_least(values: torch.Tensor, bound: float) -> torch.Tensor:
    return torch.where(values < bound, bound, values) if bound else values


def _to_fp8(steps: torch.Tensor, not_a_number: NotANumber) -> torch.Tensor:
    """Rounded to nearest even, saturating. The NaN of e4m3 is 0x7f whatever sign it had: processors differ in that."""
    missing = steps.isnan()
    rounded = torch.where(missing, 0.0, steps).clamp(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn).view(torch.uint8)
    stands_for = {"limit": FP8_LIMIT, "negative_limit": -FP8_LIMIT}
    if not_a_number in stands_for:
        byte = int(torch.tensor(stands_for[not_a_number]).to(torch.float8_e4m3fn).view(torch.uint8))
    else:
        byte = _FP8_NAN
    return torch.where(missing, byte, rounded).view(torch.float8_e4m3fn)


def _to_int8(steps: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest even, saturating; NaN is 0."""
    return torch.where(steps.isnan(), 0.0, steps).round().clamp(-128, 127).to(torch.int8)


def rms_norm_quantised(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    spec: NormSpec,
    quant: QuantSpec,
    eps: float,
    given: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, scales, the norm's result as the unquantised op writes it, x + residual or x) of x [..., N], without or
    with a residual of its shape; weight: [N] or None. given: as `quantise` takes it."""
    row, total = (x.to(torch.float32), x) if residual is None else reference.row_and_sum(x, residual, spec)
    h = reference.divide_by_rms(row, spec, eps)
    normed = reference.scale(h, x.dtype, weight, spec)
    values = normed if quant.value == "rounded" else reference.scale(h, x.dtype, weight, spec, rounded=False)
    rows, scales = quantise(values, quant, given)
    return rows.contiguous(), scales, normed.contiguous(), total
