// One pass over rows that stay in registers: load x (and residual), add, reduce, normalise, store.
//
// A thread holds CHUNKS_PER_THREAD chunks of each of its ROWS_PER_THREAD rows, 16-bit values packed. WEIGHT_AT says where the
// weight is read: 0 above the dependency wait (few rows: its latency hides behind the previous kernel), 1 together with
// x, 2 after the reduction (fewest registers).

#pragma once

#include "reduce.cuh"

#ifndef WEIGHT_AT
#define WEIGHT_AT 0
#endif

constexpr bool HOLD_F32 = X_T == DT_F32 || (FUSED_ADD && SUM_F32);
constexpr int X_WORDS = CHUNK_WORDS<X_T>;
constexpr int PAIRS = (VEC + 1) / 2;
constexpr int HELD_WORDS = HOLD_F32 ? 2 * PAIRS : PAIRS;
constexpr int OUT_ALIGN = size_of(OUT_T) > size_of(X_T)   ? smaller(2 * ALIGN, 16)
                          : size_of(OUT_T) < size_of(X_T) ? ALIGN / 2
                                                          : ALIGN;

// x + residual of one chunk: `held` is what the norm reads, the return value what is stored as the sum.
__device__ __forceinline__ void add_chunk(const u32 (&x)[X_WORDS], const u32 (&residual)[X_WORDS], u32 (&held)[HELD_WORDS],
                                          u32 (&total)[X_WORDS]) {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        if constexpr (X_T == DT_F32) {
#pragma unroll
            for (int i = 2 * p; i < 2 * p + 2; ++i)
                total[i] = held[i] = __float_as_uint(__fadd_rn(__uint_as_float(x[i]), __uint_as_float(residual[i])));
        } else {
            total[p] = packed_add<X_T>(x[p], residual[p]);
            if constexpr (HOLD_F32) {
                Pair a = unpack<X_T>(x[p]), b = unpack<X_T>(residual[p]);
                held[2 * p] = __float_as_uint(__fadd_rn(a.lo, b.lo));
                held[2 * p + 1] = __float_as_uint(__fadd_rn(a.hi, b.hi));
            } else {
                held[p] = total[p];
            }
        }
    }
}

__device__ __forceinline__ Pair held_pair(const u32 (&held)[HELD_WORDS], int p) {
    if constexpr (HOLD_F32) {
        return {__uint_as_float(held[2 * p]), __uint_as_float(held[2 * p + 1])};
    } else {
        return unpack<X_T>(held[p]);
    }
}

// Sum of squares of a chunk whose first column is `column`; columns from WIDTH on do not count.
__device__ __forceinline__ float sum_of_squares(const u32 (&held)[HELD_WORDS], int column) {
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        Pair x = held_pair(held, p);
        if (WIDTH == N || column + 2 * p < WIDTH) even = __fmaf_rn(x.lo, x.lo, even);
        if (WIDTH == N || column + 2 * p + 1 < WIDTH) odd = __fmaf_rn(x.hi, x.hi, odd);
    }
    return __fadd_rn(even, odd);
}

struct Weights {
    u32 word[CHUNK_WORDS<W_T>];
};

__device__ __forceinline__ void normalise_chunk(const u32 (&held)[HELD_WORDS], float rstd, const Weights& weights,
                                                u32 (&normed)[CHUNK_WORDS<OUT_T>]) {
    constexpr int W_PER_PAIR = size_of(W_T) / 2, OUT_PER_PAIR = size_of(OUT_T) / 2;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        Stored<W_T> weight;
#pragma unroll
        for (int i = 0; i < W_PER_PAIR; ++i) weight.word[i] = HAS_WEIGHT ? weights.word[p * W_PER_PAIR + i] : 0;
        Stored<OUT_T> result = normalise(held_pair(held, p), rstd, weight);
#pragma unroll
        for (int i = 0; i < OUT_PER_PAIR; ++i) normed[p * OUT_PER_PAIR + i] = result.word[i];
    }
}

// A set of rows with one weight.
struct Rows {
    const char* x;
    const char* residual;
    const char* weight;
    char* normed;
    char* total;
    i64 m, x_row_stride, residual_row_stride, normed_row_stride, total_row_stride;
    i64 inner_rows, x_outer_stride, residual_outer_stride;
};

__device__ __forceinline__ Rows first_rows(const Args& args) {
    return {(const char*)args.x, (const char*)args.residual, (const char*)args.weight, (char*)args.normed,
            (char*)args.total,   args.m,                     args.x_row_stride,        args.residual_row_stride,
            args.normed_row_stride, args.total_row_stride,   args.inner_rows,          args.x_outer_stride,
            args.residual_outer_stride};
}

__device__ __forceinline__ int valid_elements(int chunk) { return N % VEC == 0 ? VEC : smaller(VEC, N - chunk * VEC); }

// Rows [first, first + ROWS_PER_CTA) of `rows`.
__device__ __forceinline__ void norm_rows(const Rows& rows, i64 first, float eps) {
    constexpr int K = CHUNKS_PER_THREAD, U = ROWS_PER_THREAD;
    constexpr int X_SIZE = size_of(X_T), OUT_SIZE = size_of(OUT_T), W_SIZE = size_of(W_T);
    const int slot = SLOTS == 1 ? 0 : threadIdx.x / TPR;
    const int thread = SLOTS == 1 ? threadIdx.x : threadIdx.x % TPR;
#if CLUSTER > 1
    cluster_arrive();
    const int first_chunk = cluster_rank() * (TPR * K) + thread;
#else
    const int first_chunk = thread;
#endif
    launch_next_kernel();

    // Chunk j of this thread exists: known at compile time for all but the last.
    auto exists = [&](int j) {
        return CLUSTER == 1 && (j + 1) * TPR <= CHUNKS ? true : first_chunk + j * TPR < CHUNKS;
    };

    Weights weights[K];
    auto load_weights = [&](i64 row) {
        const char* weight = rows.weight;
        if constexpr (WEIGHT_ROWS > 1) weight += row % WEIGHT_ROWS * (i64)(N * W_SIZE);
#pragma unroll
        for (int j = 0; j < K; ++j) {
            int chunk = first_chunk + j * TPR;
            if (HAS_WEIGHT && exists(j))
                load_chunk<W_T, W_ALIGN>(weights[j].word, weight + (i64)chunk * (VEC * W_SIZE), valid_elements(chunk));
        }
    };
    if constexpr (WEIGHT_AT == 0 && WEIGHT_ROWS == 1) load_weights(0);
    wait_for_previous_kernel();

    u32 held[U][K][HELD_WORDS];
    {
        u32 x[U][K][X_WORDS];
        u32 residual[FUSED_ADD ? U : 1][FUSED_ADD ? K : 1][X_WORDS];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const i64 row = first + slot + u * SLOTS;
            const bool live = row < rows.m;
            const char* x_row = rows.x + row_offset(row, rows.inner_rows, rows.x_outer_stride, rows.x_row_stride) * X_SIZE;
            const char* residual_row =
                FUSED_ADD ? rows.residual + row_offset(row, rows.inner_rows, rows.residual_outer_stride,
                                                       rows.residual_row_stride) * X_SIZE
                          : nullptr;
#pragma unroll
            for (int j = 0; j < K; ++j) {
                const int chunk = first_chunk + j * TPR;
                const i64 offset = (i64)chunk * (VEC * X_SIZE);
                if (live && exists(j)) {
                    load_chunk<X_T, ALIGN>(x[u][j], x_row + offset, valid_elements(chunk));
                    if constexpr (FUSED_ADD)
                        load_chunk<X_T, ALIGN>(residual[u][j], residual_row + offset, valid_elements(chunk));
                } else {
#pragma unroll
                    for (int i = 0; i < X_WORDS; ++i) {
                        x[u][j][i] = 0;
                        if constexpr (FUSED_ADD) residual[u][j][i] = 0;
                    }
                }
            }
        }
        if constexpr (WEIGHT_AT == 1 && WEIGHT_ROWS == 1) load_weights(0);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const i64 row = first + slot + u * SLOTS;
            char* total_row = FUSED_ADD ? rows.total + row * rows.total_row_stride * X_SIZE : nullptr;
#pragma unroll
            for (int j = 0; j < K; ++j) {
                const int chunk = first_chunk + j * TPR;
                if constexpr (FUSED_ADD) {
                    u32 total[X_WORDS];
                    add_chunk(x[u][j], residual[u][j], held[u][j], total);
                    if (row < rows.m && exists(j))
                        store_chunk<X_T, ALIGN>(total_row + (i64)chunk * (VEC * X_SIZE), total, valid_elements(chunk));
                } else {
#pragma unroll
                    for (int i = 0; i < HELD_WORDS; ++i) held[u][j][i] = x[u][j][i];
                }
            }
        }
    }

    float partial[U * SUMS_PER_THREAD], sums[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
            float sum = sum_of_squares(held[u][j], (first_chunk + j * TPR) * VEC);
            if constexpr (TREE_THREADS) {
                partial[u] = j == 0 ? sum : __fadd_rn(partial[u], sum);
            } else {
                partial[u * SUMS_PER_THREAD + j] = sum;
            }
        }
    }
    sum_rows<U>(partial, sums, slot, thread);
    // Without this the compiler keeps the unpacked fp32 values across the reduction: twice the registers.
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
#pragma unroll
            for (int i = 0; i < HELD_WORDS; ++i) asm volatile("" : "+r"(held[u][j][i]));
        }
    }

    if constexpr (WEIGHT_AT == 2 && WEIGHT_ROWS == 1) load_weights(0);
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const i64 row = first + slot + u * SLOTS;
        if (row >= rows.m) continue;
        if constexpr (WEIGHT_ROWS > 1) load_weights(row);
        const float rstd = rsqrtf(__fadd_rn(__fmul_rn(sums[u], 1.0f / WIDTH), eps));
        char* normed_row = rows.normed + row * rows.normed_row_stride * OUT_SIZE;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const int chunk = first_chunk + j * TPR;
            if (!exists(j)) continue;
            u32 normed[CHUNK_WORDS<OUT_T>];
            normalise_chunk(held[u][j], rstd, weights[j], normed);
            store_chunk<OUT_T, OUT_ALIGN>(normed_row + (i64)chunk * (VEC * OUT_SIZE), normed, valid_elements(chunk));
        }
    }
}
