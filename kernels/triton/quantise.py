"""From the values of a norm to fp8 or int8 bytes and their scales.

`rmsnorm_patch/numerics/quantisation.py` defines each bit. e4m3 is put together from the bits of fp32, so that devices
and the interpreter need no such type.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Quantisation(NamedTuple):
    """The compile-time constants of a quantisation, which a kernel hands on as one."""

    GROUP: tl.constexpr
    INT8: tl.constexpr
    LIMIT: tl.constexpr
    STEP: tl.constexpr
    NOT_A_NUMBER: tl.constexpr
    LARGEST_AT_LEAST: tl.constexpr
    SCALE_AT_LEAST: tl.constexpr
    ROUNDED_SCALE_AT_LEAST: tl.constexpr
    POWER_OF_TWO: tl.constexpr
    GIVEN: tl.constexpr
    APPROXIMATE: tl.constexpr


@triton.jit
def magnitude_bits(values, NOT_A_NUMBER: tl.constexpr):
    """|values| as the bits of their fp32, ordered as integers as they are; NaN is above infinity, or 0."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if NOT_A_NUMBER != "nan":
        bits = tl.where(values != values, 0, bits)
    return bits


@triton.jit
def at_least(values, BOUND: tl.constexpr):
    """The larger of the two, NaN where a value is one; a bound of 0 is none."""
    if BOUND > 0:
        values = tl.where(values < BOUND, BOUND, values)
    return values


@triton.jit
def factor_of(largest, LIMIT: tl.constexpr, APPROXIMATE: tl.constexpr):
    """What FlashInfer multiplies with: LIMIT / largest, 1 where that is infinite. APPROXIMATE: by its instruction."""
    limit = tl.full(largest.shape, LIMIT, tl.float32)
    if APPROXIMATE:
        factor = tl.inline_asm_elementwise(
            "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [limit, largest], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        factor = tl.div_rn(limit, largest)
    return tl.where(factor == float("inf"), 1.0, factor)


@triton.jit
def inverse_of(factor, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [factor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)
    return inverse


@triton.jit
def scale_of(largest, given, QUANT: tl.constexpr):
    if QUANT.GIVEN:
        largest = tl.where(largest > given, given, largest)
    largest = at_least(largest, QUANT.LARGEST_AT_LEAST)
    result = at_least(tl.div_rn(largest, tl.full(largest.shape, QUANT.LIMIT, tl.float32)), QUANT.SCALE_AT_LEAST)
    if QUANT.POWER_OF_TWO:
        bits = result.to(tl.int32, bitcast=True)
        up = ((bits + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
        result = tl.where(bits < 0x7F800000, up, result)
    return at_least(result, QUANT.ROUNDED_SCALE_AT_LEAST)


@triton.jit
def scale_and_step(largest, given, QUANT: tl.constexpr):
    """The scale, and what `in_steps` takes: the scale again, or the factor whose inverse it is."""
    if QUANT.STEP == "inverse_first":
        step = factor_of(largest, QUANT.LIMIT, QUANT.APPROXIMATE)
        result = inverse_of(step, QUANT.APPROXIMATE)
    else:
        result = scale_of(largest, given, QUANT)
        step = result
    return result, step


@triton.jit
def in_steps(values, step, largest, STEP: tl.constexpr, LIMIT: tl.constexpr):
    """The values in units of the scale; step: the scale, or the factor of "inverse_first". Each division rounds to
    nearest."""
    if STEP == "inverse_first":
        result = values * step
    elif STEP == "divide":
        result = tl.div_rn(values, step + tl.full(values.shape, 0.0, tl.float32))
    elif STEP == "inverse":
        result = values * tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    else:
        inverse = tl.div_rn(tl.full(largest.shape, LIMIT, tl.float32), largest)
        result = values * tl.where(largest == 0.0, 0.0, inverse)
    return result


@triton.jit
def to_e4m3(values, NOT_A_NUMBER: tl.constexpr):
    """Bytes, rounded to nearest even and saturating. From 2^-6 on the upper bits of fp32 with another bias; below, in
    steps of 2^-9, the last bits of a sum with 2^14."""
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(values), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 0x3C0
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    byte = tl.where(size < 0.015625, small, normal) | sign
    missing: tl.constexpr = 0x7E if NOT_A_NUMBER == "limit" else 0xFE if NOT_A_NUMBER == "negative_limit" else 0x7F
    return tl.where(values != values, missing, byte).to(tl.uint8)


@triton.jit
def to_int8(values):
    """Bytes, rounded to nearest even and saturating: by a sum whose last bit is worth one. NaN is 0."""
    near = tl.minimum(tl.maximum(tl.where(values != values, 0.0, values), -128.0), 127.0)
    return ((near + 12582912.0) - 12582912.0).to(tl.int8).to(tl.uint8, bitcast=True)


@triton.jit
def quantised(steps, INT8: tl.constexpr, NOT_A_NUMBER: tl.constexpr):
    if INT8:
        return to_int8(steps)
    return to_e4m3(steps, NOT_A_NUMBER)
