// A norm with a gate: round(norm(x) * act(gate)), or norm(x * act(gate)) of the fp32 product. The reduction tree is
// that of the norms with chunks of 16 bytes.
//
// Beside the macros of abi.cuh:
//   GATE_T       dtype of the gate
//   ACTIVATION   0: silu, 1: sigmoid, in fp32 as torch computes them
//   FUSED_ADD    1: the gate comes first, and rows are held in fp32 (with SUM_F32). 0: the norm comes first; OUT_T is
//                then the dtype in which it meets the gate, and the result has X_T

#include "rows.cuh"

// Strides in elements; two-level rows as in plain_ops.cuh.
struct Args {
    const void* x;       // X_T    [m, N]
    const void* gate;    // GATE_T [m, N]
    const void* weight;  // W_T    [WEIGHT_ROWS, N] or null
    void* normed;        // [m, N], rows one after another
    i64 m;
    i64 x_row_stride;
    i64 gate_row_stride;
    i64 inner_rows;         // STRIDE2 only
    i64 x_outer_stride;     // STRIDE2 only
    i64 gate_outer_stride;  // STRIDE2 only
    float eps;
};

constexpr bool GATE_FIRST = FUSED_ADD;
constexpr int RESULT_T = GATE_FIRST ? OUT_T : X_T;
constexpr int RESULT_ALIGN = GATE_FIRST ? OUT_ALIGN : ALIGN;
constexpr int GATE_ALIGN = ALIGN * size_of(GATE_T) / size_of(X_T);
constexpr int GATE_WORDS = CHUNK_WORDS<GATE_T>;
constexpr int RESULT_WORDS = CHUNK_WORDS<RESULT_T>;
static_assert(!PREFETCH, "rows are not asked for ahead");
static_assert(!GATE_FIRST || HOLD_F32, "the product with the gate is not rounded");

__device__ __forceinline__ Rows rows_of(const Args& args) {
    return {(const char*)args.x,
            (const char*)args.gate,
            (const char*)args.weight,
            (char*)args.normed,
            nullptr,
            args.m,
            args.x_row_stride,
            args.gate_row_stride,
            N,
            0,
            args.inner_rows,
            args.x_outer_stride,
            args.gate_outer_stride};
}

__device__ __forceinline__ float activated(float gate) {
    return __fdiv_rn(ACTIVATION == 0 ? gate : 1.0f, __fadd_rn(1.0f, expf(-gate)));
}

template <int DTYPE>
__device__ __forceinline__ Pair pair_of(const u32* words, int p) {
    Stored<DTYPE> stored;
#pragma unroll
    for (int i = 0; i < size_of(DTYPE) / 2; ++i) stored.word[i] = words[p * (size_of(DTYPE) / 2) + i];
    return widen<DTYPE>(stored);
}

__device__ __forceinline__ Pair times_gate(Pair x, const u32* gate, int p) {
    const Pair g = pair_of<GATE_T>(gate, p);
    return {__fmul_rn(x.lo, activated(g.lo)), __fmul_rn(x.hi, activated(g.hi))};
}

// What is held of a chunk while its row is added up.
__device__ __forceinline__ void hold(const u32* x, const u32* gate, u32 (&held)[HELD_WORDS]) {
    if constexpr (GATE_FIRST) {
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const Pair product = times_gate(pair_of<X_T>(x, p), gate, p);
            held[2 * p] = __float_as_uint(product.lo);
            held[2 * p + 1] = __float_as_uint(product.hi);
        }
    } else {
#pragma unroll
        for (int word = 0; word < HELD_WORDS; ++word) held[word] = x[word];
    }
}

// The result of a chunk. A template, so that the branch which does not fit the dtypes is left out.
template <int WORDS>
__device__ __forceinline__ void finish(const u32 (&held)[HELD_WORDS], const u32* gate, float rstd,
                                       const Weights& weights, u32 (&result)[WORDS]) {
    if constexpr (GATE_FIRST) {
        normalise_chunk(held, rstd, weights, result);
    } else {
        u32 normed[CHUNK_WORDS<OUT_T>];
        normalise_chunk(held, rstd, weights, normed);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const Stored<RESULT_T> rounded = narrow<RESULT_T>(times_gate(pair_of<OUT_T>(normed, p), gate, p));
#pragma unroll
            for (int i = 0; i < size_of(RESULT_T) / 2; ++i) result[p * (size_of(RESULT_T) / 2) + i] = rounded.word[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    rms_norm_gated(const __grid_constant__ Args args) {
    constexpr int K = CHUNKS_PER_THREAD, U = ROWS_PER_THREAD;
    constexpr int GATES_HELD = GATE_FIRST ? STAGE : U * K;
    const i64 first = (i64)(blockIdx.x / CLUSTER) * ROWS_PER_CTA;
    const Rows rows = rows_of(args);
#if CLUSTER > 1
    open_cluster();
#endif
    const Share share = share_of_thread();
    if constexpr (LAUNCH_AT == 0) launch_next_kernel();
    prefetch_weight(rows.weight, first, share.first_of_cta);
    wait_for_previous_kernel();
    if constexpr (LAUNCH_AT == 1) launch_next_kernel();
    Weights weights[WEIGHTS_HELD];
    if constexpr (WEIGHT_WHEN == 0) load_weights(rows, share, weights, 0, 0);

    u32 held[U * K][HELD_WORDS];
    u32 gates[GATES_HELD][GATE_WORDS];
#pragma unroll
    for (int stage = 0; stage < U * K; stage += STAGE) {
        u32 x[STAGE][X_WORDS];
#pragma unroll
        for (int i = stage; i < smaller(stage + STAGE, U * K); ++i) {
            const i64 row = first + share.slot + i / K * SLOTS;
            const int chunk = share.first_chunk + i % K * TPR;
            u32(&gate)[GATE_WORDS] = gates[i % GATES_HELD];
            if (is_row(row, rows.m) && share.exists(i % K)) {
                const i64 x_at = row_offset(row, rows.inner_rows, rows.x_outer_stride, rows.x_row_stride);
                const i64 gate_at =
                    row_offset(row, rows.inner_rows, rows.residual_outer_stride, rows.residual_row_stride);
                load_chunk<X_T, ALIGN>(x[i - stage], rows.x + (x_at + (i64)chunk * VEC) * size_of(X_T),
                                       valid_elements(chunk));
                load_chunk<GATE_T, GATE_ALIGN>(gate, rows.residual + (gate_at + (i64)chunk * VEC) * size_of(GATE_T),
                                               valid_elements(chunk));
            } else {
#pragma unroll
                for (int word = 0; word < X_WORDS; ++word) x[i - stage][word] = 0;
#pragma unroll
                for (int word = 0; word < GATE_WORDS; ++word) gate[word] = 0;
            }
        }
        if (stage + STAGE >= U * K) {
            if constexpr (LAUNCH_AT == 2) launch_next_kernel();
            if constexpr (WEIGHT_WHEN == 1) load_weights(rows, share, weights, 0, 0);
        }
#pragma unroll
        for (int i = stage; i < smaller(stage + STAGE, U * K); ++i) hold(x[i - stage], gates[i % GATES_HELD], held[i]);
    }

    float partial[U * SUMS_PER_THREAD], sums[U];
#pragma unroll
    for (int i = 0; i < U * K; ++i) {
        const float sum = sum_of_squares(held[i], (share.first_chunk + i % K * TPR) * VEC);
        if constexpr (TREE_THREADS) {
            partial[i / K] = i % K == 0 ? sum : __fadd_rn(partial[i / K], sum);
        } else {
            partial[i] = sum;
        }
    }
    if constexpr (WEIGHT_WHEN == 3) load_weights(rows, share, weights, 0, 0);
    sum_rows<U>(partial, sums, share.slot, share.thread);
    if constexpr (LAUNCH_AT == 3) launch_next_kernel();
    // Without this the compiler keeps the unpacked fp32 values across the reduction: twice the registers.
#pragma unroll
    for (int i = 0; i < U * K; ++i) {
#pragma unroll
        for (int word = 0; word < HELD_WORDS; ++word) asm volatile("" : "+r"(held[i][word]));
    }

#pragma unroll
    for (int u = 0; u < U; ++u) {
        const i64 row = first + share.slot + u * SLOTS;
        if (!is_row(row, rows.m)) continue;
        const float rstd = reciprocal_rms(sums[u], args.eps);
        char* normed_row = rows.normed + row * (i64)(N * size_of(RESULT_T));
#pragma unroll
        for (int j = 0; j < K; ++j) {
            load_late_weights(rows, share, weights, row, j);
            const int chunk = share.first_chunk + j * TPR;
            if (!share.exists(j)) continue;
            u32 result[RESULT_WORDS];
            finish(held[u * K + j], gates[(u * K + j) % GATES_HELD], rstd, weights[j % WEIGHTS_HELD], result);
            store_chunk<RESULT_T, RESULT_ALIGN>(normed_row + (i64)chunk * (VEC * size_of(RESULT_T)), result,
                                                valid_elements(chunk));
        }
    }
}
