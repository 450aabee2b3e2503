// The norms of a query and its key and their rotation in one launch: each row is normed, then turned by the angles of
// its token. Rounded where a model rounds: the norm, x * cos, rotate_half(x) * sin, and the sum of the two products.

#include "rows.cuh"

// Strides in elements. Row r of x is head r % inner_rows of token r / inner_rows; STRIDE2 as in plain_ops.cuh. The
// results are [tokens, heads, N]. Token t has row t % angles of cos and sin. Fewer than 2^31 rows in either set.
struct Args {
    const void* x;       // X_T [m, N]
    const void* weight;  // W_T [N] or null
    void* normed;        // OUT_T [m, N], rotated
    i64 m;
    i64 x_row_stride;
    i64 inner_rows;      // heads of a token
    i64 x_outer_stride;  // STRIDE2 only
    // The second set: m2 rows of the same N and dtypes.
    const void* x2;
    const void* weight2;
    void* normed2;
    i64 m2;
    i64 x2_row_stride;
    i64 inner_rows2;
    i64 x2_outer_stride;
    const void* cos;  // OUT_T [angles, N], addresses of full alignment
    const void* sin;
    i64 angles;
    float eps;
};

static_assert(!FUSED_ADD && CLUSTER == 1 && WEIGHT_ROWS == 1, "two plain norms");
static_assert(CHUNKS_PER_THREAD == 1 && TPR * VEC == N && TPR > 1 && TPR <= 32, "a row's chunks in one warp, one each");
static_assert(OUT_T == X_T, "the rotation's operands have one dtype");

// x * cos + turned * sin, one or two values: the products and the sum are rounded each.
__device__ __forceinline__ u32 rotate_word(u32 x, u32 turned, u32 cos, u32 sin) {
    if constexpr (OUT_T == DT_F32) {
        return __float_as_uint(__fadd_rn(__fmul_rn(__uint_as_float(x), __uint_as_float(cos)),
                                         __fmul_rn(__uint_as_float(turned), __uint_as_float(sin))));
    } else {
        return packed_add<OUT_T>(packed_multiply<OUT_T>(x, cos), packed_multiply<OUT_T>(turned, sin));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    rms_norm_rotated(const __grid_constant__ Args args) {
    constexpr int WORDS = CHUNK_WORDS<OUT_T>, SIZE = size_of(OUT_T);
    constexpr u32 SIGNS = OUT_T == DT_F32 ? 0x80000000u : 0x80008000u;
    const i64 first_ctas = (args.m + ROWS_PER_CTA - 1) / ROWS_PER_CTA;
    const bool query = blockIdx.x < first_ctas;
    const i64 first = (query ? blockIdx.x : blockIdx.x - first_ctas) * ROWS_PER_CTA;
    const i64 heads = query ? args.inner_rows : args.inner_rows2;
    const char* x = (const char*)(query ? args.x : args.x2);
    char* rotated = (char*)(query ? args.normed : args.normed2);
    const Rows rows = {x,
                       x,
                       (const char*)(query ? args.weight : args.weight2),
                       rotated,
                       rotated,
                       query ? args.m : args.m2,
                       query ? args.x_row_stride : args.x2_row_stride,
                       0,
                       N,
                       N,
                       heads,
                       query ? args.x_outer_stride : args.x2_outer_stride,
                       0};
    const Share share = share_of_thread();
    if constexpr (LAUNCH_AT == 0) launch_next_kernel();
    Weights weights[WEIGHTS_HELD];
    u32 held[ROWS_PER_THREAD][HELD_WORDS];
    float sums[ROWS_PER_THREAD];
    read_rows(rows, share, first, held, sums, weights, [] {});

#pragma unroll
    for (int u = 0; u < ROWS_PER_THREAD; ++u) {
        const i64 row = first + share.slot + u * SLOTS;
        load_late_weights(rows, share, weights, row, 0);
        u32 normed[WORDS], turned[WORDS], cos[WORDS], sin[WORDS];
        normalise_chunk(held[u], reciprocal_rms(sums[u], args.eps), weights[0], normed);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) turned[i] = __shfl_xor_sync(0xffffffffu, normed[i], TPR / 2);
        if (row >= rows.m) continue;
        const u32 token = (u32)row / (u32)heads;
        const i64 angle = ((i64)(token % (u32)args.angles) * N + share.thread * VEC) * SIZE;
        load_chunk<OUT_T, VEC * SIZE>(cos, (const char*)args.cos + angle, VEC);
        load_chunk<OUT_T, VEC * SIZE>(sin, (const char*)args.sin + angle, VEC);
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            normed[i] = rotate_word(normed[i], share.thread < TPR / 2 ? turned[i] ^ SIGNS : turned[i], cos[i], sin[i]);
        store_chunk<OUT_T, OUT_ALIGN>(rotated + (row * N + share.thread * VEC) * SIZE, normed, VEC);
    }
}
