// Sums of squares over a row, in an order that is fixed by N and VEC ("lanes") or by the schedule ("threads").
//
// "lanes" (TREE_THREADS == 0): chunks are taken 32 at a time; each group of 32 is summed by a butterfly, the group sums
// by a few interleaved running sums and a butterfly over those. Which thread held a chunk does not enter, so schedules
// for few and for many rows that differ in THREADS_PER_ROW give the same bits. "threads" (TREE_THREADS == 1): each
// thread first adds up its own chunks. Cheaper for long rows; one schedule per N.

#pragma once

#include "memory.cuh"

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int TPR = THREADS_PER_ROW;
constexpr int LANES = TPR < 32 ? TPR : 32;  // lanes of one warp that share a row
constexpr int WARPS = ceil_div(TPR, 32);    // warps that share a row
constexpr int SLOTS = ROWS_PER_CTA / ROWS_PER_THREAD;
constexpr int CHUNKS = ceil_div(N, VEC);
constexpr int CHUNKS_PER_THREAD = ceil_div(CHUNKS, TPR* CLUSTER);
constexpr int SUMS_PER_THREAD = TREE_THREADS ? 1 : CHUNKS_PER_THREAD;
// Sums that meet at the end: one per 32 chunks (lanes tree) or one per warp (threads tree).
constexpr int SUMS = TREE_THREADS ? WARPS * CLUSTER : ceil_div(CHUNKS, 32);
// Interleaved running sums over them. 128 sums in eight cost more registers than a CTA of 512 threads and 8 chunks has.
constexpr int RUNNING = SUMS <= 32 ? 4 : TREE_THREADS ? 32 : SUMS <= 64 ? 8 : 4;

static_assert(TPR % 32 == 0 || (TPR < 32 && (TPR & (TPR - 1)) == 0),
              "a row takes a power of two of lanes or whole warps");
static_assert(TREE_THREADS || TPR >= 32 || CHUNKS <= TPR,
              "the lanes tree takes 32 chunks at a time: rows of more need a warp");
static_assert(ROWS_PER_CTA % ROWS_PER_THREAD == 0, "each thread serves the same number of rows");
static_assert(CLUSTER == 1 || TPR > 32, "a cluster shares rows that need several warps");
static_assert(SLOTS == 1 || TPR <= 32 || SLOTS < 16, "a row group of several warps needs one of 15 named barriers");

template <int LANES_>
__device__ __forceinline__ float butterfly(float sum) {
#pragma unroll
    for (int mask = LANES_ / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    return sum;
}

__host__ __device__ constexpr int power_of_two_at_least(int n) {
    return n <= 1 ? 1 : 2 * power_of_two_at_least((n + 1) / 2);
}

// COUNT butterflies at once. A lane ends with the sum of index lane / (32 / padded COUNT), each added in the order of
// `butterfly`, with COUNT + log2(32 / COUNT) shuffles in place of 5 * COUNT.
template <int COUNT>
__device__ __forceinline__ float butterflies(const float (&sums)[COUNT], int lane) {
    constexpr int PADDED = power_of_two_at_least(COUNT);
    float s[PADDED];
#pragma unroll
    for (int i = 0; i < PADDED; ++i) s[i] = i < COUNT ? sums[i] : 0.0f;
    int mask = 16;
#pragma unroll
    for (int half = PADDED / 2; half > 0; half /= 2, mask /= 2) {
        bool upper = lane & mask;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            float mine = upper ? s[i + half] : s[i];
            float other = upper ? s[i] : s[i + half];
            s[i] = mine + __shfl_xor_sync(0xffffffffu, other, mask);
        }
    }
#pragma unroll
    for (; mask > 0; mask /= 2) s[0] += __shfl_xor_sync(0xffffffffu, s[0], mask);
    return s[0];
}

__device__ __forceinline__ void row_group_barrier(int slot) {
    if constexpr (SLOTS == 1) {
        __syncthreads();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(slot + 1), "n"(TPR) : "memory");
    }
}

// Adds `SUMS` values in four interleaved running sums; `get(i)` gives four neighbours.
template <int COUNT, typename Get4>
__device__ __forceinline__ float add_up(Get4 get4) {
    float running[4];
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        float4 next = get4(i);
        float values[4] = {next.x, next.y, next.z, next.w};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (i + k < COUNT) running[k] = i == 0 ? values[k] : running[k] + values[k];
    }
    if constexpr (COUNT == 1) return running[0];
    if constexpr (COUNT == 2) return running[0] + running[1];
    if constexpr (COUNT == 3) return (running[0] + running[1]) + running[2];
    return (running[0] + running[1]) + (running[2] + running[3]);
}

// COUNT sums of shared memory, the same in all lanes. A lane adds up every RUNNING-th: one four-byte read for each in
// place of every lane reading all of them, which keeps the shared memory of a CTA of many warps busy for longer than
// the reduction takes.
template <int COUNT>
__device__ __forceinline__ float add_up_in_warp(const float* sums, int lane) {
    const int k = lane % RUNNING;
    float sum = COUNT >= RUNNING || k < COUNT ? sums[k] : 0.0f;
#pragma unroll
    for (int i = RUNNING; i < COUNT; i += RUNNING)
        if (i + RUNNING <= COUNT || i + k < COUNT) sum += sums[i + k];
#pragma unroll
    for (int mask = 1; mask < RUNNING; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    return sum;
}

#if CLUSTER > 1
// CTAs of a cluster write their sums into one another's shared memory; a barrier in each counts the bytes that arrived.
// That takes one trip through the cluster where stores and a cluster barrier take three.
__shared__ u64 sums_arrived;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Every thread calls it first.
__device__ __forceinline__ void open_cluster() {
    if (threadIdx.x == 0) {
        const u32 barrier = shared_address(&sums_arrived);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // the fence has published all there is
}

// No CTA writes into one that has not opened.
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Sums may arrive before they are expected: the barrier waits for that as well.
__device__ __forceinline__ void wait_for_open_cluster() {
    wait_for_cluster();
    if (threadIdx.x == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&sums_arrived)),
                     "n"(ROWS_PER_CTA * SUMS * 4)
                     : "memory");
}

// Writes `value` to the place of `here` (a shared variable) in the CTA of that rank, whose barrier `arrived` counts it.
__device__ __forceinline__ void send_to_cta(const void* here, const u64* arrived, u32 rank, u32 value) {
    u32 there, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(arrived)), "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there), "r"(value),
                 "r"(barrier)
                 : "memory");
}

// A CTA may exit after this: all that was sent to it and that `arrived` counts is there.
__device__ __forceinline__ void wait_for_arrival(const u64* arrived) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(arrived))
        : "memory");
}
#endif

// In: each thread's sums of squares, [row][chunk of the thread] (lanes tree) or [row][0] (threads tree).
// Out: the whole row's sum, the same in all threads of the row.
// In a cluster the caller opened it.
// AGAIN: for a second reduction of the same kernel, which has shared memory of its own, and in a cluster the barrier
// `sums_are_there`, on which the caller expects the sums.
template <int ROWS, bool AGAIN = false>
__device__ __forceinline__ void sum_rows(const float (&partial)[ROWS * SUMS_PER_THREAD], float (&sums)[ROWS], int slot,
                                         int thread, const u64* sums_are_there = nullptr) {
    const int lane = threadIdx.x % 32;
    if constexpr (TPR <= 32) {
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
            float group[(SUMS_PER_THREAD + 3) / 4 * 4];
#pragma unroll
            for (int j = 0; j < SUMS_PER_THREAD; ++j) group[j] = butterfly<LANES>(partial[u * SUMS_PER_THREAD + j]);
            sums[u] = add_up<SUMS_PER_THREAD>(
                [&](int i) { return make_float4(group[i], group[i + 1], group[i + 2], group[i + 3]); });
        }
    } else {
        constexpr int COUNT = ROWS * SUMS_PER_THREAD;
        constexpr int PADDED = power_of_two_at_least(COUNT);
        static_assert(PADDED <= 32, "one lane for each sum of a thread");
        __shared__ float4 shared_sums[SLOTS][ROWS][ceil_div(SUMS, 4)];
        float sum = butterflies<COUNT>(partial, lane);
        const int index = lane / (32 / PADDED);
        const int row = index / SUMS_PER_THREAD;
        int group = index % SUMS_PER_THREAD * WARPS + thread / 32;
#if CLUSTER > 1
        group += cluster_rank() * (SUMS_PER_THREAD * WARPS);
#endif
        const bool has_sum = index < COUNT && group < SUMS;
        float* here = (float*)shared_sums[slot][has_sum ? row : 0] + group;
#if CLUSTER > 1
        if constexpr (!AGAIN) wait_for_open_cluster();
        const u64* arrived = AGAIN ? sums_are_there : &sums_arrived;
        if (has_sum) {
#pragma unroll
            for (int rank = 0; rank < CLUSTER; rank += 32 / PADDED) {
                const int to = rank + lane % (32 / PADDED);
                if (CLUSTER % (32 / PADDED) == 0 || to < CLUSTER) send_to_cta(here, arrived, to, __float_as_uint(sum));
            }
        }
        wait_for_arrival(arrived);
#else
        if (has_sum && lane % (32 / PADDED) == 0) *here = sum;
        row_group_barrier(slot);
#endif
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
            if constexpr (SUMS > 8) {
                sums[u] = add_up_in_warp<SUMS>((const float*)shared_sums[slot][u], lane);
            } else {
                const float4* row_sums = shared_sums[slot][u];
                sums[u] = add_up<SUMS>([&](int i) { return row_sums[i / 4]; });
            }
        }
    }
}
