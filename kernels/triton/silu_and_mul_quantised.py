"""Rows of fp8 or int8, and their scales, of silu(gate) * up.

`rmsnorm_patch/numerics/silu.py` says what is computed, but for the exponential, which is this one's own. Every program
handles ROWS whole rows, in CHUNKS chunks of BLOCK columns, on the schedule of the norm for that length.
"""

# ruff: noqa: RUF005 - Triton knows `xs + (x,)` and not `(*xs, x)`
import triton
import triton.language as tl
from triton.language.standard import _elementwise_max

from .quantise import Quantisation, in_steps, magnitude_bits, quantised, scale_and_step
from .rms_norm_gated import exponential
from .rms_norm_quantised import store_in_groups
from .row_math import (
    dense_row,
    launch_dependents,
    load_row,
    row_offset,
    rows_of_program,
    store_row,
    wait_for_inputs,
)


@triton.jit
def silu_times(gate, up, SILU: tl.constexpr):
    """silu(gate) * up in fp32, for gates and others of one 16-bit type."""
    wide = gate.to(tl.float32)
    denominator = 1.0 + exponential(-wide)
    if SILU == "product":
        factor = wide * tl.div_rn(tl.full(wide.shape, 1.0, tl.float32), denominator)
    else:
        factor = tl.div_rn(wide, denominator)
    if SILU == "rounded":
        factor = factor.to(gate.dtype).to(tl.float32)
    return factor * up.to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "inner",
        "gate_stride",
        "gate_inner_stride",
        "up_stride",
        "up_inner_stride",
        "scale_row_stride",
        "scale_group_stride",
    ]
)
def silu_and_mul_quantised(
    gate_ptr,
    up_ptr,
    given_ptr,
    rows_ptr,
    scales_ptr,
    num_rows,
    inner,
    gate_stride,
    gate_inner_stride,
    up_stride,
    up_inner_stride,
    scale_row_stride,
    scale_group_stride,
    N: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NESTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SILU: tl.constexpr,
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
    APPROXIMATE: tl.constexpr,
):
    """GROUP: columns that share a scale; 0: the scale is given; N: all of a row. GIVEN: there is something at
    given_ptr. APPROXIMATE: the quotients of "inverse_first" are NVIDIA's approximate instructions."""
    rows, cols, live = rows_of_program(num_rows, ROWS, BLOCK)
    gate_row = gate_ptr + row_offset(rows, inner, gate_stride, gate_inner_stride, NESTED, VEC)
    up_row = up_ptr + row_offset(rows, inner, up_stride, up_inner_stride, NESTED, VEC)
    quantised_row = dense_row(rows_ptr, rows, N)
    scales_row = scales_ptr + rows.to(tl.int64) * scale_row_stride
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

    values = ()
    largest = tl.full([ROWS, 1], 0, tl.int32)
    for c in tl.static_range(0, CHUNKS):
        gate = load_row(gate_row, cols, c, live, N, BLOCK, ROWS)
        value = silu_times(gate, load_row(up_row, cols, c, live, N, BLOCK, ROWS), SILU)
        if not FROM_F32:
            value = value.to(gate.dtype).to(tl.float32)
        values = values + (value,)
        if GROUP == N:
            bits = magnitude_bits(value, NOT_A_NUMBER)
            largest = tl.maximum(largest, tl.reduce(bits, 1, _elementwise_max)[:, None])
    if DEPENDENT:
        launch_dependents()

    if GROUP == N:
        row_largest = largest.to(tl.float32, bitcast=True)
        result, step = scale_and_step(row_largest, given, QUANT)
        tl.store(scales_row, result, mask=live)
        for c in tl.static_range(0, CHUNKS):
            steps = in_steps(values[c], step, row_largest, STEP, LIMIT)
            store_row(quantised_row, cols, c, quantised(steps, INT8, NOT_A_NUMBER), live, N, BLOCK, ROWS)
    else:
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
