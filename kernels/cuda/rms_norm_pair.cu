// Two independent sets of rows with their own weights in one launch: the q and k norms of an attention layer.

#include "rows.cuh"

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
