"""total = x + residual; y = rms_norm(total): two reads, two writes.

Every program handles ROWS whole rows, in CHUNKS chunks of BLOCK columns. The last chunks of a row stay in registers
from the sum of squares to the result; of the first STREAMED ones, in rows too long for that, the sum is written and
read back (from L2). The schedule depends on N and the dtypes, never on the number of rows. IN_PLACE: total goes to
`residual` and y to `x`, with their strides; else both are contiguous. x and residual may differ in dtype: the sum
then has that of `total_ptr`, which the schedule is made for.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl

from .row_math import (
    PREFETCH_FROM,
    UNROLL,
    added_by_now,
    dense_row,
    in_pairs,
    launch_dependents,
    load_row,
    load_weight,
    load_weights,
    opaque_zero,
    prefetch,
    prefetch_weight,
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


@triton.jit(
    do_not_specialize=["num_rows", "inner", "x_stride", "x_inner_stride", "residual_stride", "residual_inner_stride"]
)
def fused_add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    eps,
    num_rows,
    inner,
    x_stride,
    x_inner_stride,
    residual_stride,
    residual_inner_stride,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STREAMED: tl.constexpr,
    BATCH: tl.constexpr,
    AHEAD: tl.constexpr,
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PACKED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PREFETCH_WEIGHT: tl.constexpr,
    LAUNCH_LATE: tl.constexpr,
):
    rows, cols, live = rows_of_program(num_rows, ROWS, BLOCK)
    x_at = row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    residual_at = row_offset(rows, inner, residual_stride, residual_inner_stride, NESTED, VEC)
    x_row = x_ptr + x_at
    residual_row = residual_ptr + residual_at
    if IN_PLACE:
        y_row = y_ptr + x_at
        total_row = total_ptr + residual_at
    else:
        y_row = dense_row(y_ptr, rows, N)
        total_row = dense_row(total_ptr, rows, N)
    weight = weight_row(weight_ptr, rows, N, VEC, GROUPS)

    ws = ()
    if DEPENDENT:
        if PREFETCH and num_rows >= PREFETCH_FROM:
            prefetch(x_row, N)
            prefetch(residual_row, N)
        if HAS_WEIGHT and PREFETCH_WEIGHT:
            prefetch_weight(weight_ptr, N * GROUPS)
        wait_for_inputs()

    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    if STREAMED > 0:
        for first in range(0, STREAMED, UNROLL):
            xs = ()
            residuals = ()
            for c in tl.static_range(UNROLL):
                at = (first + c) * BLOCK + cols
                xs = xs + (tl.load(x_row + at),)
                residuals = residuals + (tl.load(residual_row + at),)
            for c in tl.static_range(UNROLL):
                at = (first + c) * BLOCK + cols
                h = xs[c].to(tl.float32) + residuals[c].to(tl.float32)
                if ROUND_SUM:
                    total = h.to(total_ptr.dtype.element_ty)
                    h = total.to(tl.float32)
                    tl.store(total_row + at, total)
                squares += square(h, at, WIDTH, N)

    # All loads of a batch stand before its first store: no load may move above a store that could alias it.
    kept = ()
    for first in tl.static_range(STREAMED, CHUNKS, BATCH):
        xs = ()
        residuals = ()
        for c in tl.static_range(first, min(first + BATCH, CHUNKS)):
            xs = xs + (load_row(x_row, cols, c, live, N, BLOCK, ROWS),)
            residuals = residuals + (load_row(residual_row, cols, c, live, N, BLOCK, ROWS),)
        if first + BATCH >= CHUNKS:
            if HAS_WEIGHT:
                ws = load_weights(weight, cols, STREAMED, min(STREAMED + AHEAD, CHUNKS), N, BLOCK, ROWS)
            if DEPENDENT and not LAUNCH_LATE:
                launch_dependents()
        for c in tl.static_range(first, min(first + BATCH, CHUNKS)):
            h = xs[c - first].to(tl.float32) + residuals[c - first].to(tl.float32)
            total = in_pairs(h.to(total_ptr.dtype.element_ty), PACKED)
            if ROUND_SUM:
                h = total.to(tl.float32)
                kept = kept + (total,)
            else:
                kept = kept + (h,)
            squares += square(h, c * BLOCK + cols, WIDTH, N)
            store_row(total_row, cols, c, total, live, N, BLOCK, ROWS)
        squares = added_by_now(squares, PACKED)
    rstd = reciprocal_rms(squares, eps, WIDTH)
    if DEPENDENT and LAUNCH_LATE:
        launch_dependents()
    if STREAMED > 0:
        # The sum comes back through other threads than those that wrote it.
        tl.debug_barrier()

    zero = opaque_zero(rstd, num_rows)
    for c in tl.static_range(STREAMED, CHUNKS):
        w = 0.0
        if HAS_WEIGHT:
            if c + AHEAD < CHUNKS:
                ws = ws + (load_weight(weight, cols, c + AHEAD, N, BLOCK, ROWS),)
            w = ws[c - STREAMED]
        h = widened_again(kept[c - STREAMED], zero, PACKED and ROUND_SUM)
        y = scale(h * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        store_row(y_row, cols, c, y, live, N, BLOCK, ROWS)
    if STREAMED > 0:
        for first in range(0, STREAMED, UNROLL):
            hs = ()
            for c in tl.static_range(UNROLL):
                at = (first + c) * BLOCK + cols
                if ROUND_SUM:
                    hs = hs + (tl.load(total_row + at).to(tl.float32),)
                else:
                    x = tl.load(x_row + at)
                    hs = hs + (x.to(tl.float32) + tl.load(residual_row + at).to(tl.float32),)
            for c in tl.static_range(UNROLL):
                at = (first + c) * BLOCK + cols
                if not ROUND_SUM:
                    tl.store(total_row + at, hs[c].to(total_ptr.dtype.element_ty))
                w = 0.0
                if HAS_WEIGHT:
                    w = tl.load(weight + at)
                y = scale(hs[c] * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
                tl.store(y_row + at, y)
