"""How far two tensors of one dtype are apart: ulp distances, shares of differing elements, scale bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..numerics.tolerances import SiteTolerance, scale_bias

_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
FAR = 2**62
"""Distance of values that no number of steps connects: NaN or Inf on one side only."""
HUGE = 1e30
"""Stands in reports for a number that is infinite or undefined; JSON has neither."""

_CHUNK = 1 << 22


def finite(value: float) -> float:
    """`value`, or HUGE for NaN and anything larger."""
    return value if abs(value) < HUGE else HUGE


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit pattern of `x` [...] as integers of its width."""
    return x.contiguous().view(_BITS[x.dtype]) if x.dtype in _BITS else x


def ulp_distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Representable values between `left` and `right` [...] (one dtype), elementwise, int64.

    -0.0 and 0.0 are 0 apart, NaN and NaN too; NaN or Inf against anything else is `FAR`.
    """
    distance = (_ordinal(left) - _ordinal(right)).abs_()
    odd = ~(torch.isfinite(left) & torch.isfinite(right))
    if bool(odd.any()):
        same = (left == right) | (torch.isnan(left) & torch.isnan(right))
        distance = torch.where(odd, torch.where(same, 0, FAR), distance)
    return distance


def _ordinal(x: torch.Tensor) -> torch.Tensor:
    """Position of each value on the ordered line of its dtype, 0 for both zeros."""
    raw = bits(x)
    lowest = torch.iinfo(raw.dtype).min
    raw = raw.to(torch.int64)
    return torch.where(raw < 0, lowest - raw, raw)


def row_keys(rows: torch.Tensor) -> torch.Tensor:
    """A 64-bit checksum of every row of `rows` [M, N], int64 [M], by bit patterns and their columns."""
    chunks = rows.split(max(1, _CHUNK // max(rows.shape[-1], 1)))
    place = torch.arange(1, rows.shape[-1] + 1, dtype=torch.int64, device=rows.device)
    return torch.cat([_mix(bits(chunk).to(torch.int64), place).sum(-1) for chunk in chunks])


def digest(x: torch.Tensor) -> int:
    """A 64-bit checksum of dtype, shape, bits and their places, within one process; equal on every device."""
    flat = bits(x.detach()).reshape(-1)
    total = torch.tensor(hash((str(x.dtype), *x.shape)), dtype=torch.int64, device=x.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=x.device)
        total = total * 31 + _mix(part, place).sum()
    return int(total)


def _mix(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    mixed = (values + place) * -7046029254386353131  # 2^64 / golden ratio: an odd multiplier that spreads low bits
    return (mixed ^ (mixed >> 29)) * (2 * place + 1)


def bit_mismatches(left: torch.Tensor, right: torch.Tensor) -> int:
    """Elements whose bit patterns differ; any two NaN count as equal. Shapes and dtypes must agree."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return max(left.numel(), right.numel(), 1)
    differ = bits(left) != bits(right)
    if not bool(differ.any()):
        return 0
    if left.is_floating_point():
        differ &= ~(torch.isnan(left) & torch.isnan(right))
    return int(differ.sum())


@dataclass(frozen=True)
class Difference:
    """What a comparison of `elements` values found.

    max_ulp: largest distance. differing: elements that are not equal. bias_sum, scale_sum: numerator and denominator
    of the scale bias, over finite elements. sum_elements, sum_mismatches: residual sums compared and not bit-equal.
    worst_row: row (of the flattened leading dimensions) that holds `max_ulp`. width: elements in a row.
    error: a shape or dtype that differs.
    """

    elements: int = 0
    max_ulp: int = 0
    differing: int = 0
    bias_sum: float = 0.0
    scale_sum: float = 0.0
    sum_elements: int = 0
    sum_mismatches: int = 0
    worst_row: int = -1
    width: int = 1
    error: str = ""

    @property
    def fraction(self) -> float:
        return self.differing / self.elements if self.elements else 0.0

    @property
    def bias(self) -> float:
        return self.bias_sum / self.scale_sum if self.scale_sum else 0.0

    def __add__(self, other: Difference) -> Difference:
        worst = self if self.max_ulp >= other.max_ulp else other
        return Difference(
            elements=self.elements + other.elements,
            max_ulp=worst.max_ulp,
            differing=self.differing + other.differing,
            bias_sum=self.bias_sum + other.bias_sum,
            scale_sum=self.scale_sum + other.scale_sum,
            sum_elements=self.sum_elements + other.sum_elements,
            sum_mismatches=self.sum_mismatches + other.sum_mismatches,
            worst_row=worst.worst_row,
            width=max(self.width, other.width),
            error=self.error or other.error,
        )

    def violations(self, tolerance: SiteTolerance, dtype: torch.dtype) -> tuple[str, ...]:
        """In words, each bound that this difference exceeds; empty when it is within all of them."""
        faults = []
        if self.error:
            faults.append(self.error)
        if self.sum_mismatches:
            faults.append(f"residual sum: {self.sum_mismatches} of {self.sum_elements} elements not bit-equal to a + b")
        if self.max_ulp > tolerance.max_ulp:
            shown = "NaN or Inf on one side" if self.max_ulp >= FAR else f"{self.max_ulp} ulp"
            faults.append(f"largest distance {shown} (row {self.worst_row}), allowed {tolerance.max_ulp} ulp")
        allowed = tolerance.allowed(self.elements, self.width, dtype)
        if self.differing > allowed:
            faults.append(
                f"{self.differing} of {self.elements} elements differ ({self.fraction:.3%}), allowed {allowed}"
                f" ({tolerance.fraction:.1%} and {tolerance.flips} flips)"
            )
        bound = scale_bias(dtype, self.elements, self.width)
        if abs(self.bias) > bound:
            faults.append(f"scale is off by {self.bias:+.2e}, allowed {bound:.1e}")
        return tuple(faults)


def compare(actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """`actual` against `expected`, both [..., N]; every element, a few million at a time."""
    if actual.shape != expected.shape:
        return Difference(error=f"shape {tuple(actual.shape)} in place of {tuple(expected.shape)}")
    if actual.dtype != expected.dtype:
        return Difference(error=f"dtype {actual.dtype} in place of {expected.dtype}")
    difference = Difference()
    for start, left, right in _row_chunks(actual, expected):
        difference = difference + _compare_rows(left, right, start)
    return difference


def compare_sum(actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """The residual sum: bit patterns."""
    return Difference(sum_elements=expected.numel(), sum_mismatches=bit_mismatches(actual, expected))


def _row_chunks(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    width = left.shape[-1] if left.dim() else 1
    left, right = left.reshape(-1, width), right.reshape(-1, width)
    rows = max(1, _CHUNK // max(width, 1))
    for start in range(0, left.shape[0], rows):
        yield start, left[start : start + rows], right[start : start + rows]


def _compare_rows(actual: torch.Tensor, expected: torch.Tensor, first_row: int) -> Difference:
    if actual.numel() == 0:
        return Difference()
    distance = ulp_distance(actual, expected)
    differing = int((distance != 0).sum())
    wide = expected.to(torch.float64)
    magnitude = torch.where(torch.isfinite(wide), wide.abs(), 0.0)
    if differing == 0:
        return Difference(elements=actual.numel(), scale_sum=float(magnitude.sum()), width=actual.shape[-1])
    shift = (actual.to(torch.float64) - wide) * wide.sign()
    at = int(distance.argmax())
    return Difference(
        elements=actual.numel(),
        max_ulp=int(distance.flatten()[at]),
        differing=differing,
        bias_sum=float(torch.where(torch.isfinite(shift), shift, 0.0).sum()),
        scale_sum=float(magnitude.sum()),
        worst_row=first_row + at // actual.shape[-1],
        width=actual.shape[-1],
    )
