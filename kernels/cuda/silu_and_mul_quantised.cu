// silu(gate) * up, written as fp8 or int8 rows: what a quantised product behind a gated MLP reads. Each byte and scale
// is that of quantising what rmsnorm_patch/numerics/silu.py defines.
//
// A scale of a whole row takes a CTA or a cluster a row. Where no scale is a whole row's, a row is cut in parts that
// know nothing of each other.
//
// Beside the macros of quantise.cuh:
//   SILU         0: gate / (1 + e^-gate), rounded to X_T.  1: the same in fp32.  2: gate * (1 / (1 + e^-gate)) in fp32
//   PART_CHUNKS  chunks that a thread has of its part of a row. 0: rows are whole

#include "quantise.cuh"

// Strides in elements.
struct Args {
    const void* x;      // X_T         [m, 2 * N]: N gates of a row, then what they multiply
    const void* given;  // fp32        [1]: the scale, an upper bound, or null
    void* quantised;    // QUANTISED_T [m, N], rows one after another
    void* scales;       // fp32        [m, groups], or null where the scale is given
    i64 m;
    i64 x_row_stride;
    i64 scale_row_stride;
    i64 scale_group_stride;
};

constexpr int K = PART_CHUNKS ? PART_CHUNKS : CHUNKS_PER_THREAD;
constexpr int PARTS = PART_CHUNKS ? ceil_div(CHUNKS, TPR* K) : 1;
constexpr bool ALL_EXIST = CHUNKS == TPR * K * CLUSTER * PARTS;
constexpr int LANES_OF_GROUP = GROUP / VEC;
static_assert(ROWS_PER_THREAD == 1 && TPR % 32 == 0, "whole warps share a row, and a warp has one");
static_assert(SCHEME == 1 || LANES_OF_GROUP <= 32, "a group lies in one warp");
static_assert(SCHEME != 1 || PART_CHUNKS == 0, "a scale of a whole row takes whole rows");
static_assert(PARTS == 1 || (ROWS_PER_CTA == 1 && CLUSTER == 1), "parts have CTAs of their own");

__device__ __forceinline__ float silu(float gate) {
    const float denominator = __fadd_rn(1.0f, expf(-gate));
    return SILU == 2 ? __fmul_rn(gate, __frcp_rn(denominator)) : __fdiv_rn(gate, denominator);
}

// SILU_ is a parameter, so that the branch which does not fit the dtypes is left out.
template <int SILU_>
__device__ __forceinline__ Pair silu_pair(Pair gate) {
    const Pair factor = {silu(gate.lo), silu(gate.hi)};
    if constexpr (SILU_ == 0) {
        return widen<X_T>(narrow<X_T>(factor));
    } else {
        return factor;
    }
}

__device__ __forceinline__ void values_of_chunk(const u32 (&gate)[X_WORDS], const u32 (&up)[X_WORDS],
                                                u32 (&values)[VALUE_WORDS]) {
    constexpr int PER_PAIR = size_of(VALUE_T) / 2;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        const Pair factor = silu_pair<SILU>(unpack<X_T>(gate[p])), other = unpack<X_T>(up[p]);
        const Stored<VALUE_T> value = narrow<VALUE_T>({__fmul_rn(factor.lo, other.lo), __fmul_rn(factor.hi, other.hi)});
#pragma unroll
        for (int i = 0; i < PER_PAIR; ++i) values[p * PER_PAIR + i] = value.word[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    silu_and_mul_quantised(const __grid_constant__ Args args) {
    const i64 first = (i64)(blockIdx.x / CLUSTER) * ROWS_PER_CTA;
#if CLUSTER > 1
    expect_maxima();
    open_cluster();
#endif
    const Share share = share_of_thread();
    const i64 row = PARTS == 1 ? first + share.slot : blockIdx.x / PARTS;
    const int first_chunk = PARTS == 1 ? share.first_chunk : blockIdx.x % PARTS * (TPR * K) + share.thread;
    const bool live = is_row(row, args.m);
    auto is_chunk = [&](int j) { return live && (ALL_EXIST || first_chunk + j * TPR < CHUNKS); };
    const char* gates = (const char*)args.x + row * args.x_row_stride * size_of(X_T);
    char* quantised = (char*)args.quantised + row * N;
    if constexpr (LAUNCH_AT == 0) launch_next_kernel();
    wait_for_previous_kernel();
    if constexpr (LAUNCH_AT == 1) launch_next_kernel();

    u32 given_bits = 0;
    if constexpr (SCHEME == 0 || HAS_BOUND) load_piece<4>(&given_bits, (const char*)args.given);
    u32 values[K][VALUE_WORDS];
#pragma unroll
    for (int stage = 0; stage < K; stage += STAGE) {
        u32 gate[STAGE][X_WORDS], up[STAGE][X_WORDS];
#pragma unroll
        for (int j = stage; j < smaller(stage + STAGE, K); ++j) {
            if (is_chunk(j)) {
                const char* chunk = gates + (first_chunk + j * TPR) * (VEC * size_of(X_T));
                load_chunk<X_T, ALIGN>(gate[j - stage], chunk, VEC);
                load_chunk<X_T, ALIGN>(up[j - stage], chunk + N * size_of(X_T), VEC);
            } else {
#pragma unroll
                for (int word = 0; word < X_WORDS; ++word) gate[j - stage][word] = up[j - stage][word] = 0;
            }
        }
        if (LAUNCH_AT == 2 && stage + STAGE >= K) launch_next_kernel();
#pragma unroll
        for (int j = stage; j < smaller(stage + STAGE, K); ++j)
            values_of_chunk(gate[j - stage], up[j - stage], values[j]);
    }

    const float given = __uint_as_float(given_bits);
    auto store = [&](int j, Step step) {
        if (is_chunk(j)) store_quantised(quantised + (first_chunk + j * TPR) * VEC, values[j], step);
    };
    auto store_scale = [&](int group, float scale) {
        float* place = (float*)args.scales + row * args.scale_row_stride + group * args.scale_group_stride;
        asm volatile("st.global.f32 [%0], %1;" ::"l"(place), "f"(scale) : "memory");
    };
    if constexpr (SCHEME == 0) {
        const Step step = step_of(given, 0.0f);
#pragma unroll
        for (int j = 0; j < K; ++j) store(j, step);
    } else if constexpr (SCHEME == 1) {
        u32 largest[1] = {0};
#pragma unroll
        for (int j = 0; j < K; ++j) largest[0] = larger(largest[0], largest_of_chunk(values[j]));
#if CLUSTER > 1
        wait_for_cluster();
#endif
        largest_of_rows<1>(largest, share);
        const float row_largest = __uint_as_float(largest[0]);
        const float scale = scale_of(row_largest, given);
        if (first_chunk == 0 && live) store_scale(0, scale);
        const Step step = step_of(scale, row_largest);
#pragma unroll
        for (int j = 0; j < K; ++j) store(j, step);
    } else {
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const int chunk = first_chunk + j * TPR;
            const float largest = __uint_as_float(largest_of_lanes<LANES_OF_GROUP>(largest_of_chunk(values[j])));
            const float scale = scale_of(largest, given);
            if (chunk % LANES_OF_GROUP == 0 && is_chunk(j)) store_scale(chunk / LANES_OF_GROUP, scale);
            store(j, step_of(scale, largest));
        }
    }
}
