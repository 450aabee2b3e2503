"""How many threads, columns and rows a program gets: a function of N and the element size, never of the row count.

That is what makes a row's result independent of its batch, and it lets N be a compile-time constant. Chunks instead of
one power-of-two block: N = 6144 is three chunks of 2048, not 8192 lanes of which 2048 idle.

Measured on an H200, bf16, M = 4096, cold, us. `before`: one or two vectors a thread, up to 1024 threads, launched after
the kernel in front of it. CUDA: our kernel in the same run. chain: 1, 64 and 256 rows, each launch reading what the
last one wrote.

    plain        N  CUDA  before   now  threads          fused        N  CUDA  before   now  threads
              1024   5.04   5.61   5.17  4 x 64                    1024   9.42  10.00   9.59  128
              2048   9.07  10.21   9.29  128                       2048  17.37  18.29  17.73  256
              4096  17.05  18.51  17.50  256                       4096  34.19  34.98  34.20  512
              8192  33.71  35.06  33.67  512                       5120  41.99  43.14  42.47  256
             10240  42.07  43.23  42.44  512                       8192  66.46  67.26  65.92  1024
             16384  66.65  67.46  66.98  1024                     16384 130.12 133.72 130.32  512
             20480  82.39 102.34  82.01  1024                     24576 194.66 198.19 195.93  512
             32768 132.17 135.66 129.92  512                      32768 257.71 260.16 257.49  1024
             65536  38.60  43.68  37.98  1024  (M = 512)          65536  69.05  82.18  70.74  1024  (M = 512)
            131072  74.69  97.06  90.92  1024  (M = 512)         131072 133.90 172.49 151.25  1024  (M = 512)

    chain        N  CUDA              before            now
    fused     2048  0.92 1.06 1.49    1.39 1.52 1.89    0.97 1.11 1.48
              4096  1.14 1.38 2.03    1.58 1.74 2.38    1.13 1.28 1.90
              8192  1.16 2.03 3.39    2.00 2.30 3.45    1.48 1.78 3.24
             16384  1.33 2.46 5.95    2.84 3.32 6.25    2.41 2.74 5.98
    plain     2048  0.87 1.01 1.37    1.48 1.57 1.80    0.89 1.03 1.40
              8192  1.11 1.54 2.70    1.86 2.05 2.85    1.42 1.63 2.61 to 3.25 (two runs)
             16384  1.24 2.17 3.88    2.22 2.66 4.11    1.98 2.29 4.19

What bought it: rows kept as 16-bit values (`widened_again` in row_math.py), so that 4 to 8 vectors a thread leave room
for two or three programs on a multiprocessor (20480: 102 -> 83); the dependent launch (up to 1 us); the prefetch (1% to
2% from N = 7168 on). The threads are those whose chunks fit the length: 5120 in 512 threads is 24.0 (plain), in 256 it
is 21.4.

When the next kernel may start: after the loads, but after the reduction for the light programs of the fused kernel. The
next one's programs, waiting, crowd on some multiprocessors there (256 x 4096: 2.6 after the loads, 1.9 after the
reduction). A late start makes what stands above the wait costly, so those have no prefetch (one row of 4096 with both:
1.30, else 1.13).

The weight is read behind the wait. Asked for above it, by the first program alone, it costs nothing against a read
there (H100, chain, fused 32 x 2048: 1.06 us, read above 1.07, without the prefetch 1.12; plain 32 x 4096: 1.23, 1.22,
1.27). Longer fused rows lose by the prefetch (1 x 16384: 2.46, without 2.37), so they have none.

Lost: evict-first loads (2% to 5%), a register bound by force (spills, or nothing), a prefetch for each line of 128
bytes (20% at 3072), the whole weight ahead of long rows (registers: 109 at 20480), programs of several rows at 2048 (a
row alone 1.02 to 1.2), 1024 threads for the fused 6144 (52.1, with 512 50.3), 512 threads for the plain 16384 (66.3,
but 4.3 to 4.9 for 256 rows).
"""

from typing import NamedTuple

KEPT_VECTORS = 8
"""16-byte chunks of a row that each of 1024 threads keeps in its 64 registers: 65536 2-byte elements. Of longer rows
the rest is read twice."""

UNROLL = 4
"""Chunks of the part that is read twice go in steps of this (row_math.py)."""


class Schedule(NamedTuple):
    """rows: rows of one program. block: columns of one chunk (a power of two). chunks: ceil(N / block). num_warps: of
    one program. streamed: chunks read twice instead of held in registers, a multiple of UNROLL. batch: chunks of both
    inputs loaded before the first sum is stored. ahead: chunks of the weight loaded ahead of their use. prefetch: the
    row is asked for before the kernel may read it. prefetch_weight: the same for the weight. launch_late: the next
    kernel may start after the reduction, not after the loads."""

    rows: int
    block: int
    chunks: int
    num_warps: int
    streamed: int
    batch: int
    ahead: int
    prefetch: bool
    prefetch_weight: bool
    launch_late: bool


def vector_elements(n: int, itemsize: int) -> int:
    """Elements per memory access: at most 16 bytes, and a divisor of N so that every row starts aligned."""
    return min(16 // itemsize, n & -n)


PLAIN_THREADS = ((128, 256), (384, 128), (768, 256), (1920, 512), (3072, 1024), (4096, 512))
FUSED_THREADS = ((128, 128), (256, 256), (512, 512), (768, 256), (1024, 1024), (3072, 512))
"""(vectors of a row at most, threads of a program); 1024 threads above."""


def schedule(n: int, itemsize: int, inputs: int, warp_size: int = 32, wide_sum: bool = False) -> Schedule:
    """The schedule for rows of `n` elements of `itemsize` bytes, read from `inputs` tensors (2 with a residual), on a
    device with warps of `warp_size` threads; `wide_sum`: the fp32 sum of 2-byte inputs is kept, in twice the registers.
    """
    per_thread = 16 // itemsize
    vectors = -(-n // per_thread)
    plain = inputs == 1
    if vectors <= 64:
        block = max(per_thread, 1 << (n - 1).bit_length())
        return Schedule(max(1, 128 * per_thread // block), block, 1, 128 // warp_size, 0, 1, 1, False, plain, False)
    threads = next((threads for most, threads in (PLAIN_THREADS if plain else FUSED_THREADS) if vectors <= most), 1024)
    rows = 4 if plain and vectors <= 128 else 1
    block = threads * per_thread // rows
    chunks = -(-n // block)
    kept = KEPT_VECTORS // 2 if wide_sum else KEPT_VECTORS
    short = vectors <= 768
    return Schedule(
        rows,
        block,
        chunks,
        threads // warp_size,
        streamed=-(-(chunks - kept) // UNROLL) * UNROLL if threads == 1024 and chunks > kept else 0,
        batch=2 if vectors > 3072 else chunks,
        ahead=chunks if plain and short else 1,
        prefetch=not short and vectors <= 1024 * KEPT_VECTORS,
        prefetch_weight=plain or vectors <= 256,
        launch_late=not plain and short,
    )
