// fused_add_rms_norm of a matrix product that comes in parts: x = sum of PARTIALS fp32 matrices [m, N], as a product
// whose inner dimension was split leaves them. The kernel that would add them up, round and write x, and the read of x,
// are gone.
//
// The parts are added in their order and the sum is rounded to X_T before the residual is added, as the product's own
// rounding would be. In place: total may be residual.

#include "rows.cuh"

static_assert(FUSED_ADD && X_T != DT_F32 && !STRIDE2 && ROWS_PER_CTA == 1 && N % VEC == 0 && VEC == 8,
              "few rows of 16-byte chunks");

// Strides in elements. The grid has a CTA, or a cluster, for each of m rows.
struct Args {
    const void* parts;     // fp32  [PARTIALS, m, N]
    const void* residual;  // X_T   [m, N]
    const void* weight;    // W_T   [N] or null
    void* normed;          // OUT_T [m, N]
    void* total;           // X_T   [m, N]
    i64 parts_row_stride;
    i64 residual_row_stride;
    i64 normed_row_stride;
    i64 total_row_stride;
    i64 part_stride;
    float eps;
};

__device__ __forceinline__ void add_parts(const u32 (&parts)[PARTIALS][VEC], u32 (&x)[X_WORDS]) {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        Pair sum = {__uint_as_float(parts[0][2 * p]), __uint_as_float(parts[0][2 * p + 1])};
#pragma unroll
        for (int part = 1; part < PARTIALS; ++part) {
            sum.lo = __fadd_rn(sum.lo, __uint_as_float(parts[part][2 * p]));
            sum.hi = __fadd_rn(sum.hi, __uint_as_float(parts[part][2 * p + 1]));
        }
        x[p] = pack<X_T>(sum);
    }
}

// x: row by row of one part; x_outer_stride: from part to part.
__device__ __forceinline__ Rows rows_of(const Args& args) {
    return {(const char*)args.parts,
            (const char*)args.residual,
            (const char*)args.weight,
            (char*)args.normed,
            (char*)args.total,
            0,
            args.parts_row_stride,
            args.residual_row_stride,
            args.normed_row_stride,
            args.total_row_stride,
            0,
            args.part_stride,
            0};
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW, 1) rms_norm_partials(const __grid_constant__ Args args) {
    constexpr int K = CHUNKS_PER_THREAD, X_SIZE = size_of(X_T), W_SIZE = size_of(W_T);
    const Rows rows = rows_of(args);
    const i64 row = blockIdx.x / CLUSTER;
    const int thread = threadIdx.x;
#if CLUSTER > 1
    open_cluster();
    const int first_chunk = cluster_rank() * (TPR * K) + thread;
#else
    const int first_chunk = thread;
#endif
    auto exists = [&](int j) { return CHUNKS == TPR * K * CLUSTER || first_chunk + j * TPR < CHUNKS; };
    if constexpr (LAUNCH_AT == 0) launch_next_kernel();
    prefetch_weight(rows.weight, row, first_chunk - thread);
    wait_for_previous_kernel();
    Weights weights[K];
#pragma unroll
    for (int j = 0; j < K; ++j)
        if (HAS_WEIGHT && exists(j))
            load_chunk<W_T, W_ALIGN>(weights[j].word, rows.weight + (i64)(first_chunk + j * TPR) * (VEC * W_SIZE), VEC);

    u32 held[K][HELD_WORDS];
    float partial[SUMS_PER_THREAD], sums[1];
#pragma unroll
    for (int j = 0; j < K; ++j) {
        const i64 column = (i64)(first_chunk + j * TPR) * VEC;
        u32 parts[PARTIALS][VEC] = {}, residual[X_WORDS] = {};
        if (exists(j)) {
            load_chunk<X_T, ALIGN>(residual, rows.residual + (row * rows.residual_row_stride + column) * X_SIZE, VEC);
#pragma unroll
            for (int part = 0; part < PARTIALS; ++part) {
                const char* p = rows.x + (part * rows.x_outer_stride + row * rows.x_row_stride + column) * 4;
                load_piece<16>(parts[part], p);
                load_piece<16>(parts[part] + 4, p + 16);
            }
        }
        if constexpr (LAUNCH_AT == 2)
            if (j + 1 == K) launch_next_kernel();
        u32 x[X_WORDS], total[X_WORDS];
        add_parts(parts, x);
        add_chunk(x, residual, held[j], total);
        if (exists(j))
            store_chunk<X_T, ALIGN>(rows.total + (row * rows.total_row_stride + column) * X_SIZE, total, VEC);
        const float sum = sum_of_squares(held[j], (int)column);
        if constexpr (TREE_THREADS) {
            partial[0] = j == 0 ? sum : __fadd_rn(partial[0], sum);
        } else {
            partial[j] = sum;
        }
    }
    sum_rows<1>(partial, sums, 0, thread);
    if constexpr (LAUNCH_AT == 3) launch_next_kernel();
    const float rstd = rsqrtf(__fadd_rn(__fmul_rn(sums[0], 1.0f / WIDTH), args.eps));
#pragma unroll
    for (int j = 0; j < K; ++j) {
        if (!exists(j)) continue;
        u32 normed[CHUNK_WORDS<OUT_T>];
        normalise_chunk(held[j], rstd, weights[j], normed);
        const i64 place = row * rows.normed_row_stride + (i64)(first_chunk + j * TPR) * VEC;
        store_chunk<OUT_T, OUT_ALIGN>(rows.normed + place * size_of(OUT_T), normed, VEC);
    }
}
