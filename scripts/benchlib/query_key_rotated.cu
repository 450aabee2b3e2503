// A trial: the norms of a query and its key and their rotation in one launch, bit for bit what the model's norm and
// its `apply_rotary_pos_emb` give: the norm, q * cos, rotate_half(q) * sin and their sum are each rounded to 16 bits.
//
// Rows are [tokens, heads, N], contiguous, a chunk a thread; cos and sin are [angles, N], token t has row t % angles.

#include "rows.cuh"

struct Args {
    const void* x;
    const void* weight;
    void* rotated;
    i64 m;
    i64 heads;
    const void* x2;
    const void* weight2;
    void* rotated2;
    i64 m2;
    i64 heads2;
    const void* cos;
    const void* sin;
    i64 angles;
    float eps;
};

static_assert(CHUNKS_PER_THREAD == 1 && TPR * VEC == N && TPR <= 32 && CLUSTER == 1, "a row's chunks in one warp");
static_assert(X_T != DT_F32 && OUT_T == X_T && !STRIDE2, "contiguous 16-bit rows");

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    query_key_rotated(const __grid_constant__ Args args) {
    constexpr int WORDS = CHUNK_WORDS<OUT_T>, SIZE = size_of(X_T);
    const i64 first_ctas = (args.m + ROWS_PER_CTA - 1) / ROWS_PER_CTA;
    const bool query = blockIdx.x < first_ctas;
    const i64 first = (query ? blockIdx.x : blockIdx.x - first_ctas) * ROWS_PER_CTA;
    const i64 heads = query ? args.heads : args.heads2;
    const char* x = (const char*)(query ? args.x : args.x2);
    char* rotated = (char*)(query ? args.rotated : args.rotated2);
    const Rows rows = {x,       x,       (const char*)(query ? args.weight : args.weight2),
                       rotated, rotated, query ? args.m : args.m2,
                       N,       N,       N,
                       N,       0,       0,
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
        u32 normed[WORDS], partner[WORDS], cos[WORDS], sin[WORDS];
        normalise_chunk(held[u], reciprocal_rms(sums[u], args.eps), weights[0], normed);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) partner[i] = __shfl_xor_sync(0xffffffffu, normed[i], TPR / 2);
        if (!is_row(row, rows.m)) continue;
        const i64 angle = (row / heads % args.angles * N + share.thread * VEC) * SIZE;
        load_chunk<X_T, 16>(cos, (const char*)args.cos + angle, VEC);
        load_chunk<X_T, 16>(sin, (const char*)args.sin + angle, VEC);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const u32 half = share.thread < TPR / 2 ? partner[i] ^ 0x80008000u : partner[i];
            normed[i] = packed_add<X_T>(packed_multiply<X_T>(normed[i], cos[i]), packed_multiply<X_T>(half, sin[i]));
        }
        store_chunk<OUT_T, OUT_ALIGN>(rotated + (row * N + share.thread * VEC) * SIZE, normed, VEC);
    }
}
