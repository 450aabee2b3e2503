// Global-memory accesses of one chunk (VEC neighbouring elements), the dependent-launch instructions, row addresses.
//
// Loads are `asm volatile`, so that the compiler keeps them where they stand: below `griddepcontrol.wait`, and in an
// order that was measured. `.nc` loads may come from before the wait, which is wrong for x, residual and weight alike.

#pragma once

#include "numerics.cuh"

#if __CUDA_ARCH__ >= 1000
constexpr int MAX_ACCESS = 32;  // 256-bit ld/st.global: sm_100 and later, PTX ISA 8.8
#else
constexpr int MAX_ACCESS = 16;
#endif

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's CTAs become resident. They still wait for this grid's completion before they read anything.
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <int BYTES>
__device__ __forceinline__ void load_piece(u32* w, const char* p) {
    if constexpr (BYTES == 32) {
        asm volatile("ld.global.v8.b32 {%0,%1,%2,%3,%4,%5,%6,%7}, [%8];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]), "=r"(w[4]), "=r"(w[5]), "=r"(w[6]), "=r"(w[7])
                     : "l"(p));
    } else if constexpr (BYTES == 16) {
        asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.global.v2.b32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    } else if constexpr (BYTES == 4) {
        asm volatile("ld.global.b32 %0, [%1];" : "=r"(w[0]) : "l"(p));
    } else {
        u16 half;
        asm volatile("ld.global.b16 %0, [%1];" : "=h"(half) : "l"(p));
        w[0] = half;
    }
}

template <int BYTES>
__device__ __forceinline__ void store_piece(char* p, const u32* w) {
    if constexpr (BYTES == 32) {
        asm volatile("st.global.v8.b32 [%0], {%1,%2,%3,%4,%5,%6,%7,%8};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                     "r"(w[3]), "r"(w[4]), "r"(w[5]), "r"(w[6]), "r"(w[7])
                     : "memory");
    } else if constexpr (BYTES == 16) {
        asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                     : "memory");
    } else if constexpr (BYTES == 8) {
        asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
    } else if constexpr (BYTES == 4) {
        asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
    } else {
        asm volatile("st.global.b16 [%0], %1;" ::"l"(p), "h"((u16)w[0]) : "memory");
    }
}

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// A chunk's words: 16-bit elements in pairs (an odd last one alone in the low half), fp32 one a word.
template <int DTYPE>
constexpr int CHUNK_WORDS = DTYPE == DT_F32 ? (VEC + 1) / 2 * 2 : (VEC + 1) / 2;

// The first `valid` elements of a chunk (VEC, except in the last chunk of a row whose length is no multiple of VEC).
// ALIGNMENT: bytes by which every chunk's address is aligned.
template <int DTYPE, int ALIGNMENT>
__device__ __forceinline__ void load_chunk(u32 (&w)[CHUNK_WORDS<DTYPE>], const char* p, int valid) {
    constexpr int SIZE = size_of(DTYPE);
    constexpr int PIECE = smaller(smaller(ALIGNMENT, MAX_ACCESS), VEC * SIZE);
    if (N % VEC == 0 || valid == VEC) {
        if constexpr (PIECE >= 4) {
#pragma unroll
            for (int b = 0; b < VEC * SIZE; b += PIECE) load_piece<PIECE>(w + b / 4, p + b);
        } else {
#pragma unroll
            for (int i = 0; i < VEC; i += 2) {
                u32 lo, hi = 0;
                load_piece<2>(&lo, p + i * 2);
                if (i + 1 < VEC) load_piece<2>(&hi, p + i * 2 + 2);
                w[i / 2] = lo | hi << 16;
            }
        }
        if constexpr (VEC == 1 && SIZE == 4) w[1] = 0;
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            u32 element = 0;
            if (i < valid) load_piece<SIZE>(&element, p + i * SIZE);
            if constexpr (SIZE == 4) {
                w[i] = element;
            } else {
                w[i / 2] = i % 2 ? w[i / 2] | element << 16 : element;
            }
        }
    }
}

template <int DTYPE, int ALIGNMENT>
__device__ __forceinline__ void store_chunk(char* p, const u32 (&w)[CHUNK_WORDS<DTYPE>], int valid) {
    constexpr int SIZE = size_of(DTYPE);
    constexpr int PIECE = smaller(smaller(ALIGNMENT, MAX_ACCESS), VEC * SIZE);
    if (PIECE >= 4 && (N % VEC == 0 || valid == VEC)) {
#pragma unroll
        for (int b = 0; b < VEC * SIZE; b += PIECE) store_piece<PIECE>(p + b, w + b / 4);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            u32 element = SIZE == 4 ? w[i] : w[i / 2] >> (i % 2 * 16);
            if (N % VEC == 0 || i < valid) store_piece<SIZE>(p + i * SIZE, &element);
        }
    }
}

// Element offset of row `row` in a tensor addressed by one or two strides.
__device__ __forceinline__ i64 row_offset(i64 row, i64 inner_rows, i64 outer_stride, i64 row_stride) {
    if constexpr (STRIDE2) {
        i64 outer, inner;
        if ((row | inner_rows) >> 32) {
            outer = row / inner_rows;
            inner = row % inner_rows;
        } else {
            outer = (u32)row / (u32)inner_rows;
            inner = (u32)row % (u32)inner_rows;
        }
        return outer * outer_stride + inner * row_stride;
    } else {
        return row * row_stride;
    }
}
