"""total = rms_norm(x) + residual, and with NEXT y = rms_norm(total) with a weight and eps of its own.

Every program handles ROWS whole rows, in CHUNKS chunks of BLOCK columns, on the schedule that both norms have for that
length: each reduction adds in their order, and each step rounds as theirs does. ROUND_SUM: the second norm reads the
sum as it is stored; else in fp32. The results are contiguous.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl

from .row_math import (
    dense_row,
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
    sum_after_rounding,
    wait_for_inputs,
    weight_row,
    widened_again,
)


@triton.jit(
    do_not_specialize=["num_rows", "inner", "x_stride", "x_inner_stride", "residual_stride", "residual_inner_stride"]
)
def rms_norm_add(
    x_ptr,
    residual_ptr,
    weight_ptr,
    next_weight_ptr,
    y_ptr,
    total_ptr,
    eps,
    next_eps,
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
    NESTED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    PACKED: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    NVIDIA: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NEXT: tl.constexpr,
):
    rows, cols, live = rows_of_program(num_rows, ROWS, BLOCK)
    x_row = x_ptr + row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    residual_row = residual_ptr + row_offset(rows, inner, residual_stride, residual_inner_stride, NESTED, VEC)
    y_row = dense_row(y_ptr, rows, N)
    total_row = dense_row(total_ptr, rows, N)
    weight = weight_row(weight_ptr, rows, N, VEC, 1)
    next_weight = weight_row(next_weight_ptr, rows, N, VEC, 1)

    if DEPENDENT:
        wait_for_inputs()
    xs = ()
    residuals = ()
    for c in tl.static_range(CHUNKS):
        xs = xs + (load_row(x_row, cols, c, live, N, BLOCK, ROWS),)
        residuals = residuals + (load_row(residual_row, cols, c, live, N, BLOCK, ROWS),)
    if DEPENDENT:
        launch_dependents()
    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for c in tl.static_range(CHUNKS):
        squares += square(xs[c].to(tl.float32), c * BLOCK + cols, WIDTH, N)
    rstd = reciprocal_rms(squares, eps, WIDTH)

    zero = opaque_zero(rstd, num_rows)
    kept = ()
    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for c in tl.static_range(CHUNKS):
        w = 0.0
        if HAS_WEIGHT:
            w = load_weight(weight, cols, c, N, BLOCK, ROWS)
        h = widened_again(xs[c], zero, PACKED)
        normed = scale(h * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        held = sum_after_rounding(normed.to(tl.float32), residuals[c].to(tl.float32), zero, NVIDIA)
        total = held.to(OUT)
        if ROUND_SUM:
            held = total
        kept = kept + (held,)
        at = c * BLOCK + cols
        # Beyond a row's end an offset or an infinite rstd may have made something of nothing.
        squares += square(tl.where(at < N, held, 0.0).to(tl.float32), at, WIDTH, N)
        store_row(total_row, cols, c, total, live, N, BLOCK, ROWS)

    if NEXT:
        rstd = reciprocal_rms(squares, next_eps, WIDTH)
        zero = opaque_zero(rstd, num_rows)
        for c in tl.static_range(CHUNKS):
            w = 0.0
            if HAS_WEIGHT:
                w = load_weight(next_weight, cols, c, N, BLOCK, ROWS)
            h = widened_again(kept[c], zero, PACKED and ROUND_SUM)
            y = scale(h * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
            store_row(y_row, cols, c, y, live, N, BLOCK, ROWS)
