// The contract between the host (rmsnorm_patch/backends/cuda) and every kernel in this folder.
//
// COMPILATION. One translation unit per (kernel, configuration), by NVRTC, for the exact architecture, `-std=c++17`,
// no include path: only the `.cuh` files of this folder can be included (by their bare name), no CUDA or C++ headers.
//
// MACROS, all passed as -D integers:
//   N                row length in elements (columns)
//   X_T, W_T, OUT_T  dtype codes of x/residual/sum, of the weight, of the normed output (DT_* below)
//   ROUND_T          dtype that x*rstd is rounded to before the weight multiply (DT_F32: not rounded)
//   HAS_WEIGHT       0: no weight multiply (args.weight is null, W_T == X_T)
//   OFFSET           0: w.  1: 1 + float(w) in fp32.  2: 1 + w rounded to W_T
//   FUSED_ADD        0: rms_norm (residual and total are null).  1: x + residual first
//   SUM_F32          0: variance and output use the sum rounded to X_T.  1: they use the fp32 sum. The sum stored in
//                    `total` is rounded to X_T in both cases
//   WIDTH            columns that enter the variance (== N: all; the mean divides by WIDTH)
//   WEIGHT_ROWS      1, or the rows of the weight [WEIGHT_ROWS, N]: row r uses weight row r % WEIGHT_ROWS. A grouped
//                    norm (NormSpec.group) is launched as N = group, WEIGHT_ROWS = groups per row, m = rows * groups; a
//                    strided x with STRIDE2, inner_rows = groups, row stride = group, outer stride = the row stride
//   VEC              elements of one logical chunk: thread t of a row owns whole chunks. The reduction tree may depend
//   on
//                    N, VEC, THREADS, CLUSTER ... but never on ALIGN, STRIDE2, m or the pointers
//   ALIGN            bytes (power of two, >= sizeof element, <= 32) by which x, residual, normed, total pointers and
//   all
//                    their row strides are aligned (in the terms of X_T/OUT_T elements: a 4-byte OUT_T with a 2-byte
//                    X_T has its VEC*4-byte chunks aligned to at least min(2 * ALIGN, 16)). A VEC chunk is accessed in
//                    pieces of at most ALIGN bytes
//   W_ALIGN          the same for the weight pointer
//   STRIDE2          0: row r of x is x + r * x_row_stride. 1: rows are addressed in two levels (below)
//   THREADS_PER_ROW  threads that share one row in one CTA; CLUSTER: CTAs that share one row (1 = no cluster)
//   ROWS_PER_CTA     rows of one CTA (of one cluster, if CLUSTER > 1)
//   ROWS_PER_THREAD  rows that one thread serves (divides ROWS_PER_CTA).
//                    blockDim.x = THREADS_PER_ROW * ROWS_PER_CTA / ROWS_PER_THREAD
//   TREE_THREADS     0: the reduction tree depends on N and VEC alone. 1: on the schedule (reduce.cuh)
//   WEIGHT_AT        when the weight is read: 0 directly below the dependency wait, ahead of x, 1 behind x, 2 after the
//                    reduction, 3 in parts from just before the reduction on, each a part ahead of its use (one row a
//                    thread)
//   LAUNCH_AT        when the next kernel may become resident: 0 at once, 1 after the dependency wait, 2 after the
//   loads of x,
//                    3 after the reduction
//   PREFETCH         1: before the wait, ask for the CTA's rows of x and residual to come to L2 (sm_90+)
//   STAGE            chunks that a thread loads before it adds them
//   MIN_CTAS         second argument for __launch_bounds__
//   any further upper-case key of a registry rule's `defines` table
//
// ENTRY. `extern "C" __global__ void <entry>(const __grid_constant__ Args args)`, its name is in the schedules.
//
// ARGUMENTS. Each kernel declares one `struct Args`, in its `.cu` or in a `.cuh` that it includes: pointers, i64, int
// and float fields. The host reads the declaration (rmsnorm_patch/backends/cuda/arguments.py) and fills it by name;
// what it read is asserted in each translation unit, field by field. So a field is added, moved or renamed here and
// where the op's host side fills it, and nowhere else. What the launcher's hot path can fill is listed in
// plain_ops.cuh.
//
// GRID. gridDim.x = CLUSTER * ceil(m / ROWS_PER_CTA), m > 0. Shared memory is static.
//
// DEPENDENT LAUNCH. On sm_90+ the launch carries programmatic stream serialization, unless the op was bound for plain
// launches. Before `griddepcontrol.wait` a kernel reads nothing from memory but `args`, not even the weight: the kernel
// in front may have written any of it, and where it has no trigger of its own, ours starts when its CTAs exit, before
// its stores must be visible. Prefetches to L2 may stand above the wait: they read nothing, and L2 is where both
// kernels meet, so that a line which is written later is written there. Every CTA executes the wait before it reads,
// writes or exits.
//
// ALIASING. In place: normed == x and total == residual (same strides). Also possible: residual == x (h + h). No
// `__restrict__` on these four, no `.nc` loads of x or residual. An element is read by the thread that writes it, and a
// row is fully read by its owner before it is written.

#pragma once

#define DT_F32 0
#define DT_BF16 1
#define DT_F16 2

typedef long long i64;
