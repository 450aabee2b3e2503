"""total = x + residual; y = rms_norm(total): two reads, two writes.

`fused_add_rms_norm` holds its rows in registers (CHUNKS chunks of BLOCK columns); `fused_add_rms_norm_long` writes the
sum, then reads it back (from L2). Every program handles ROWS whole rows; the schedule depends on N and the dtypes,
never on the number of rows. IN_PLACE: total goes to `residual` and y to `x`, with their strides; else both are
contiguous.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl

from .row_math import reciprocal_rms, row_offset, scale, square


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
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    live = rows < num_rows
    x_at = row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    residual_at = row_offset(rows, inner, residual_stride, residual_inner_stride, NESTED, VEC)
    x_row = x_ptr + x_at
    residual_row = residual_ptr + residual_at
    if IN_PLACE:
        y_row = y_ptr + x_at
        total_row = total_ptr + residual_at
    else:
        y_row = y_ptr + rows.to(tl.int64) * N
        total_row = total_ptr + rows.to(tl.int64) * N
    if GROUPS > 1:
        weight_ptr += (rows % GROUPS) * N

    # All loads stand before the first store: the compiler may not move a load above a store that could alias it.
    xs = ()
    residuals = ()
    for c in tl.static_range(CHUNKS):
        at = c * BLOCK + cols
        if ROWS == 1 and (c + 1) * BLOCK <= N:
            xs = xs + (tl.load(x_row + at),)
            residuals = residuals + (tl.load(residual_row + at),)
        else:
            xs = xs + (tl.load(x_row + at, mask=live & (at < N), other=0.0),)
            residuals = residuals + (tl.load(residual_row + at, mask=live & (at < N), other=0.0),)

    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    hs = ()
    for c in tl.static_range(CHUNKS):
        at = c * BLOCK + cols
        h = xs[c].to(tl.float32) + residuals[c].to(tl.float32)
        total = h.to(xs[c].dtype)
        if ROUND_SUM:
            h = total.to(tl.float32)
        hs = hs + (h,)
        squares += square(h, at, WIDTH, N)
        if ROWS == 1 and (c + 1) * BLOCK <= N:
            tl.store(total_row + at, total)
        else:
            tl.store(total_row + at, total, mask=live & (at < N))
    rstd = reciprocal_rms(squares, eps, WIDTH)

    for c in tl.static_range(CHUNKS):
        at = c * BLOCK + cols
        w = 0.0
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + at, mask=at < N, other=0.0)
        y = scale(hs[c] * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        if ROWS == 1 and (c + 1) * BLOCK <= N:
            tl.store(y_row + at, y)
        else:
            tl.store(y_row + at, y, mask=live & (at < N))


@triton.jit(
    do_not_specialize=["num_rows", "inner", "x_stride", "x_inner_stride", "residual_stride", "residual_inner_stride"]
)
def fused_add_rms_norm_long(
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
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    rows = tl.program_id(0) + tl.arange(0, 1)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    x_at = row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    residual_at = row_offset(rows, inner, residual_stride, residual_inner_stride, NESTED, VEC)
    x_row = x_ptr + x_at
    residual_row = residual_ptr + residual_at
    if IN_PLACE:
        y_row = y_ptr + x_at
        total_row = total_ptr + residual_at
    else:
        y_row = y_ptr + rows.to(tl.int64) * N
        total_row = total_ptr + rows.to(tl.int64) * N
    if GROUPS > 1:
        weight_ptr += (rows % GROUPS) * N

    squares = tl.full([1, BLOCK], 0.0, tl.float32)
    for c in range(CHUNKS):
        at = c * BLOCK + cols
        x = tl.load(x_row + at, mask=at < N, other=0.0)
        residual = tl.load(residual_row + at, mask=at < N, other=0.0)
        h = x.to(tl.float32) + residual.to(tl.float32)
        total = h.to(x.dtype)
        if ROUND_SUM:
            h = total.to(tl.float32)
            tl.store(total_row + at, total, mask=at < N)
        squares += square(h, at, WIDTH, N)
    rstd = reciprocal_rms(squares, eps, WIDTH)
    # The sum comes back through other threads than those that wrote it.
    tl.debug_barrier()

    for c in range(CHUNKS):
        at = c * BLOCK + cols
        if ROUND_SUM:
            h = tl.load(total_row + at, mask=at < N, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_row + at, mask=at < N, other=0.0)
            h = x.to(tl.float32) + tl.load(residual_row + at, mask=at < N, other=0.0).to(tl.float32)
            tl.store(total_row + at, h.to(x.dtype), mask=at < N)
        w = 0.0
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + at, mask=at < N, other=0.0)
        y = scale(h * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        tl.store(y_row + at, y, mask=at < N)
