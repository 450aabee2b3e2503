"""Device code that both kernels share: where a row lies, its reciprocal RMS, the weight."""

import triton
import triton.language as tl

# The combine function of `tl.sum`. `tl.sum` itself is compiled code that the CPU interpreter enters only if
# TRITON_INTERPRET was set before triton was imported; `tl.reduce` with this function it knows at any time.
from triton.language.standard import _sum_combine


@triton.jit
def row_offset(rows, inner, stride, inner_stride, NESTED: tl.constexpr, VEC: tl.constexpr):
    """Elements from the base to each of `rows`. Strides count in VEC elements, which tells the compiler how far every
    row is aligned: the vector width, and with it the reduction order, then follow from N alone.

    NESTED: row r is (r // inner, r % inner) of a view with two strides (q/k norm of a split projection; groups).
    """
    rows = rows.to(tl.int64)
    if NESTED:
        return ((rows // inner) * stride + (rows % inner) * inner_stride) * VEC
    return rows * stride * VEC


@triton.jit
def square(h, cols, WIDTH: tl.constexpr, N: tl.constexpr):
    """h * h where the column counts towards the variance, else 0."""
    if WIDTH < N:
        return tl.where(cols < WIDTH, h * h, 0.0)
    return h * h


@triton.jit
def reciprocal_rms(squares, eps, WIDTH: tl.constexpr):
    """[ROWS, BLOCK] partial sums of squares -> rstd [ROWS, 1], fp32."""
    mean = tl.reduce(squares, 1, _sum_combine)[:, None] / WIDTH + eps
    # `tl.rsqrt` is rsqrt.approx.ftz: a subnormal mean (eps = 0, values near 1e-20) would give inf. Scaled by 2^48 it is
    # normal, and the root of that scale comes off exactly.
    subnormal = mean < 1.1754943508222875e-38
    rstd = tl.rsqrt(tl.where(subnormal, mean * 281474976710656.0, mean))
    return tl.where(subnormal, rstd * 16777216.0, rstd)


@triton.jit
def scale(
    h,
    weight,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
):
    """Round h = x * rstd (fp32) to ROUNDED, multiply by the weight with its offset, round to PRODUCT, then to OUT.

    Each rounding is a cast and back, never folded away, and no product feeds an addition: nothing here can be
    contracted to an FMA, so the result is the reference's, bit for bit, for an equal rstd.
    """
    h = h.to(ROUNDED).to(tl.float32)
    if HAS_WEIGHT:
        w = weight.to(tl.float32)
        if OFFSET == "fp32":
            w = 1.0 + w
        elif OFFSET == "weight_dtype":
            w = (1.0 + w).to(weight.dtype).to(tl.float32)
        h = (w * h).to(PRODUCT)
    return h.to(OUT)
