"""Rows of fp8 or int8, and their scales, of y = rms_norm(x) or rms_norm(x + residual), residual <- x + residual.

`rmsnorm_patch/numerics/quantisation.py` defines each bit. Every program handles ROWS whole rows, in CHUNKS chunks of
BLOCK columns, on the schedule of the norm for that length. e4m3 is put together from the bits of fp32, so that devices
and the interpreter need no such type.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl
from triton.language.standard import _elementwise_max

from .row_math import (
    dense_row,
    launch_dependents,
    load_row,
    load_weight,
    reciprocal_rms,
    row_offset,
    rows_of_program,
    scale,
    square,
    store_row,
    wait_for_inputs,
    weight_row,
)


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
def scale_of(
    largest,
    given,
    LIMIT: tl.constexpr,
    LARGEST_AT_LEAST: tl.constexpr,
    SCALE_AT_LEAST: tl.constexpr,
    ROUNDED_SCALE_AT_LEAST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    HAS_BOUND: tl.constexpr,
):
    if HAS_BOUND:
        largest = tl.where(largest > given, given, largest)
    largest = at_least(largest, LARGEST_AT_LEAST)
    result = at_least(tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32)), SCALE_AT_LEAST)
    if POWER_OF_TWO:
        bits = result.to(tl.int32, bitcast=True)
        up = ((bits + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
        result = tl.where(bits < 0x7F800000, up, result)
    return at_least(result, ROUNDED_SCALE_AT_LEAST)


@triton.jit
def in_steps(values, step, largest, STEP: tl.constexpr, LIMIT: tl.constexpr):
    """The values in units of the scale, which `step` is; each division rounds to nearest."""
    if STEP == "divide":
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
    missing: tl.constexpr = 0x7F if NOT_A_NUMBER == "nan" else 0x7E if NOT_A_NUMBER == "limit" else 0xFE
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


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "inner",
        "x_stride",
        "x_inner_stride",
        "residual_stride",
        "residual_inner_stride",
        "scale_row_stride",
        "scale_group_stride",
    ]
)
def rms_norm_quantised(
    x_ptr,
    residual_ptr,
    weight_ptr,
    given_ptr,
    rows_ptr,
    scales_ptr,
    y_ptr,
    eps,
    num_rows,
    inner,
    x_stride,
    x_inner_stride,
    residual_stride,
    residual_inner_stride,
    scale_row_stride,
    scale_group_stride,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    FUSED_ADD: tl.constexpr,
    DEPENDENT: tl.constexpr,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
    LIMIT: tl.constexpr,
    STEP: tl.constexpr,
    NOT_A_NUMBER: tl.constexpr,
    LARGEST_AT_LEAST: tl.constexpr,
    SCALE_AT_LEAST: tl.constexpr,
    ROUNDED_SCALE_AT_LEAST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    GIVEN: tl.constexpr,
    FROM_F32: tl.constexpr,
    BOTH: tl.constexpr,
):
    """GROUP: columns that share a scale; 0: the scale is given; N: all of a row. GIVEN: there is something at
    given_ptr."""
    rows, cols, live = rows_of_program(num_rows, ROWS, BLOCK)
    x_row = x_ptr + row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    residual_row = residual_ptr + row_offset(rows, inner, residual_stride, residual_inner_stride, NESTED, VEC)
    quantised_row = dense_row(rows_ptr, rows, N)
    y_row = dense_row(y_ptr, rows, N)
    scales_row = scales_ptr + rows.to(tl.int64) * scale_row_stride
    weight = weight_row(weight_ptr, rows, N, VEC, 1)
    if DEPENDENT:
        wait_for_inputs()
    given = 0.0
    if GIVEN:
        given = tl.load(given_ptr)

    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    kept = ()
    for c in tl.static_range(0, CHUNKS):
        h = load_row(x_row, cols, c, live, N, BLOCK, ROWS).to(tl.float32)
        if FUSED_ADD:
            h += load_row(residual_row, cols, c, live, N, BLOCK, ROWS).to(tl.float32)
            total = h.to(x_ptr.dtype.element_ty)
            if ROUND_SUM:
                h = total.to(tl.float32)
            store_row(residual_row, cols, c, total, live, N, BLOCK, ROWS)
        squares += square(h, c * BLOCK + cols, WIDTH, N)
        kept = kept + (h,)
    if DEPENDENT:
        launch_dependents()
    rstd = reciprocal_rms(squares, eps, WIDTH)

    values = ()
    largest = tl.full([ROWS, 1], 0, tl.int32)
    for c in tl.static_range(0, CHUNKS):
        w = 0.0
        if HAS_WEIGHT:
            w = load_weight(weight, cols, c, N, BLOCK, ROWS)
        y = scale(kept[c] * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        if BOTH:
            store_row(y_row, cols, c, y, live, N, BLOCK, ROWS)
        value = y.to(tl.float32)
        if FROM_F32:
            value = scale(kept[c] * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, tl.float32, tl.float32)
        # Columns beyond the row: their values are 0 * rstd, which is NaN where rstd is infinite.
        value = tl.where(c * BLOCK + cols < N, value, 0.0)
        values = values + (value,)
        if GROUP == N:
            bits = magnitude_bits(value, NOT_A_NUMBER)
            largest = tl.maximum(largest, tl.reduce(bits, 1, _elementwise_max)[:, None])

    if GROUP == N:
        row_largest = largest.to(tl.float32, bitcast=True)
        step = scale_of(
            row_largest,
            given,
            LIMIT,
            LARGEST_AT_LEAST,
            SCALE_AT_LEAST,
            ROUNDED_SCALE_AT_LEAST,
            POWER_OF_TWO,
            GIVEN,
        )
        tl.store(scales_row, step, mask=live)
        for c in tl.static_range(0, CHUNKS):
            steps = in_steps(values[c], step, row_largest, STEP, LIMIT)
            store_row(quantised_row, cols, c, quantised(steps, INT8, NOT_A_NUMBER), live, N, BLOCK, ROWS)
    elif GROUP == 0:
        step = given + tl.full([ROWS, 1], 0.0, tl.float32)
        for c in tl.static_range(0, CHUNKS):
            steps = in_steps(values[c], step, step, STEP, LIMIT)
            store_row(quantised_row, cols, c, quantised(steps, INT8, NOT_A_NUMBER), live, N, BLOCK, ROWS)
    else:
        SIZE: tl.constexpr = min(GROUP, BLOCK)
        GROUPS: tl.constexpr = BLOCK // SIZE
        for c in tl.static_range(0, CHUNKS):
            bits = tl.reshape(magnitude_bits(values[c], NOT_A_NUMBER), [ROWS, GROUPS, SIZE])
            group_largest = tl.reduce(bits, 2, _elementwise_max).to(tl.float32, bitcast=True)  # [ROWS, GROUPS]
            step = scale_of(
                group_largest,
                given,
                LIMIT,
                LARGEST_AT_LEAST,
                SCALE_AT_LEAST,
                ROUNDED_SCALE_AT_LEAST,
                POWER_OF_TWO,
                GIVEN,
            )
            group = c * GROUPS + tl.arange(0, GROUPS)[None, :]
            tl.store(scales_row + group * scale_group_stride, step, mask=live & (group * SIZE < N))
            wide = tl.broadcast_to(step[:, :, None], [ROWS, GROUPS, SIZE])
            steps = in_steps(values[c], tl.reshape(wide, [ROWS, BLOCK]), given, STEP, LIMIT)
            store_row(quantised_row, cols, c, quantised(steps, INT8, NOT_A_NUMBER), live, N, BLOCK, ROWS)
