"""Device code that the kernels share: which rows a program has, where a row lies and how it is loaded and kept, its
reciprocal RMS, the weight."""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl

# The combine function of `tl.sum`. `tl.sum` itself is compiled code that the CPU interpreter enters only if
# TRITON_INTERPRET was set before triton was imported; `tl.reduce` with this function it knows at any time.
from triton.language.standard import _sum_combine

UNROLL: tl.constexpr = tl.constexpr(4)
"""Chunks of a streamed row that are loaded before the first of them is used."""

PREFETCH_FROM: tl.constexpr = tl.constexpr(1024)
"""Rows of a launch from which `prefetch` runs. It pays where rows come from memory (4096 of them) and costs where few
lie in the L2 already. It computes nothing, so a row's bits do not depend on it."""


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
def rows_of_program(num_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows [ROWS, 1], columns of a chunk [1, BLOCK], which rows there are [ROWS, 1]) of this program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return rows, tl.arange(0, BLOCK)[None, :], rows < num_rows


@triton.jit
def dense_row(pointer, rows, N: tl.constexpr):
    """Where each of `rows` starts in a contiguous tensor."""
    return pointer + rows.to(tl.int64) * N


@triton.jit
def load_unrolled(row, cols, first, BLOCK: tl.constexpr):
    """The UNROLL chunks of a streamed row from chunk `first` on."""
    parts = ()
    for c in tl.static_range(UNROLL):
        parts = parts + (tl.load(row + (first + c) * BLOCK + cols),)
    return parts


@triton.jit
def load_row(row, cols, c: tl.constexpr, live, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Chunk `c` of each row; 0 beyond its end. Only a last chunk, and programs of several rows, need the mask."""
    at = c * BLOCK + cols
    if ROWS == 1 and (c + 1) * BLOCK <= N:
        return tl.load(row + at)
    return tl.load(row + at, mask=live & (at < N), other=0.0)


@triton.jit
def store_row(row, cols, c: tl.constexpr, values, live, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    at = c * BLOCK + cols
    if ROWS == 1 and (c + 1) * BLOCK <= N:
        tl.store(row + at, values)
    else:
        tl.store(row + at, values, mask=live & (at < N))


@triton.jit
def weight_row(weight_ptr, rows, N: tl.constexpr, VEC: tl.constexpr, GROUPS: tl.constexpr):
    """Where the weight of each row starts, known to be no better aligned than the rows are.

    The compiler gives a thread as many neighbouring columns as the best aligned operand allows. With a 16-byte weight
    beside rows of odd length every thread read 8 neighbours two bytes at a time, and the stores went through shared
    memory.
    """
    if VEC * weight_ptr.dtype.element_ty.primitive_bitwidth < 128:
        weight_ptr += tl.program_id(1) * VEC  # 0, as the compiler cannot know
    if GROUPS > 1:
        weight_ptr += (rows % GROUPS) * N
    return weight_ptr


@triton.jit
def load_weight(weight, cols, c: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Chunk `c` of the weight, [ROWS, BLOCK]: loaded in the shape of the rows, so that every thread gets the columns of
    its own values. A chunk of shape [1, BLOCK] came through shared memory, with two barriers."""
    at = c * BLOCK + cols + tl.full([ROWS, 1], 0, tl.int32)
    if (c + 1) * BLOCK <= N:
        return tl.load(weight + at)
    return tl.load(weight + at, mask=at < N, other=0.0)


@triton.jit
def load_weights(
    weight,
    cols,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Chunks FIRST to LAST - 1 of the weight."""
    ws = ()
    for c in tl.static_range(FIRST, LAST):
        ws = ws + (load_weight(weight, cols, c, N, BLOCK, ROWS),)
    return ws


@triton.jit
def wait_for_inputs():
    """In a launch that may start before the previous kernel has ended (sm_90): wait for its end. Everything that it
    could have written is read below this, the weight too. Above stand only prefetches, which read nothing."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def launch_dependents():
    """Let the next kernel start beside this one, if it was launched to do so."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch(row, N: tl.constexpr):
    """The row at `row` [1, 1] into the L2, in one request of thread 0, widened to whole 16-byte units."""
    size: tl.constexpr = N * (row.dtype.element_ty.primitive_bitwidth // 8)
    first = row.to(tl.int64)
    start = first & -16
    count = (((first + size + 15) & -16) - start).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; } // $0",
        "=r,l,r",
        [start, count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_weight(weight_ptr, COUNT: tl.constexpr):
    """The `COUNT` elements of the weight into the L2, in one request of the first program: once there, they are so for
    all."""
    size: tl.constexpr = COUNT * (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    first = weight_ptr.to(tl.int64)
    start = first & -16
    count = (((first + size + 15) & -16) - start).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t, b; mov.u32 t, %tid.x; mov.u32 b, %ctaid.x; or.b32 t, t, b; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; } // $0",
        "=r,l,r",
        [start, count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def opaque_zero(rstd, num_rows):
    """0, as the compiler cannot know, that depends on `rstd`."""
    return rstd.to(tl.int32, bitcast=True) & (num_rows < 0).to(tl.int32)


@triton.jit
def widened_again(x, zero, PACKED: tl.constexpr):
    """fp32 of `x`, converted anew after the reduction. PACKED (16-bit rows on NVIDIA): left alone, the compiler keeps
    the fp32 values of before, twice the registers: 111 in place of 58 for a row of 32768 in 512 threads."""
    if PACKED:
        zeros = tl.full(x.shape, 0, tl.int32) + zero
        x = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2; // $3", "=r,r,r,r", [x, zeros], dtype=x.dtype, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def in_pairs(x, PACKED: tl.constexpr):
    """`x`, its neighbouring 16-bit columns in one register each. The move costs nothing: ptxas drops it. Left alone, a
    compiler that looks for vectors pairs columns as their squares are added up, and keeps both orders in registers."""
    if PACKED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    return x


@triton.jit
def added_by_now(squares, PACKED: tl.constexpr):
    """`squares`, added before anything below is loaded. Left alone, a compiler may leave the squares of all chunks for
    the end of the row, whose chunks then are in registers twice."""
    if PACKED:
        squares = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [squares], dtype=tl.float32, is_pure=False, pack=1
        )
    return squares


@triton.jit
def sum_after_rounding(product, term, zero, NVIDIA: tl.constexpr):
    """product + term, fp32 values, where `product` may come straight out of a multiplication: that keeps its own
    rounding. Left alone, the compiler contracts the two to an FMA, also of bf16 values, which an add then joins.

    An add with its rounding named is never contracted. Elsewhere -0, which the compiler cannot know, is added first:
    an FMA of a product and -0 is the rounded product.
    """
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [product, term], dtype=tl.float32, is_pure=True, pack=1
        )
    return (product + (zero | -2147483648).to(tl.float32, bitcast=True)) + term


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
    contracted to an FMA, so the result is the reference's, bit for bit, for an equal rstd. Who adds to the result takes
    `sum_after_rounding`.
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
