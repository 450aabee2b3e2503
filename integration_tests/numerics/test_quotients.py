"""Why the quantising kernel's quotients round as the correctly rounded ones do: looked at where they might not.

The kernel multiplies by the correctly rounded inverse of the scale and corrects the product with its remainder. One
correction leaves the exact quotient times 1 +- 6 / 2^48, rounded. So e4m3 can differ only where the quotient lies that
near to a number half-way between two fp32 numbers, of which one is half-way between two e4m3 numbers. All of these
quotients are found by modular arithmetic.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

ONE = 1 << 23
SIZES = [Fraction(8 + (byte & 7), 8) * Fraction(2) ** ((byte >> 3) - 7) if byte >> 3 else Fraction(byte & 7, 512)
         for byte in range(127)]  # fmt: skip
HALF_WAY = [(low + high) / 2 for low, high in itertools.pairwise(SIZES)]


def rounded(value: Fraction) -> Fraction:
    """To the 24 bits of a normal fp32 number, ties to even."""
    if value == 0:
        return value
    unit = Fraction(2) ** (value.numerator.bit_length() - value.denominator.bit_length() - 24)
    while abs(value) / unit >= 2 * ONE:
        unit *= 2
    return round(value / unit) * unit


def e4m3(value: Fraction) -> int:
    above = bisect.bisect_left(SIZES, value)
    both = (above - 1, above) if 0 < above < len(SIZES) else (min(above, 126),)
    return min(both, key=lambda byte: (abs(SIZES[byte] - value), byte % 2))


def critical(near: int) -> Iterator[tuple[Fraction, Fraction]]:
    """Values and scales of 24 bits whose quotient lies within `near` / 2^48 of such a number."""
    seen = set()
    for border in HALF_WAY:
        fraction, small = border, border < Fraction(1, 64)
        while fraction >= 2:
            fraction /= 2
        while fraction < 1:
            fraction *= 2
        if (fraction, small) in seen:
            continue
        seen.add((fraction, small))
        whole = int(fraction * ONE)
        neighbours = [(2 * whole + 1, 2 * whole), (2 * whole - 1, 2 * whole)]
        neighbours += [(4 * whole - 1, 4 * whole)] if whole == ONE else []  # below a power of two they lie closer
        for odd, unit in neighbours:
            inverse, middle = pow(odd, -1, 1 << 24), Fraction(odd, unit) * border
            for error in range(-near, near + 1):
                scale = error * inverse % (1 << 24)
                value = scale * odd - error >> 24
                if scale < ONE or value <= 0:
                    continue
                value >>= (value & -value).bit_length() - 1
                if value >> 24:
                    continue
                exact = Fraction(value) / scale / middle
                while exact > Fraction(3, 2):
                    exact /= 2
                while exact < Fraction(3, 4):
                    exact *= 2
                if abs(exact - 1) < Fraction(1, 1 << 32):
                    yield exact * middle * scale, Fraction(scale)


def quotient(value: Fraction, scale: Fraction, inverse: Fraction) -> Fraction:
    """What the kernel computes; each operation and each fused pair of them rounds once."""
    found = rounded(value * inverse)
    return rounded(found - rounded(found * scale - value) * inverse)


def test_one_correction_is_enough_where_the_inverse_is_correctly_rounded() -> None:
    looked_at = list(critical(40))
    differ = False
    for value, scale in looked_at:
        right, inverse = rounded(value / scale), rounded(1 / scale)
        assert quotient(value, scale, inverse) == right, (value, scale)
        next_below = inverse * (1 - Fraction(1, 1 << 24))
        differ = differ or e4m3(quotient(value, scale, next_below)) != e4m3(right)
    assert differ, "another inverse does as well: the search misses what is in danger"


def test_the_scale_is_correctly_rounded_for_each_fraction() -> None:
    """largest / 448 as `over_limit` has it, in fp64, where the remainder and its product are exact."""
    largest = np.arange(ONE, 2 * ONE, dtype=np.float32)
    inverse = np.float32(1) / np.float32(448)
    found = largest * inverse
    remainder = (largest.astype(np.float64) - found.astype(np.float64) * 448).astype(np.float32)
    better = (found.astype(np.float64) + remainder.astype(np.float64) * np.float64(inverse)).astype(np.float32)
    assert (found != largest / np.float32(448)).any()
    assert (better == largest / np.float32(448)).all()
