"""Rows of fp8 or int8, and their scales, of y = rms_norm(x) or rms_norm(x + residual), residual <- x + residual.

`rmsnorm_patch/numerics/quantisation.py` defines each bit. Every program handles ROWS whole rows, in CHUNKS chunks of
BLOCK columns, on the schedule of the norm for that length.

Of short rows the results stay in registers between the row's largest value and its bytes. Of LEAN ones the row does, as
it came, and the results are computed again, to the same bits. The first STREAMED chunks of rows too long even for that
are read again each time.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl
from triton.language.standard import _elementwise_max

from .quantise import Quantisation, in_steps, magnitude_bits, quantised, scale_and_step
from .row_math import (
    added_by_now,
    dense_row,
    in_pairs,
    launch_dependents,
    load_row,
    load_weight,
    opaque_zero,
    reciprocal_rms,
    row_offset,
    rows_of_program,
    scale,
    square,
    store_row,
    wait_for_inputs,
    weight_row,
    widened_again,
)


@triton.jit
def read_again(
    x_row,
    residual_row,
    cols,
    c: tl.constexpr,
    live,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FUSED_ADD: tl.constexpr,
    ROUND_SUM: tl.constexpr,
):
    """fp32 of chunk `c` of what is normed. A rounded sum stands where the residual was, behind a barrier."""
    if FUSED_ADD and ROUND_SUM:
        return load_row(residual_row, cols, c, live, N, BLOCK, ROWS).to(tl.float32)
    h = load_row(x_row, cols, c, live, N, BLOCK, ROWS).to(tl.float32)
    if FUSED_ADD:
        h += load_row(residual_row, cols, c, live, N, BLOCK, ROWS).to(tl.float32)
    return h


@triton.jit
def results_of(
    h,
    weight,
    cols,
    c: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    FROM_F32: tl.constexpr,
):
    """(the norm's results, what is quantised of them) of h = x * rstd, chunk `c`."""
    w = 0.0
    if HAS_WEIGHT:
        w = load_weight(weight, cols, c, N, BLOCK, ROWS)
    y = scale(h, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
    value = y.to(tl.float32)
    if FROM_F32:
        value = scale(h, w, HAS_WEIGHT, OFFSET, ROUNDED, tl.float32, tl.float32)
    # Columns beyond the row: their values are 0 * rstd, which is NaN where rstd is infinite.
    return y, tl.where(c * BLOCK + cols < N, value, 0.0)


@triton.jit
def store_in_groups(
    quantised_row,
    scales_row,
    values,
    given,
    cols,
    c: tl.constexpr,
    live,
    scale_group_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    QUANT: tl.constexpr,
):
    """Chunk `c`, whose scales are not the row's: a given one (GROUP 0), or one for each group of columns."""
    if QUANT.GROUP == 0:
        step = given + tl.full([ROWS, 1], 0.0, tl.float32)
        steps = in_steps(values, step, step, QUANT.STEP, QUANT.LIMIT)
    else:
        SIZE: tl.constexpr = QUANT.GROUP if QUANT.GROUP < BLOCK else BLOCK
        GROUPS: tl.constexpr = BLOCK // SIZE
        bits = tl.reshape(magnitude_bits(values, QUANT.NOT_A_NUMBER), [ROWS, GROUPS, SIZE])
        group_largest = tl.reduce(bits, 2, _elementwise_max).to(tl.float32, bitcast=True)  # [ROWS, GROUPS]
        result, step = scale_and_step(group_largest, given, QUANT)
        group = c * GROUPS + tl.arange(0, GROUPS)[None, :]
        tl.store(scales_row + group * scale_group_stride, result, mask=live & (group * SIZE < N))
        wide = tl.broadcast_to(step[:, :, None], [ROWS, GROUPS, SIZE])
        steps = in_steps(values, tl.reshape(wide, [ROWS, BLOCK]), given, QUANT.STEP, QUANT.LIMIT)
    store_row(quantised_row, cols, c, quantised(steps, QUANT.INT8, QUANT.NOT_A_NUMBER), live, N, BLOCK, ROWS)


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
    STREAMED: tl.constexpr,
    LEAN: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    FUSED_ADD: tl.constexpr,
    PACKED: tl.constexpr,
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
    APPROXIMATE: tl.constexpr,
):
    """GROUP: columns that share a scale; 0: the scale is given; N: all of a row. GIVEN: there is something at
    given_ptr. APPROXIMATE: the quotients of "inverse_first" are NVIDIA's approximate instructions."""
    rows, cols, live = rows_of_program(num_rows, ROWS, BLOCK)
    x_row = x_ptr + row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    residual_row = residual_ptr + row_offset(rows, inner, residual_stride, residual_inner_stride, NESTED, VEC)
    quantised_row = dense_row(rows_ptr, rows, N)
    y_row = dense_row(y_ptr, rows, N)
    scales_row = scales_ptr + rows.to(tl.int64) * scale_row_stride
    weight = weight_row(weight_ptr, rows, N, VEC, 1)
    if DEPENDENT:
        wait_for_inputs()
    QUANT: tl.constexpr = Quantisation(
        GROUP,
        INT8,
        LIMIT,
        STEP,
        NOT_A_NUMBER,
        LARGEST_AT_LEAST,
        SCALE_AT_LEAST,
        ROUNDED_SCALE_AT_LEAST,
        POWER_OF_TWO,
        GIVEN,
        APPROXIMATE,
    )
    given = 0.0
    if GIVEN:
        given = tl.load(given_ptr)

    NARROW: tl.constexpr = LEAN and (ROUND_SUM or not FUSED_ADD)  # what is kept is of x's dtype
    WRITTEN_LAST: tl.constexpr = FUSED_ADD and not ROUND_SUM  # the sum of streamed chunks, which are read again
    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    kept = ()
    for c in tl.static_range(0, CHUNKS):
        total = load_row(x_row, cols, c, live, N, BLOCK, ROWS)
        h = total.to(tl.float32)
        if FUSED_ADD:
            h += load_row(residual_row, cols, c, live, N, BLOCK, ROWS).to(tl.float32)
            total = h.to(x_ptr.dtype.element_ty)
            if NARROW:
                total = in_pairs(total, PACKED)
            if ROUND_SUM:
                h = total.to(tl.float32)
            if not (WRITTEN_LAST and c < STREAMED):
                store_row(residual_row, cols, c, total, live, N, BLOCK, ROWS)
        squares += square(h, c * BLOCK + cols, WIDTH, N)
        if LEAN:
            squares = added_by_now(squares, PACKED)
        if c >= STREAMED:
            kept = kept + (total if NARROW else h,)
    if DEPENDENT:
        launch_dependents()
    rstd = reciprocal_rms(squares, eps, WIDTH)
    if STREAMED > 0:
        # The sum comes back through other threads than those that wrote it.
        tl.debug_barrier()

    # Chunks that are kept come before streamed ones, which need their registers.
    BEGIN: tl.constexpr = CHUNKS - 1 if STREAMED > 0 else 0
    END: tl.constexpr = -1 if STREAMED > 0 else CHUNKS
    BY: tl.constexpr = -1 if STREAMED > 0 else 1
    zero = opaque_zero(rstd, num_rows)
    values = ()
    largest = tl.full([ROWS, 1], 0, tl.int32)
    for c in tl.static_range(BEGIN, END, BY):
        if c < STREAMED:
            h = read_again(x_row, residual_row, cols, c, live, N, BLOCK, ROWS, FUSED_ADD, ROUND_SUM)
        elif NARROW:
            h = widened_again(kept[c - STREAMED], zero, PACKED)
        else:
            h = kept[c - STREAMED]
        y, value = results_of(
            h * rstd, weight, cols, c, N, BLOCK, ROWS, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT, FROM_F32
        )
        if BOTH:
            store_row(y_row, cols, c, y, live, N, BLOCK, ROWS)
        if GROUP == N:
            bits = magnitude_bits(value, NOT_A_NUMBER)
            largest = tl.maximum(largest, tl.reduce(bits, 1, _elementwise_max)[:, None])
        if not LEAN:
            values = values + (value,)
        elif GROUP != N:
            if WRITTEN_LAST and c < STREAMED:
                # Every thread has read the chunk before one of them overwrites it.
                tl.debug_barrier()
                store_row(residual_row, cols, c, h.to(x_ptr.dtype.element_ty), live, N, BLOCK, ROWS)
            store_in_groups(
                quantised_row,
                scales_row,
                value,
                given,
                cols,
                c,
                live,
                scale_group_stride,
                N,
                BLOCK,
                ROWS,
                QUANT,
            )

    if GROUP == N:
        row_largest = largest.to(tl.float32, bitcast=True)
        result, step = scale_and_step(row_largest, given, QUANT)
        tl.store(scales_row, result, mask=live)
        zero = opaque_zero(row_largest, num_rows)
        for c in tl.static_range(BEGIN, END, BY):
            if LEAN:
                if c < STREAMED:
                    h = read_again(x_row, residual_row, cols, c, live, N, BLOCK, ROWS, FUSED_ADD, ROUND_SUM)
                    if WRITTEN_LAST:
                        tl.debug_barrier()
                        store_row(residual_row, cols, c, h.to(x_ptr.dtype.element_ty), live, N, BLOCK, ROWS)
                elif NARROW:
                    h = widened_again(kept[c - STREAMED], zero, PACKED)
                else:
                    h = kept[c - STREAMED]
                _, value = results_of(
                    h * rstd, weight, cols, c, N, BLOCK, ROWS, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT, FROM_F32
                )
            else:
                value = values[c]
            steps = in_steps(value, step, row_largest, STEP, LIMIT)
            store_row(quantised_row, cols, c, quantised(steps, INT8, NOT_A_NUMBER), live, N, BLOCK, ROWS)
    elif not LEAN:
        for c in tl.static_range(0, CHUNKS):
            store_in_groups(
                quantised_row,
                scales_row,
                values[c],
                given,
                cols,
                c,
                live,
                scale_group_stride,
                N,
                BLOCK,
                ROWS,
                QUANT,
            )
