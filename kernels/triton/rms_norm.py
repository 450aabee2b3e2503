"""y = rms_norm(x): one read of x, one write of y.

Every program handles ROWS whole rows, in CHUNKS chunks of BLOCK columns. The last chunks of a row stay in registers
from the sum of squares to the result; the first STREAMED ones, of rows too long for that, are read twice. The schedule
depends on N and the dtypes, never on the number of rows.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl

from .row_math import (
    PREFETCH_FROM,
    UNROLL,
    dense_row,
    launch_dependents,
    load_row,
    load_unrolled,
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


@triton.jit(do_not_specialize=["num_rows", "inner", "x_stride", "x_inner_stride"])
def rms_norm(
    x_ptr,
    weight_ptr,
    y_ptr,
    eps,
    num_rows,
    inner,
    x_stride,
    x_inner_stride,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STREAMED: tl.constexpr,
    AHEAD: tl.constexpr,
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    PACKED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PREFETCH_WEIGHT: tl.constexpr,
):
    rows, cols, live = rows_of_program(num_rows, ROWS, BLOCK)
    x_row = x_ptr + row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    y_row = dense_row(y_ptr, rows, N)
    weight = weight_row(weight_ptr, rows, N, VEC, GROUPS)

    ws = ()
    if DEPENDENT:
        if PREFETCH and num_rows >= PREFETCH_FROM:
            prefetch(x_row, N)
        if HAS_WEIGHT and PREFETCH_WEIGHT:
            prefetch_weight(weight_ptr, N * GROUPS)
        wait_for_inputs()
    xs = ()
    for c in tl.static_range(STREAMED, CHUNKS):
        xs = xs + (load_row(x_row, cols, c, live, N, BLOCK, ROWS),)
    if HAS_WEIGHT:
        ws = load_weights(weight, cols, STREAMED, min(STREAMED + AHEAD, CHUNKS), N, BLOCK, ROWS)

    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    if STREAMED > 0:
        for first in range(0, STREAMED, UNROLL):
            parts = load_unrolled(x_row, cols, first, BLOCK)
            for c in tl.static_range(UNROLL):
                squares += square(parts[c].to(tl.float32), (first + c) * BLOCK + cols, WIDTH, N)
    if DEPENDENT:
        launch_dependents()
    for c in tl.static_range(STREAMED, CHUNKS):
        squares += square(xs[c - STREAMED].to(tl.float32), c * BLOCK + cols, WIDTH, N)
    rstd = reciprocal_rms(squares, eps, WIDTH)

    zero = opaque_zero(rstd, num_rows)
    for c in tl.static_range(STREAMED, CHUNKS):
        w = 0.0
        if HAS_WEIGHT:
            if c + AHEAD < CHUNKS:
                ws = ws + (load_weight(weight, cols, c + AHEAD, N, BLOCK, ROWS),)
            w = ws[c - STREAMED]
        h = widened_again(xs[c - STREAMED], zero, PACKED)
        y = scale(h * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        store_row(y_row, cols, c, y, live, N, BLOCK, ROWS)
    if STREAMED > 0:
        for first in range(0, STREAMED, UNROLL):
            parts = load_unrolled(x_row, cols, first, BLOCK)
            for c in tl.static_range(UNROLL):
                at = (first + c) * BLOCK + cols
                w = 0.0
                if HAS_WEIGHT:
                    w = tl.load(weight + at)
                y = scale(parts[c].to(tl.float32) * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
                tl.store(y_row + at, y)
