// A norm and the residual-add behind it, with the norm that reads the sum (sandwich layouts):
//
//   total = norm(x) + residual, normed = norm(total) with the next weight.
//
// Each step is rounded as in the kernels of the norms, whose reduction trees these are: the bits are those of the
// separate ops. With SUM_F32 the second norm reads the sum before it is rounded, as that of a fused add does. NEXT == 0
// leaves the second norm out.

#include "rows.cuh"

static_assert(FUSED_ADD && OUT_T == X_T, "the norm's result is added in X_T");
static_assert(!STRIDE2 && WEIGHT_ROWS == 1 && N % VEC == 0, "rows of one level, of whole chunks");

// Strides in elements. total and normed have rows one after another.
struct Args {
    const void* x;         // X_T [m, N]
    const void* residual;  // X_T [m, N]
    const void* weight;    // W_T [N] or null
    void* normed;          // X_T [m, N] or null
    void* total;           // X_T [m, N]
    i64 m;
    i64 x_row_stride;
    i64 residual_row_stride;
    i64 normed_row_stride;
    i64 total_row_stride;
    const void* next_weight;  // W_T [N] or null
    float eps;
    float next_eps;
};

__device__ __forceinline__ Rows rows_of(const Args& args) {
    return {(const char*)args.x,
            (const char*)args.residual,
            (const char*)args.weight,
            (char*)args.normed,
            (char*)args.total,
            args.m,
            args.x_row_stride,
            args.residual_row_stride,
            args.normed_row_stride,
            args.total_row_stride,
            0,
            0,
            0};
}

#if CLUSTER > 1
__shared__ u64 next_sums_arrived;

// The second reduction's sums may come while the first one's are still on their way to another CTA: each has a barrier
// of its own. Before `open_cluster`, which publishes it.
__device__ __forceinline__ void expect_next_sums() {
    if (threadIdx.x == 0) {
        const u32 barrier = shared_address(&next_sums_arrived);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                     "n"(ROWS_PER_CTA * SUMS * 4)
                     : "memory");
    }
}
#define NEXT_SUMS_ARRIVED &next_sums_arrived
#else
#define NEXT_SUMS_ARRIVED nullptr
#endif

constexpr int K = CHUNKS_PER_THREAD, U = ROWS_PER_THREAD;

// A chunk of x, or of the sum, as a norm reads it. x comes packed also where the sum is held in fp32.
template <int WORDS>
__device__ __forceinline__ void hold(const u32 (&chunk)[WORDS], u32 (&held)[HELD_WORDS]) {
    if constexpr (WORDS == HELD_WORDS) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word) held[word] = chunk[word];
    } else {
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const Pair pair = unpack<X_T>(chunk[p]);
            held[2 * p] = __float_as_uint(pair.lo);
            held[2 * p + 1] = __float_as_uint(pair.hi);
        }
    }
}

// What each row of the thread adds to its row's sum of squares, in the parts that the tree takes.
template <int WORDS>
__device__ __forceinline__ void squares_of(const u32 (&chunks)[U * K][WORDS], const Share& share,
                                           float (&partial)[U * SUMS_PER_THREAD]) {
#pragma unroll
    for (int i = 0; i < U * K; ++i) {
        u32 held[HELD_WORDS];
        hold(chunks[i], held);
        const float sum = sum_of_squares(held, (share.first_chunk + i % K * TPR) * VEC);
        if constexpr (TREE_THREADS) {
            partial[i / K] = i % K == 0 ? sum : __fadd_rn(partial[i / K], sum);
        } else {
            partial[i] = sum;
        }
    }
}

// Without this the compiler keeps the unpacked fp32 values across a reduction: twice the registers.
template <int WORDS>
__device__ __forceinline__ void keep_packed(u32 (&chunks)[U * K][WORDS]) {
#pragma unroll
    for (int i = 0; i < U * K; ++i) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word) asm volatile("" : "+r"(chunks[i][word]));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    rms_norm_add(const __grid_constant__ Args args) {
    constexpr int SIZE = size_of(X_T);
    const i64 first = (i64)(blockIdx.x / CLUSTER) * ROWS_PER_CTA;
    const Rows rows = rows_of(args);
    Rows next = rows;
    next.weight = (const char*)args.next_weight;
#if CLUSTER > 1
    if constexpr (NEXT) expect_next_sums();
    open_cluster();
#endif
    const Share share = share_of_thread();
    if constexpr (LAUNCH_AT == 0) launch_next_kernel();
    if constexpr (PREFETCH) prefetch_rows(rows, first, share.slot, share.thread, share.first_of_cta * VEC * SIZE);
    prefetch_weight(rows.weight, first, share.first_of_cta);
    if constexpr (NEXT) prefetch_weight(next.weight, first, share.first_of_cta);
    wait_for_previous_kernel();
    if constexpr (LAUNCH_AT == 1) launch_next_kernel();

    Weights weights[WEIGHTS_HELD], next_weights[WEIGHTS_HELD];
    u32 x[U * K][X_WORDS], residual[U * K][X_WORDS], held[U * K][HELD_WORDS];
    auto row_of = [&](int u) { return first + share.slot + u * SLOTS; };
    auto is_chunk = [&](int i) { return is_row(row_of(i / K), args.m) && share.exists(i % K); };
    auto chunk_of = [&](int i) { return share.first_chunk + i % K * TPR; };
    auto place = [&](const char* base, i64 stride, int i) {
        return base + (row_of(i / K) * stride + (i64)chunk_of(i) * VEC) * SIZE;
    };
    if constexpr (WEIGHT_WHEN == 0) load_weights(rows, share, weights, 0, 0);
#pragma unroll
    for (int i = 0; i < U * K; ++i) {
#pragma unroll
        for (int word = 0; word < X_WORDS; ++word) x[i][word] = residual[i][word] = 0;
        if (is_chunk(i)) {
            load_chunk<X_T, ALIGN>(x[i], place(rows.x, rows.x_row_stride, i), valid_elements(chunk_of(i)));
            load_chunk<X_T, ALIGN>(residual[i], place(rows.residual, rows.residual_row_stride, i),
                                   valid_elements(chunk_of(i)));
        }
    }
    if constexpr (LAUNCH_AT == 2) launch_next_kernel();
    if constexpr (WEIGHT_WHEN == 1) load_weights(rows, share, weights, 0, 0);
    if constexpr (NEXT && WEIGHT_WHEN < 2) load_weights(next, share, next_weights, 0, 0);

    float partial[U * SUMS_PER_THREAD], sums[U];
    squares_of(x, share, partial);
    if constexpr (WEIGHT_WHEN == 3) load_weights(rows, share, weights, 0, 0);
    sum_rows<U>(partial, sums, share.slot, share.thread);
    if constexpr (LAUNCH_AT == 3 && !NEXT) launch_next_kernel();
    keep_packed(x);

#pragma unroll
    for (int i = 0; i < U * K; ++i) {
        const int u = i / K, j = i % K;
        const float rstd = reciprocal_rms(sums[u], args.eps);
        load_late_weights(rows, share, weights, row_of(u), j);
        u32 normed[CHUNK_WORDS<OUT_T>], total[X_WORDS];
        hold(x[i], held[i]);
        normalise_chunk(held[i], rstd, weights[j % WEIGHTS_HELD], normed);
        add_chunk(normed, residual[i], held[i], total);
        if (!share.exists(j)) {  // its weight was not read, and the next norm counts it
#pragma unroll
            for (int word = 0; word < HELD_WORDS; ++word) held[i][word] = 0;
        }
        if (is_chunk(i))
            store_chunk<X_T, ALIGN>((char*)place(rows.total, rows.total_row_stride, i), total,
                                    valid_elements(chunk_of(i)));
    }

    if constexpr (NEXT) {
        squares_of(held, share, partial);
        if constexpr (WEIGHT_WHEN == 3) load_weights(next, share, next_weights, 0, 0);
        sum_rows<U, true>(partial, sums, share.slot, share.thread, NEXT_SUMS_ARRIVED);
        if constexpr (LAUNCH_AT == 3) launch_next_kernel();
        keep_packed(held);
#pragma unroll
        for (int i = 0; i < U * K; ++i) {
            const int u = i / K, j = i % K;
            const float rstd = reciprocal_rms(sums[u], args.next_eps);
            load_late_weights(next, share, next_weights, row_of(u), j);
            u32 normed[CHUNK_WORDS<OUT_T>];
            normalise_chunk(held[i], rstd, next_weights[j % WEIGHTS_HELD], normed);
            if (is_chunk(i))
                store_chunk<OUT_T, OUT_ALIGN>((char*)place(rows.normed, rows.normed_row_stride, i), normed,
                                              valid_elements(chunk_of(i)));
        }
    }
}
