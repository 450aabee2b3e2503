"""y = norm(x) * act(gate), or norm(x * act(gate)): one read of x and the gate, one write of y.

Every program handles ROWS whole rows, in CHUNKS chunks of BLOCK columns, on the schedule of the norm for that length.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl

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
def exponential(x):
    """e^x to the last bits: 2^k * e^r with r within a half, where `tl.exp` loses a bit for each bit of x."""
    x = tl.where(x > 100.0, 100.0, tl.where(x < -150.0, -150.0, x))  # NaN stays
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) + k * 2.12194440e-4  # ln 2 in two parts: the first product is exact
    half = tl.floor(k * 0.5)  # 2^k itself may be no fp32 where the result is one
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(k - half)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """The activation of the gate, in fp32."""
    gate = gate.to(tl.float32)
    denominator = 1.0 + exponential(-gate)
    if ACTIVATION == "silu":
        return tl.div_rn(gate, denominator)
    return tl.div_rn(tl.full(gate.shape, 1.0, tl.float32), denominator)


@triton.jit(do_not_specialize=["num_rows", "inner", "x_stride", "x_inner_stride", "gate_stride", "gate_inner_stride"])
def rms_norm_gated(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    eps,
    num_rows,
    inner,
    x_stride,
    x_inner_stride,
    gate_stride,
    gate_inner_stride,
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
    DEPENDENT: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    rows, cols, live = rows_of_program(num_rows, ROWS, BLOCK)
    x_row = x_ptr + row_offset(rows, inner, x_stride, x_inner_stride, NESTED, VEC)
    gate_row = gate_ptr + row_offset(rows, inner, gate_stride, gate_inner_stride, NESTED, VEC)
    y_row = dense_row(y_ptr, rows, N)
    weight = weight_row(weight_ptr, rows, N, VEC, GROUPS)
    if DEPENDENT:
        wait_for_inputs()

    squares = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    kept = ()
    gates = ()
    for c in tl.static_range(0, CHUNKS):
        h = load_row(x_row, cols, c, live, N, BLOCK, ROWS).to(tl.float32)
        gate = load_row(gate_row, cols, c, live, N, BLOCK, ROWS)
        if GATE_FIRST:
            h *= activated(gate, ACTIVATION)
        else:
            gates = gates + (gate,)
        squares += square(h, c * BLOCK + cols, WIDTH, N)
        kept = kept + (h,)
    if DEPENDENT:
        launch_dependents()
    rstd = reciprocal_rms(squares, eps, WIDTH)

    for c in tl.static_range(0, CHUNKS):
        w = 0.0
        if HAS_WEIGHT:
            w = load_weight(weight, cols, c, N, BLOCK, ROWS)
        y = scale(kept[c] * rstd, w, HAS_WEIGHT, OFFSET, ROUNDED, PRODUCT, OUT)
        if not GATE_FIRST:
            y = (y.to(tl.float32) * activated(gates[c], ACTIVATION)).to(x_ptr.dtype.element_ty)
        store_row(y_row, cols, c, y, live, N, BLOCK, ROWS)
