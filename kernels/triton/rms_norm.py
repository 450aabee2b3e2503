"""y = rms_norm(x): one read of x, one write of y.

`rms_norm` holds its rows in registers (CHUNKS chunks of BLOCK columns); `rms_norm_long` reads a row twice.
Every program handles ROWS whole rows. The schedule depends on N and the dtypes, never on the number of rows.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl

from .row_math import reciprocal_rms, row_offset, scale, square


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
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    live = rows < num_rows
    x_row = x_ptr + row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    y_row = y_ptr + rows.to(tl.int64) * N
    if GROUPS > 1:
        weight_ptr += (rows % GROUPS) * N

    xs = ()
    for c in tl.static_range(CHUNKS):
        at = c * BLOCK + cols
        if ROWS == 1 and (c + 1) * BLOCK <= N:
            xs = xs + (tl.load(x_row + at),)
        else:
            xs = xs + (tl.load(x_row + at, mask=live & (at < N), other=0.0),)

    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    for c in tl.static_range(CHUNKS):
        squares += square(xs[c].to(tl.float32), c * BLOCK + cols, WIDTH, N)
    rstd = reciprocal_rms(squares, eps, WIDTH)

    for c in tl.static_range(CHUNKS):
        at = c * BLOCK + cols
        w = 0.0
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + at, mask=at < N, other=0.0)
        y = scale(xs[c].to(tl.float32) * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        if ROWS == 1 and (c + 1) * BLOCK <= N:
            tl.store(y_row + at, y)
        else:
            tl.store(y_row + at, y, mask=live & (at < N))


@triton.jit(do_not_specialize=["num_rows", "inner", "x_stride", "x_inner_stride"])
def rms_norm_long(
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
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    OUT: tl.constexpr,
):
    rows = tl.program_id(0) + tl.arange(0, 1)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    x_row = x_ptr + row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    y_row = y_ptr + rows.to(tl.int64) * N
    if GROUPS > 1:
        weight_ptr += (rows % GROUPS) * N

    squares = tl.full([1, BLOCK], 0.0, tl.float32)
    for c in range(CHUNKS):
        at = c * BLOCK + cols
        x = tl.load(x_row + at, mask=at < N, other=0.0)
        squares += square(x.to(tl.float32), at, WIDTH, N)
    rstd = reciprocal_rms(squares, eps, WIDTH)

    for c in range(CHUNKS):
        at = c * BLOCK + cols
        x = tl.load(x_row + at, mask=at < N, other=0.0)
        w = 0.0
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + at, mask=at < N, other=0.0)
        y = scale(x.to(tl.float32) * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        tl.store(y_row + at, y, mask=at < N)
