// Bit-level fp16/bf16 arithmetic without headers, and the rounding steps of one NormSpec.
//
// 16-bit values stay packed in pairs. The packed add and multiply give the bits of "convert to fp32, operate, round
// back", which is what PyTorch computes: fp32 has more than 2p+2 bits for both 16-bit formats, so its extra rounding is
// innocuous.

#pragma once

#include "abi.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

__host__ __device__ constexpr int size_of(int dtype) { return dtype == DT_F32 ? 4 : 2; }

struct Pair {
    float lo, hi;
};

template <int DTYPE>
__device__ __forceinline__ Pair unpack(u32 packed) {
    Pair pair;
    if constexpr (DTYPE == DT_BF16) {
        pair.lo = __uint_as_float(packed << 16);
        pair.hi = __uint_as_float(packed & 0xffff0000u);
    } else {
        asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
            : "=f"(pair.lo), "=f"(pair.hi)
            : "r"(packed));
    }
    return pair;
}

template <int DTYPE>
__device__ __forceinline__ u32 pack(Pair pair) {
    u32 packed;
    if constexpr (DTYPE == DT_BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(pair.hi), "f"(pair.lo));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(pair.hi), "f"(pair.lo));
    }
    return packed;
}

template <int DTYPE>
__device__ __forceinline__ u32 packed_add(u32 a, u32 b) {
    u32 sum;
    if constexpr (DTYPE == DT_BF16) {  // sm_80 has no bf16 add; 1 * a + b rounds once as well
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
    } else {
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    }
    return sum;
}

template <int DTYPE>
__device__ __forceinline__ u32 packed_multiply(u32 a, u32 b) {
    u32 product;
    if constexpr (DTYPE == DT_BF16) {  // a * b + (-0) keeps the sign of a zero product
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    } else {
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    }
    return product;
}

// Two neighbouring values as they lie in memory: one word for 16-bit dtypes, two for fp32.
template <int DTYPE>
struct Stored {
    u32 word[size_of(DTYPE) / 2];
};

template <int DTYPE>
__device__ __forceinline__ Pair widen(Stored<DTYPE> stored) {
    if constexpr (DTYPE == DT_F32) {
        return {__uint_as_float(stored.word[0]), __uint_as_float(stored.word[1])};
    } else {
        return unpack<DTYPE>(stored.word[0]);
    }
}

template <int DTYPE>
__device__ __forceinline__ Stored<DTYPE> narrow(Pair pair) {
    if constexpr (DTYPE == DT_F32) {
        return {{__float_as_uint(pair.lo), __float_as_uint(pair.hi)}};
    } else {
        return {{pack<DTYPE>(pair)}};
    }
}

template <int TO, int FROM>
__device__ __forceinline__ Stored<TO> convert(Stored<FROM> stored) {
    if constexpr (TO == FROM) {
        return stored;
    } else {
        return narrow<TO>(widen<FROM>(stored));
    }
}

// (offset + weight), in the dtype the multiply sees.
constexpr int FACTOR_T = OFFSET == 1 ? DT_F32 : W_T;
constexpr int PRODUCT_T = ROUND_T == FACTOR_T ? ROUND_T : DT_F32;

template <int OFFSET_>
__device__ __forceinline__ auto weight_factor(Stored<W_T> weight) {
    if constexpr (OFFSET_ == 0) {
        return weight;
    } else {
        Pair w = widen<W_T>(weight);
        return narrow<FACTOR_T>({__fadd_rn(1.0f, w.lo), __fadd_rn(1.0f, w.hi)});
    }
}

// round(x * rstd) * (offset + weight): in 16 bits where both factors have that type, else in fp32.
template <int PRODUCT, int ROUNDED, int FACTOR>
__device__ __forceinline__ Stored<PRODUCT> multiply(Stored<ROUNDED> x, Stored<FACTOR> factor) {
    if constexpr (PRODUCT != DT_F32) {
        return {{packed_multiply<PRODUCT>(x.word[0], factor.word[0])}};
    } else {
        Pair h = widen<ROUNDED>(x), w = widen<FACTOR>(factor);
        return {{__float_as_uint(__fmul_rn(h.lo, w.lo)), __float_as_uint(__fmul_rn(h.hi, w.hi))}};
    }
}

// normed = round_out(round(x * rstd) * (offset + weight)); every step rounds on its own, nothing is contracted.
__device__ __forceinline__ Stored<OUT_T> normalise(Pair x, float rstd, Stored<W_T> weight) {
    Stored<ROUND_T> rounded = narrow<ROUND_T>({__fmul_rn(x.lo, rstd), __fmul_rn(x.hi, rstd)});
    if constexpr (!HAS_WEIGHT) {
        return convert<OUT_T, ROUND_T>(rounded);
    } else {
        return convert<OUT_T, PRODUCT_T>(multiply<PRODUCT_T>(rounded, weight_factor<OFFSET>(weight)));
    }
}
