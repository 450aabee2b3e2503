// Rows too long for the registers of one multiprocessor, where there are no clusters (before sm_90): two passes over
// the row. The second reads x and residual again, mostly from L2, because in place the first must not overwrite them.

#include "plain_ops.cuh"

static_assert(ROWS_PER_CTA == 1 && CLUSTER == 1 && TREE_THREADS, "one row per CTA, each thread adds up its own chunks");

__device__ __forceinline__ void load_sum(const char* x_row, const char* residual_row, int chunk,
                                         u32 (&held)[HELD_WORDS], u32 (&total)[X_WORDS]) {
    const i64 offset = (i64)chunk * (VEC * size_of(X_T));
    u32 x[X_WORDS], residual[X_WORDS];
    load_chunk<X_T, ALIGN>(x, x_row + offset, valid_elements(chunk));
    if constexpr (FUSED_ADD) {
        load_chunk<X_T, ALIGN>(residual, residual_row + offset, valid_elements(chunk));
        add_chunk(x, residual, held, total);
    } else {
#pragma unroll
        for (int word = 0; word < HELD_WORDS; ++word) held[word] = x[word];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW, MIN_CTAS)
    rms_norm_stream(const __grid_constant__ Args args) {
    const Rows rows = rows_of(args);
    const i64 row = blockIdx.x;
    const char* x_row =
        rows.x + row_offset(row, rows.inner_rows, rows.x_outer_stride, rows.x_row_stride) * size_of(X_T);
    const char* residual_row =
        rows.residual +
        row_offset(row, rows.inner_rows, rows.residual_outer_stride, rows.residual_row_stride) * size_of(X_T);
    char* total_row = rows.total + row * rows.total_row_stride * size_of(X_T);
    char* normed_row = rows.normed + row * rows.normed_row_stride * size_of(OUT_T);
    const char* weight = rows.weight + (WEIGHT_ROWS > 1 ? row % WEIGHT_ROWS * (i64)(N * size_of(W_T)) : 0);
    wait_for_previous_kernel();
    launch_next_kernel();

    float partial[1] = {0.0f}, sums[1];
#pragma unroll 2
    for (int chunk = threadIdx.x; chunk < CHUNKS; chunk += TPR) {
        u32 held[HELD_WORDS], total[X_WORDS];
        load_sum(x_row, residual_row, chunk, held, total);
        partial[0] = __fadd_rn(partial[0], sum_of_squares(held, chunk * VEC));
    }
    sum_rows<1>(partial, sums, 0, threadIdx.x);
    const float rstd = rsqrtf(__fadd_rn(__fmul_rn(sums[0], 1.0f / WIDTH), args.eps));

    for (int chunk = threadIdx.x; chunk < CHUNKS; chunk += TPR) {
        u32 held[HELD_WORDS], total[X_WORDS], normed[CHUNK_WORDS<OUT_T>];
        Weights weights;
        load_sum(x_row, residual_row, chunk, held, total);
        if constexpr (HAS_WEIGHT)
            load_chunk<W_T, W_ALIGN>(weights.word, weight + (i64)chunk * (VEC * size_of(W_T)), valid_elements(chunk));
        if constexpr (FUSED_ADD)
            store_chunk<X_T, ALIGN>(total_row + (i64)chunk * (VEC * size_of(X_T)), total, valid_elements(chunk));
        normalise_chunk(held, rstd, weights, normed);
        store_chunk<OUT_T, OUT_ALIGN>(normed_row + (i64)chunk * (VEC * size_of(OUT_T)), normed, valid_elements(chunk));
    }
}
