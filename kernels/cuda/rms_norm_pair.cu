// Two independent sets of rows with their own weights in one launch: the q and k norms of an attention layer.

#include "rows.cuh"

// Strides in elements. Two-level rows (STRIDE2) of x as in plain_ops.cuh; the results have one level.
struct Args {
    const void* x;       // X_T [m, N]
    const void* weight;  // W_T [N] or null
    void* normed;        // OUT_T [m, N]
    i64 m;
    i64 x_row_stride;
    i64 normed_row_stride;
    i64 inner_rows;      // STRIDE2 only
    i64 x_outer_stride;  // STRIDE2 only
    // The second set: m2 rows of the same N and dtypes.
    const void* x2;
    const void* weight2;
    void* normed2;
    i64 m2;
    i64 x2_row_stride;
    i64 normed2_row_stride;
    i64 inner_rows2;
    i64 x2_outer_stride;
    float eps;
};

// A plain norm has no residual and no sum; nothing reads these fields of Rows. In one of the two sets they are filled:
// where both read as many arguments, the compiler merges the reads and selects the address, 10 to 20 instructions more.
__device__ __forceinline__ Rows first_rows(const Args& args) {
    return {(const char*)args.x,    (const char*)args.x, (const char*)args.weight,
            (char*)args.normed,     (char*)args.normed,  args.m,
            args.x_row_stride,      args.x_row_stride,   args.normed_row_stride,
            args.normed_row_stride, args.inner_rows,     args.x_outer_stride,
            args.x_outer_stride};
}

__device__ __forceinline__ Rows second_rows(const Args& args) {
    return {(const char*)args.x2,
            nullptr,
            (const char*)args.weight2,
            (char*)args.normed2,
            nullptr,
            args.m2,
            args.x2_row_stride,
            0,
            args.normed2_row_stride,
            0,
            args.inner_rows2,
            args.x2_outer_stride,
            0};
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    rms_norm_pair(const __grid_constant__ Args args) {
    static_assert(!FUSED_ADD && CLUSTER == 1, "the pair is two plain norms");
    const i64 first_ctas = (args.m + ROWS_PER_CTA - 1) / ROWS_PER_CTA;
    const bool first_set = blockIdx.x < first_ctas;
    const i64 cta = first_set ? blockIdx.x : blockIdx.x - first_ctas;
    norm_rows(first_set ? first_rows(args) : second_rows(args), cta * ROWS_PER_CTA, args.eps);
}
