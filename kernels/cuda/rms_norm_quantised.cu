// rms_norm and fused_add_rms_norm_ that write fp8 or int8 rows: what a quantised product reads. The first half is that
// of the norms, with their reduction tree, so that each byte and scale is that of quantising what they write.

#include "quantise.cuh"

// Strides in elements; two-level rows as in plain_ops.cuh. In place: total is residual.
struct Args {
    const void* x;         // X_T         [m, N]
    const void* residual;  // X_T         [m, N] or null
    const void* weight;    // W_T         [N] or null
    const void* given;     // fp32        [1]: the scale, an upper bound, or null
    void* quantised;       // QUANTISED_T [m, N], rows one after another
    void* scales;          // fp32        [m, groups], or null where the scale is given
    void* normed;          // OUT_T       [m, N], rows one after another, or null
    void* total;           // X_T         [m, N] or null
    i64 m;
    i64 x_row_stride;
    i64 total_row_stride;  // of residual and total
    i64 scale_row_stride;
    i64 scale_group_stride;
    i64 inner_rows;          // STRIDE2 only
    i64 x_outer_stride;      // STRIDE2 only
    i64 total_outer_stride;  // STRIDE2 only
    float eps;
};

__device__ __forceinline__ Rows rows_of(const Args& args) {
    return {(const char*)args.x,
            (const char*)args.residual,
            (const char*)args.weight,
            (char*)args.normed,
            (char*)args.total,
            args.m,
            args.x_row_stride,
            args.total_row_stride,
            N,
            args.total_row_stride,
            args.inner_rows,
            args.x_outer_stride,
            args.total_outer_stride};
}

// Between the two passes over a row with a scale of its own its values stay in registers where they take no more than
// the row did. Else the second pass computes them again.
constexpr bool KEEP_VALUES = SCHEME == 1 && ROWS_PER_THREAD * CHUNKS_PER_THREAD * (VALUE_WORDS - HELD_WORDS) <= 16;
constexpr int LANES_OF_GROUP = smaller(smaller(GROUP / VEC, LANES), 32);
static_assert(SCHEME != 2 || LANES_OF_GROUP == GROUP / VEC || CHUNKS <= LANES, "a group lies in one warp");

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    rms_norm_quantised(const __grid_constant__ Args args) {
    constexpr int K = CHUNKS_PER_THREAD, U = ROWS_PER_THREAD;
    const i64 first = (i64)(blockIdx.x / CLUSTER) * ROWS_PER_CTA;
    const Rows rows = rows_of(args);
#if CLUSTER > 1
    if constexpr (SCHEME == 1) expect_maxima();
    open_cluster();
#endif
    const Share share = share_of_thread();
    if constexpr (LAUNCH_AT == 0) launch_next_kernel();
    Weights weights[WEIGHTS_HELD];
    u32 held[U * K][HELD_WORDS];
    float sums[U];
    u32 given_bits = 0;
    read_rows(rows, share, first, held, sums, weights, [&] {
        if constexpr (SCHEME == 0 || HAS_BOUND) load_piece<4>(&given_bits, (const char*)args.given);
    });
    const float given = __uint_as_float(given_bits);

    auto row_of = [&](int u) { return first + share.slot + u * SLOTS; };
    auto values_of = [&](int u, int j, float rstd, u32(&values)[VALUE_WORDS]) {
        load_late_weights(rows, share, weights, row_of(u), j);
        values_of_chunk(held[u * K + j], rstd, weights[j % WEIGHTS_HELD], values);
    };
    auto offset_of = [&](int u, int j) { return row_of(u) * N + (i64)(share.first_chunk + j * TPR) * VEC; };
    auto is_chunk = [&](int u, int j) { return is_row(row_of(u), args.m) && share.exists(j); };
    auto store_normed = [&](int u, int j, const u32(&values)[VALUE_WORDS]) {
        if (BOTH && is_chunk(u, j)) store_unquantised(rows.normed + offset_of(u, j) * size_of(OUT_T), values);
    };
    auto store = [&](int u, int j, const u32(&values)[VALUE_WORDS], Step step) {
        if (is_chunk(u, j)) store_quantised((char*)args.quantised + offset_of(u, j), values, step);
    };
    auto store_scale = [&](int u, int group, float scale) {
        float* place = (float*)args.scales + row_of(u) * args.scale_row_stride + group * args.scale_group_stride;
        asm volatile("st.global.f32 [%0], %1;" ::"l"(place), "f"(scale) : "memory");
    };

    if constexpr (SCHEME == 1) {
        u32 kept[KEEP_VALUES ? U * K : 1][VALUE_WORDS];
        u32 largest[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const float rstd = reciprocal_rms(sums[u], args.eps);
            largest[u] = 0;
#pragma unroll
            for (int j = 0; j < K; ++j) {
                u32(&values)[VALUE_WORDS] = kept[KEEP_VALUES ? u * K + j : 0];
                values_of(u, j, rstd, values);
                store_normed(u, j, values);
                if (share.exists(j)) largest[u] = larger(largest[u], largest_of_chunk(values));
            }
        }
        largest_of_rows<U>(largest, share);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const float rstd = reciprocal_rms(sums[u], args.eps);
            const float row_largest = __uint_as_float(largest[u]);
            const float scale = scale_of(row_largest, given);
            if (share.first_chunk == 0 && is_row(row_of(u), args.m)) store_scale(u, 0, scale);
            const Step step = step_of(scale, row_largest);
            if constexpr (!KEEP_VALUES && WEIGHT_WHEN == 3) load_weights(rows, share, weights, row_of(u), 0);
#pragma unroll
            for (int j = 0; j < K; ++j) {
                u32(&values)[VALUE_WORDS] = kept[KEEP_VALUES ? u * K + j : 0];
                if constexpr (!KEEP_VALUES) values_of(u, j, rstd, values);
                store(u, j, values, step);
            }
        }
    } else {
        const Step given_step = SCHEME == 0 ? step_of(given, 0.0f) : Step{};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const float rstd = reciprocal_rms(sums[u], args.eps);
#pragma unroll
            for (int j = 0; j < K; ++j) {
                u32 values[VALUE_WORDS];
                values_of(u, j, rstd, values);
                store_normed(u, j, values);
                if constexpr (SCHEME == 0) {
                    store(u, j, values, given_step);
                } else {
                    const int chunk = share.first_chunk + j * TPR;
                    const u32 mine = share.exists(j) ? largest_of_chunk(values) : 0;
                    const float largest = __uint_as_float(largest_of_lanes<LANES_OF_GROUP>(mine));
                    const float scale = scale_of(largest, given);
                    if (chunk % LANES_OF_GROUP == 0 && is_chunk(u, j)) store_scale(u, chunk / LANES_OF_GROUP, scale);
                    store(u, j, values, step_of(scale, largest));
                }
            }
        }
    }
}
