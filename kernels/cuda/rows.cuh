// One pass over rows that stay in registers: load x (and residual), add, reduce, normalise, store.
//
// A thread holds CHUNKS_PER_THREAD chunks of each of its ROWS_PER_THREAD rows, 16-bit values packed. WEIGHT_AT says
// where the weight is read, below the dependency wait as everything else: 0 ahead of x, 1 behind it, 2 after the
// reduction (fewest registers), 3 from just before the reduction on, a part ahead of its use.

#pragma once

#include "reduce.cuh"

constexpr bool HOLD_F32 = X_T == DT_F32 || (FUSED_ADD && SUM_F32);
constexpr int X_WORDS = CHUNK_WORDS<X_T>;
constexpr int PAIRS = (VEC + 1) / 2;
constexpr int HELD_WORDS = HOLD_F32 ? 2 * PAIRS : PAIRS;
constexpr int OUT_ALIGN = size_of(OUT_T) > size_of(X_T)   ? smaller(2 * ALIGN, 16)
                          : size_of(OUT_T) < size_of(X_T) ? ALIGN / 2
                                                          : ALIGN;

// MIN_CTAS is measured for a weight, sum and output in x's dtype. A spec that holds more in registers gets fewer CTAs.
constexpr int THREADS_ALLOCATED = ceil_div(TPR * SLOTS, 128) * 128;
constexpr int HELD_MORE = ROWS_PER_THREAD * CHUNKS_PER_THREAD * (HELD_WORDS - X_WORDS);
constexpr int WEIGHT_MORE = HAS_WEIGHT ? CHUNKS_PER_THREAD * (CHUNK_WORDS<W_T> - X_WORDS) : 0;
constexpr int OUT_MORE = CHUNK_WORDS<OUT_T> - X_WORDS;
constexpr int WORDS_OF_CTA = THREADS_ALLOCATED * CHUNKS_PER_THREAD * X_WORDS;
constexpr int WEIGHT_WHEN =
    (WORDS_OF_CTA > 8192 && HELD_MORE + WEIGHT_MORE > 0) || (WORDS_OF_CTA >= 8192 && OFFSET == 2) || WEIGHT_ROWS > 1
        ? 2
        : WEIGHT_AT;
__host__ __device__ constexpr int at_least_0(int n) { return n > 0 ? n : 0; }
constexpr int MORE_REGISTERS =
    at_least_0(HELD_MORE) + (WEIGHT_WHEN >= 2 ? 0 : at_least_0(WEIGHT_MORE)) + at_least_0(OUT_MORE) +
    (STRIDE2 ? 6 : 0) +
    (smaller(ALIGN, W_ALIGN) >= smaller(16, VEC* size_of(X_T)) ? 0  // narrow pieces are put together
     : smaller(ALIGN, W_ALIGN) < 4                             ? 16 * ROWS_PER_THREAD * CHUNKS_PER_THREAD
                                                               : 16);
constexpr int REGISTER_FILE = 65536;
constexpr int CTAS_WITH_MORE =
    REGISTER_FILE / (THREADS_ALLOCATED * smaller(255, REGISTER_FILE / (MIN_CTAS * THREADS_ALLOCATED) + MORE_REGISTERS));
constexpr int RESIDENT_CTAS = MORE_REGISTERS > 0 ? (CTAS_WITH_MORE > 1 ? CTAS_WITH_MORE : 1) : MIN_CTAS;

// x + residual of one chunk: `held` is what the norm reads, the return value what is stored as the sum.
__device__ __forceinline__ void add_chunk(const u32 (&x)[X_WORDS], const u32 (&residual)[X_WORDS],
                                          u32 (&held)[HELD_WORDS], u32 (&total)[X_WORDS]) {
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

// With one row per CTA the grid has no row to spare.
__device__ __forceinline__ bool is_row(i64 row, i64 m) { return ROWS_PER_CTA == 1 || row < m; }

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

// fp32 results of a 16-byte chunk of 16-bit values take two stores. Two neighbouring threads write one chunk, then the
// other, so that each store fills whole sectors of 32 bytes. All threads of the warp take part.
constexpr bool WIDE_OUTPUT =
    VEC * size_of(OUT_T) == 32 && OUT_ALIGN >= 16 && MAX_ACCESS == 16 && N % VEC == 0 && TPR % 32 == 0;

__device__ __forceinline__ void store_wide_chunk(char* p, const u32* w, int thread) {
    const bool upper = thread & 1;
    u32 first[4], second[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 other = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 4], 1);
        first[i] = upper ? other : w[i];
        second[i] = upper ? w[i + 4] : other;
    }
    char* chunk = p - (upper ? 16 : 0);  // the lower thread's chunk is 32 bytes below the upper one's
    store_piece<16>(chunk, first);
    store_piece<16>(chunk + 32, second);
}

// A set of rows with one weight, strides in elements; two-level rows (STRIDE2) as in plain_ops.cuh.
struct Rows {
    const char* x;
    const char* residual;
    const char* weight;
    char* normed;
    char* total;
    i64 m, x_row_stride, residual_row_stride, normed_row_stride, total_row_stride;
    i64 inner_rows, x_outer_stride, residual_outer_stride;
};

__device__ __forceinline__ int valid_elements(int chunk) { return N % VEC == 0 ? VEC : smaller(VEC, N - chunk * VEC); }

// Asks for this CTA's part of its rows to come from memory to L2 while the previous kernel still runs. It reads
// nothing: L2 is where both kernels' accesses meet, so a line that the previous kernel writes later is written there.
__device__ __forceinline__ void prefetch_rows(const Rows& rows, i64 first, int slot, int thread, int first_byte) {
#if __CUDA_ARCH__ >= 900
    constexpr int SIZE = size_of(X_T), PART = TPR * CHUNKS_PER_THREAD * VEC * SIZE;
    if (ALIGN < 16 || N * SIZE % 16 != 0 || thread != 0) return;  // bulk prefetches take multiples of 16 bytes
    const int bytes = smaller(PART, N * SIZE - first_byte);
#pragma unroll
    for (int u = 0; u < ROWS_PER_THREAD; ++u) {
        const i64 row = first + slot + u * SLOTS;
        if (!is_row(row, rows.m) || bytes <= 0) return;
        const char* x =
            rows.x + row_offset(row, rows.inner_rows, rows.x_outer_stride, rows.x_row_stride) * SIZE + first_byte;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(x), "r"(bytes));
        if constexpr (FUSED_ADD) {
            const char* residual =
                rows.residual +
                row_offset(row, rows.inner_rows, rows.residual_outer_stride, rows.residual_row_stride) * SIZE +
                first_byte;
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(residual), "r"(bytes));
        }
    }
#endif
}

// The same for the weight, of which this CTA reads what begins with logical chunk `first_chunk`. Whoever has the first
// rows asks for it: once in L2 it is there for all.
__device__ __forceinline__ void prefetch_weight(const char* weight, i64 first_row, int first_chunk) {
#if __CUDA_ARCH__ >= 900
    constexpr int CHUNK = VEC * size_of(W_T), ALL = N * WEIGHT_ROWS * size_of(W_T);
    constexpr int PART = WEIGHT_ROWS > 1 ? ALL : TPR * CHUNKS_PER_THREAD * CHUNK;
    if (!HAS_WEIGHT || W_ALIGN < 16 || ALL % 16 != 0 || first_row != 0 || threadIdx.x != 0) return;
    const int first_byte = first_chunk * CHUNK, bytes = smaller(PART, ALL - first_byte);
    if (bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(weight + first_byte), "r"(bytes));
#endif
}

// Which chunks a thread has of its rows: chunk j is number first_chunk + j * TPR.
struct Share {
    int slot, thread, first_of_cta, first_chunk;

    // Chunk j exists: known at compile time for all but the last, in a cluster where its CTAs have equal parts.
    static constexpr __device__ __forceinline__ bool in_every_cta(int j) {
        return CLUSTER == 1 ? (j + 1) * TPR <= CHUNKS : CHUNKS == TPR * CHUNKS_PER_THREAD * CLUSTER;
    }
    __device__ __forceinline__ bool exists(int j) const {
        return in_every_cta(j) ? true : first_chunk + j * TPR < CHUNKS;
    }
};

// In a cluster the caller opened it.
__device__ __forceinline__ Share share_of_thread() {
    Share share;
    share.slot = SLOTS == 1 ? 0 : threadIdx.x / TPR;
    share.thread = SLOTS == 1 ? threadIdx.x : threadIdx.x % TPR;
#if CLUSTER > 1
    share.first_of_cta = cluster_rank() * (TPR * CHUNKS_PER_THREAD);
#else
    share.first_of_cta = 0;
#endif
    share.first_chunk = share.first_of_cta + share.thread;
    return share;
}

// From the reduction on a few chunks' weights at a time, so that those of a long row do not all need registers at once;
// with WEIGHT_WHEN == 3 a group is on its way while the one before is used.
constexpr int GROUP_WORDS = WEIGHT_WHEN == 3 && CHUNKS_PER_THREAD < 16 ? 8 : 16;
constexpr int GROUP_OF_WEIGHTS =
    WEIGHT_WHEN < 2 ? CHUNKS_PER_THREAD : smaller(CHUNKS_PER_THREAD, ceil_div(GROUP_WORDS, CHUNK_WORDS<W_T>));
constexpr int WEIGHTS_HELD = WEIGHT_WHEN == 3 ? smaller(CHUNKS_PER_THREAD, 2 * GROUP_OF_WEIGHTS) : GROUP_OF_WEIGHTS;
static_assert(WEIGHT_WHEN != 3 || ROWS_PER_THREAD == 1, "the weights of one row");

// The weights of chunks [from, from + GROUP_OF_WEIGHTS) of a thread.
__device__ __forceinline__ void load_weights(const Rows& rows, const Share& share, Weights (&weights)[WEIGHTS_HELD],
                                             i64 row, int from) {
    constexpr int W_SIZE = size_of(W_T);
    const char* weight = rows.weight;
    if constexpr (WEIGHT_ROWS > 1) weight += row % WEIGHT_ROWS * (i64)(N * W_SIZE);
#pragma unroll
    for (int j = from; j < smaller(from + GROUP_OF_WEIGHTS, CHUNKS_PER_THREAD); ++j) {
        int chunk = share.first_chunk + j * TPR;
        if (HAS_WEIGHT && share.exists(j))
            load_chunk<W_T, W_ALIGN>(weights[j % WEIGHTS_HELD].word, weight + (i64)chunk * (VEC * W_SIZE),
                                     valid_elements(chunk));
    }
}

// Before chunk j of a row is normalised: the weights that it needs, or that a later one needs, where they come late.
__device__ __forceinline__ void load_late_weights(const Rows& rows, const Share& share,
                                                  Weights (&weights)[WEIGHTS_HELD], i64 row, int j) {
    if (WEIGHT_WHEN == 2 && j % GROUP_OF_WEIGHTS == 0) load_weights(rows, share, weights, row, j);
    if (WEIGHT_WHEN == 3 && j % GROUP_OF_WEIGHTS == 0) load_weights(rows, share, weights, row, j + GROUP_OF_WEIGHTS);
}

// The first half: waits for the kernel in front, reads rows [first, first + ROWS_PER_CTA), adds and stores the sum,
// reduces. Out: what the norm reads, [row of the thread][chunk], each row's sum of squares, the weights where they come
// early. `read_more()` stands below the wait, for what else a kernel reads.
template <typename ReadMore>
__device__ __forceinline__ void read_rows(const Rows& rows, const Share& share, i64 first,
                                          u32 (&held)[ROWS_PER_THREAD * CHUNKS_PER_THREAD][HELD_WORDS],
                                          float (&sums)[ROWS_PER_THREAD], Weights (&weights)[WEIGHTS_HELD],
                                          ReadMore read_more) {
    constexpr int K = CHUNKS_PER_THREAD, U = ROWS_PER_THREAD;
    constexpr int X_SIZE = size_of(X_T);
    const int slot = share.slot, thread = share.thread, first_chunk = share.first_chunk;
    if constexpr (PREFETCH) prefetch_rows(rows, first, slot, thread, share.first_of_cta * VEC * X_SIZE);
    prefetch_weight(rows.weight, first, share.first_of_cta);
    wait_for_previous_kernel();
    read_more();
    if constexpr (LAUNCH_AT == 1) launch_next_kernel();
    if constexpr (WEIGHT_WHEN == 0) load_weights(rows, share, weights, 0, 0);

    // A few chunks at a time are loaded, then added: that bounds the registers of long rows.
#pragma unroll
    for (int stage = 0; stage < U * K; stage += STAGE) {
        u32 x[STAGE][X_WORDS];
        u32 residual[STAGE][X_WORDS];
#pragma unroll
        for (int i = stage; i < smaller(stage + STAGE, U * K); ++i) {
            const i64 row = first + slot + i / K * SLOTS;
            const int chunk = first_chunk + i % K * TPR;
            const i64 offset = (i64)chunk * (VEC * X_SIZE);
            if (is_row(row, rows.m) && share.exists(i % K)) {
                const char* x_row =
                    rows.x + row_offset(row, rows.inner_rows, rows.x_outer_stride, rows.x_row_stride) * X_SIZE;
                load_chunk<X_T, ALIGN>(x[i - stage], x_row + offset, valid_elements(chunk));
                if constexpr (FUSED_ADD) {
                    const char* residual_row =
                        rows.residual +
                        row_offset(row, rows.inner_rows, rows.residual_outer_stride, rows.residual_row_stride) * X_SIZE;
                    load_chunk<X_T, ALIGN>(residual[i - stage], residual_row + offset, valid_elements(chunk));
                }
            } else {
#pragma unroll
                for (int word = 0; word < X_WORDS; ++word) x[i - stage][word] = residual[i - stage][word] = 0;
            }
        }
        if constexpr (LAUNCH_AT == 2)
            if (stage + STAGE >= U * K) launch_next_kernel();
        if constexpr (WEIGHT_WHEN == 1)
            if (stage + STAGE >= U * K) load_weights(rows, share, weights, 0, 0);
#pragma unroll
        for (int i = stage; i < smaller(stage + STAGE, U * K); ++i) {
            if constexpr (FUSED_ADD) {
                const i64 row = first + slot + i / K * SLOTS;
                const int chunk = first_chunk + i % K * TPR;
                u32 total[X_WORDS];
                add_chunk(x[i - stage], residual[i - stage], held[i], total);
                char* total_row = rows.total + row * rows.total_row_stride * X_SIZE;
                if (is_row(row, rows.m) && share.exists(i % K))
                    store_chunk<X_T, ALIGN>(total_row + (i64)chunk * (VEC * X_SIZE), total, valid_elements(chunk));
            } else {
#pragma unroll
                for (int word = 0; word < HELD_WORDS; ++word) held[i][word] = x[i - stage][word];
            }
        }
    }

    float partial[U * SUMS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < U * K; ++i) {
        float sum = sum_of_squares(held[i], (first_chunk + i % K * TPR) * VEC);
        if constexpr (TREE_THREADS) {
            partial[i / K] = i % K == 0 ? sum : __fadd_rn(partial[i / K], sum);
        } else {
            partial[i] = sum;
        }
    }
    if constexpr (WEIGHT_WHEN == 3) load_weights(rows, share, weights, 0, 0);
    sum_rows<U>(partial, sums, slot, thread);
    if constexpr (LAUNCH_AT == 3) launch_next_kernel();
    // Without this the compiler keeps the unpacked fp32 values across the reduction: twice the registers.
#pragma unroll
    for (int i = 0; i < U * K; ++i) {
#pragma unroll
        for (int word = 0; word < HELD_WORDS; ++word) asm volatile("" : "+r"(held[i][word]));
    }
}

__device__ __forceinline__ float reciprocal_rms(float sum_of_squares, float eps) {
    return rsqrtf(__fadd_rn(__fmul_rn(sum_of_squares, 1.0f / WIDTH), eps));
}

// Rows [first, first + ROWS_PER_CTA) of `rows`.
__device__ __forceinline__ void norm_rows(const Rows& rows, i64 first, float eps) {
    constexpr int K = CHUNKS_PER_THREAD, U = ROWS_PER_THREAD;
    constexpr int OUT_SIZE = size_of(OUT_T);
#if CLUSTER > 1
    open_cluster();
#endif
    const Share share = share_of_thread();
    if constexpr (LAUNCH_AT == 0) launch_next_kernel();
    Weights weights[WEIGHTS_HELD];
    u32 held[U * K][HELD_WORDS];
    float sums[U];
    read_rows(rows, share, first, held, sums, weights, [] {});

#pragma unroll
    for (int u = 0; u < U; ++u) {
        const i64 row = first + share.slot + u * SLOTS;
        if (!is_row(row, rows.m)) continue;
        const float rstd = reciprocal_rms(sums[u], eps);
        char* normed_row = rows.normed + row * rows.normed_row_stride * OUT_SIZE;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            load_late_weights(rows, share, weights, row, j);
            const int chunk = share.first_chunk + j * TPR;
            if (!share.exists(j)) continue;
            u32 normed[CHUNK_WORDS<OUT_T>];
            normalise_chunk(held[u * K + j], rstd, weights[j % WEIGHTS_HELD], normed);
            char* place = normed_row + (i64)chunk * (VEC * OUT_SIZE);
            if (WIDE_OUTPUT && Share::in_every_cta(j)) {
                store_wide_chunk(place, normed, share.thread);
            } else {
                store_chunk<OUT_T, OUT_ALIGN>(place, normed, valid_elements(chunk));
            }
        }
    }
}
