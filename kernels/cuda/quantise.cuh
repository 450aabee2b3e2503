// From the values of a norm to fp8 or int8 rows and their scales: rmsnorm_patch/numerics/quantisation.py defines each
// bit.
//
// MACROS beside those of abi.cuh, as integers:
//   SCHEME       0: one scale, given.  1: one scale a row.  2: one scale for GROUP columns of a row
//   QUANTISED_T  0: fp8 e4m3.  1: int8
//   FROM_F32     0: the values are rounded to OUT_T first.  1: they are what the norm has before its last rounding
//   STEP         0: value / scale.  1: value * (1 / scale).  2: value * (limit / largest), 0 where the largest is 0
//                3: value * (limit / largest), whose inverse the scale is, by the device's approximate quotients
//   NOT_A_NUMBER 0: becomes the limit.  1: its negative.  2: stays one, and with it the scale.  3: stays one alone.
//                int8: 0 gives 0
//   LARGEST_AT_LEAST, SCALE_AT_LEAST, ROUNDED_SCALE_AT_LEAST
//                bits of fp32 lower bounds: of the largest value, of the scale, of the scale after it was rounded up
//   POWER_OF_TWO 1: scales are rounded up to powers of two
//   HAS_BOUND    1: `given` is an upper bound of the largest value
//   BOTH         1: the rows as the unquantised op would write them, too

#pragma once

#include "rows.cuh"

constexpr int GROUP = 128;
constexpr float LIMIT = QUANTISED_T ? 127.0f : 448.0f;
constexpr int VALUE_T = FROM_F32 ? DT_F32 : OUT_T;
constexpr int VALUE_WORDS = CHUNK_WORDS<VALUE_T>;
constexpr int QUANTISED_WORDS = ceil_div(VEC, 4);

static_assert(N % VEC == 0, "whole chunks: the bytes of one are stored at once");

// What is quantised of two neighbouring columns.
template <bool FROM_F32_>
__device__ __forceinline__ auto value_of(Pair x, float rstd, Stored<W_T> weight) {
    if constexpr (!FROM_F32_) {
        return normalise(x, rstd, weight);
    } else {
        Stored<ROUND_T> rounded = narrow<ROUND_T>({__fmul_rn(x.lo, rstd), __fmul_rn(x.hi, rstd)});
        if constexpr (!HAS_WEIGHT) {
            return convert<DT_F32, ROUND_T>(rounded);
        } else {
            return multiply<DT_F32>(rounded, weight_factor<OFFSET>(weight));
        }
    }
}

__device__ __forceinline__ void values_of_chunk(const u32 (&held)[HELD_WORDS], float rstd, const Weights& weights,
                                                u32 (&values)[VALUE_WORDS]) {
    constexpr int W_PER_PAIR = size_of(W_T) / 2, PER_PAIR = size_of(VALUE_T) / 2;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        Stored<W_T> weight;
#pragma unroll
        for (int i = 0; i < W_PER_PAIR; ++i) weight.word[i] = HAS_WEIGHT ? weights.word[p * W_PER_PAIR + i] : 0;
        Stored<VALUE_T> value = value_of<FROM_F32>(held_pair(held, p), rstd, weight);
#pragma unroll
        for (int i = 0; i < PER_PAIR; ++i) values[p * PER_PAIR + i] = value.word[i];
    }
}

__device__ __forceinline__ Pair value_pair(const u32 (&values)[VALUE_WORDS], int p) {
    Stored<VALUE_T> value;
#pragma unroll
    for (int i = 0; i < size_of(VALUE_T) / 2; ++i) value.word[i] = values[p * (size_of(VALUE_T) / 2) + i];
    return widen<VALUE_T>(value);
}

__device__ __forceinline__ void store_unquantised(char* p, const u32 (&values)[VALUE_WORDS]) {
    constexpr int PER_PAIR = size_of(OUT_T) / 2;
    u32 normed[CHUNK_WORDS<OUT_T>];
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
        Stored<OUT_T> result = narrow<OUT_T>(value_pair(values, pair));
#pragma unroll
        for (int i = 0; i < PER_PAIR; ++i) normed[pair * PER_PAIR + i] = result.word[i];
    }
    store_chunk<OUT_T, OUT_ALIGN>(p, normed, VEC);
}

// Magnitudes as the bits of their fp32, whose order as integers is theirs, with NaN above infinity.
__device__ __forceinline__ u32 larger(u32 a, u32 b) { return a > b ? a : b; }

__device__ __forceinline__ u32 largest_of_chunk(const u32 (&values)[VALUE_WORDS]) {
    float number = 0.0f;  // fmaxf takes the other where one is NaN
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        Pair pair = value_pair(values, i / 2);
        const float value = i % 2 ? pair.hi : pair.lo;
        if constexpr (NOT_A_NUMBER == 2) {
            bits = larger(bits, __float_as_uint(value) & 0x7fffffffu);
        } else {
            number = fmaxf(number, fabsf(value));
        }
    }
    return NOT_A_NUMBER == 2 ? bits : __float_as_uint(number);
}

template <int LANES_>
__device__ __forceinline__ u32 largest_of_lanes(u32 largest) {
    if constexpr (LANES_ == 32) {
        u32 result;
        asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(largest));
        return result;
    } else {
#pragma unroll
        for (int mask = LANES_ / 2; mask > 0; mask /= 2)
            largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
        return largest;
    }
}

#if CLUSTER > 1
__shared__ u64 maxima_arrived;

// Every thread calls it in front of open_cluster, which publishes the barrier.
__device__ __forceinline__ void expect_maxima() {
    if (threadIdx.x == 0) {
        const u32 barrier = shared_address(&maxima_arrived);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                     "n"(ROWS_PER_CTA * WARPS * CLUSTER * 4)
                     : "memory");
    }
}
#endif

// In: each thread's largest of each of its rows. Out: the row's, the same in all threads of the row.
template <int ROWS>
__device__ __forceinline__ void largest_of_rows(u32 (&largest)[ROWS], const Share& share) {
#pragma unroll
    for (int u = 0; u < ROWS; ++u) largest[u] = largest_of_lanes<LANES>(largest[u]);
    if constexpr (TPR > 32) {
        constexpr int COUNT = WARPS * CLUSTER;
        __shared__ u32 shared_maxima[SLOTS][ROWS][COUNT];
        const int lane = threadIdx.x % 32;
#if CLUSTER > 1
        const int place = cluster_rank() * WARPS + share.thread / 32;
        if (lane < CLUSTER) {
#pragma unroll
            for (int u = 0; u < ROWS; ++u)
                send_to_cta(&shared_maxima[share.slot][u][place], &maxima_arrived, lane, largest[u]);
        }
        wait_for_arrival(&maxima_arrived);
#else
        if (lane == 0) {
#pragma unroll
            for (int u = 0; u < ROWS; ++u) shared_maxima[share.slot][u][share.thread / 32] = largest[u];
        }
        row_group_barrier(share.slot);
#endif
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
            u32 mine = 0;
#pragma unroll
            for (int i = 0; i < COUNT; i += 32)
                if (i + 32 <= COUNT || i + lane < COUNT) mine = larger(mine, shared_maxima[share.slot][u][i + lane]);
            largest[u] = largest_of_lanes<32>(mine);
        }
    }
}

// The larger of the two, NaN where `value` is one.
__device__ __forceinline__ float at_least(float value, float bound) { return value < bound ? bound : value; }

// Correctly rounded. By 448 the product with the rounded inverse needs one correction: right for each fraction. Below
// the normal numbers it need not be; a lower bound of the scale stands there.
__device__ __forceinline__ float over_limit(float largest) {
    if constexpr (QUANTISED_T == 1) return __fdiv_rn(largest, LIMIT);
    constexpr float INVERSE = 1.0f / 448.0f;
    const float quotient = __fmul_rn(largest, INVERSE);
    const float better = __fmaf_rn(__fmaf_rn(-quotient, 448.0f, largest), INVERSE, quotient);
    return isinf(largest) ? largest : better;
}

// The factor of STEP 3, 1 where it is infinite. FlashInfer is compiled with -use_fast_math: its quotients are these two
// instructions, and a value next to the middle of two e4m3 numbers follows their last bits.
__device__ __forceinline__ float factor_of(float largest) {
    float factor;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(factor) : "f"(LIMIT), "f"(largest));
    return isinf(factor) ? 1.0f : factor;
}

__device__ __forceinline__ float inverse_of(float factor) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(factor));
    return inverse;
}

__device__ __forceinline__ float scale_of(float largest, float given) {
    if constexpr (STEP == 3) return inverse_of(factor_of(largest));
    if constexpr (HAS_BOUND) largest = largest > given ? given : largest;
    if constexpr (LARGEST_AT_LEAST != 0) largest = at_least(largest, __uint_as_float(LARGEST_AT_LEAST));
    float scale = over_limit(largest);
    if constexpr (SCALE_AT_LEAST != 0) scale = at_least(scale, __uint_as_float(SCALE_AT_LEAST));
    if constexpr (POWER_OF_TWO) {
        // Below infinity: an addition that carries into the exponent where any bit of the fraction is set.
        const u32 bits = __float_as_uint(scale);
        if (bits < 0x7f800000u) scale = __uint_as_float((bits + 0x7fffffu) & 0xff800000u);
    }
    if constexpr (ROUNDED_SCALE_AT_LEAST != 0) scale = at_least(scale, __uint_as_float(ROUNDED_SCALE_AT_LEAST));
    return scale;
}

// A product with the inverse of a power of two is the quotient.
constexpr bool DIVIDES = STEP == 0 && !(POWER_OF_TWO && ROUNDED_SCALE_AT_LEAST == 0);

// A scale, made ready for the values that it serves.
struct Step {
    float inverse, divisor;
};

__device__ __forceinline__ Step step_of(float scale, float largest) {
    if constexpr (STEP == 3) return {factor_of(largest), 0.0f};
    if constexpr (STEP == 2) return {largest == 0.0f ? 0.0f : __fdiv_rn(LIMIT, largest), 0.0f};
    // An infinite divisor has the inverse 0, which is exact: nothing may correct it.
    return {__frcp_rn(scale), isinf(scale) ? 0.0f : scale};
}

// The value in units of the scale: a product, or a quotient that e4m3 rounds as it does the correctly rounded one. For
// that the product with the correctly rounded inverse takes one correction
// (integration_tests/numerics/test_quotients.py has the proof). The remainder is negative, so that -0 stays -0.
__device__ __forceinline__ float in_steps(float value, Step step) {
    float quotient = __fmul_rn(value, step.inverse);
    if constexpr (DIVIDES) {
        const float better = __fmaf_rn(__fmaf_rn(quotient, step.divisor, -value), -step.inverse, quotient);
        // Beyond a bound the product may be infinite, and says all there is.
        quotient = !HAS_BOUND || fabsf(quotient) <= 2.0f * LIMIT ? better : quotient;
    }
    if constexpr (QUANTISED_T == 0 && NOT_A_NUMBER == 0) quotient = fminf(quotient, LIMIT);
    if constexpr (QUANTISED_T == 0 && NOT_A_NUMBER == 1) quotient = fmaxf(quotient, -LIMIT);
    return quotient;
}

// Two values in the low half, the first lowest. Both conversions round to nearest even and saturate.
__device__ __forceinline__ u32 quantise_pair(Pair value) {
    u32 packed;
    if constexpr (QUANTISED_T == 0) {
        u16 half;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(half) : "f"(value.hi), "f"(value.lo));
        packed = half;
    } else {
        int lo, hi;
        asm("cvt.rni.s32.f32 %0, %1;" : "=r"(lo) : "f"(value.lo));
        asm("cvt.rni.s32.f32 %0, %1;" : "=r"(hi) : "f"(value.hi));
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(packed) : "r"(hi), "r"(lo));
    }
    return packed;
}

__device__ __forceinline__ void store_quantised(char* p, const u32 (&values)[VALUE_WORDS], Step step) {
    u32 words[QUANTISED_WORDS];
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
        const Pair value = value_pair(values, pair);
        const u32 two = quantise_pair({in_steps(value.lo, step), in_steps(value.hi, step)});
        words[pair / 2] = pair % 2 ? words[pair / 2] | two << 16 : two;
    }
    if constexpr (VEC == 1) {
        asm volatile("st.global.b8 [%0], %1;" ::"l"(p), "r"(words[0]) : "memory");
    } else {
        store_piece<VEC>(p, words);
    }
}
