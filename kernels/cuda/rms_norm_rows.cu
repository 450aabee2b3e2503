// rms_norm and fused_add_rms_norm, rows in registers: the kernel of every regime whose rows fit (decode, prefill, short
// rows, and with CLUSTER > 1 long rows). The regimes differ in their schedule only; schedules/ has them.

#include "plain_ops.cuh"

extern "C" __global__ void __launch_bounds__(THREADS_PER_ROW* SLOTS, RESIDENT_CTAS)
    rms_norm_rows(const __grid_constant__ Args args) {
    norm_rows(rows_of(args), (i64)(blockIdx.x / CLUSTER) * ROWS_PER_CTA, args.eps);
}
