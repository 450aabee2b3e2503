"""How many threads, columns and rows a program gets: a function of N and the element size, never of the row count.

That is what makes a row's result independent of its batch, and it lets N be a compile-time constant. Chunks instead of
one power-of-two block: N = 6144 is three chunks of 2048, not 8192 lanes of which 2048 idle.

What was measured, and what lost, is in docs/decisions/triton.md.

Rows are kept as 16-bit values (`widened_again` in row_math.py), so that 4 to 8 vectors a thread leave room for two or
three programs on a multiprocessor. The threads are those whose chunks fit the length.

The next kernel may start after the loads, but after the reduction for the light programs of the fused kernel: the next
one's programs, waiting, crowd on some multiprocessors there. A late start makes what stands above the wait costly, so
those have no prefetch.

The weight is read behind the wait. Asked for above it, by the first program alone, it costs nothing against a read
there. Longer fused rows lose by the prefetch, so they have none.
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
