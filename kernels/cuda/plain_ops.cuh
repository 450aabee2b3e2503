// The launch arguments of the plain ops, rms_norm and fused_add_rms_norm, whichever kernel serves them.
//
// A plain call is started by launcher.c without Python. It fills fields of these names, wherever they stand; a kernel
// of a plain op that declares another field is served through Python.

#pragma once

#include "rows.cuh"

// Strides in elements. Two-level rows (STRIDE2): row r of x starts at
//   x + (r / inner_rows) * x_outer_stride + (r % inner_rows) * x_row_stride
// and likewise residual. normed and total always have one level.
struct Args {
    const void* x;         // X_T   [m, N]
    const void* residual;  // X_T   [m, N] or null
    const void* weight;    // W_T   [N] or null
    void* normed;          // OUT_T [m, N]
    void* total;           // X_T   [m, N] or null
    i64 m;
    i64 x_row_stride;
    i64 residual_row_stride;
    i64 normed_row_stride;
    i64 total_row_stride;
    i64 inner_rows;             // STRIDE2 only
    i64 x_outer_stride;         // STRIDE2 only
    i64 residual_outer_stride;  // STRIDE2 only
    float eps;
};

__device__ __forceinline__ Rows rows_of(const Args& args) {
    return {(const char*)args.x,       (const char*)args.residual,
            (const char*)args.weight,  (char*)args.normed,
            (char*)args.total,         args.m,
            args.x_row_stride,         args.residual_row_stride,
            args.normed_row_stride,    args.total_row_stride,
            args.inner_rows,           args.x_outer_stride,
            args.residual_outer_stride};
}
