"""How many threads, columns and rows a program gets: a function of N and the element size, never of the row count.

That is what makes a row's result independent of its batch, and it lets N be a compile-time constant. Chunks instead of
one power-of-two block: N = 6144 is a chunk of 4096 and half of another, not 8192 lanes of which 2048 idle.

Measured on an H200, bf16, M = 4096, cold, us by threads per row (roofline: the same traffic, no reduction). Fused add:

    N       roofline    128      256      512     1024    two reads (1024)
    2048       18.55    18.78    18.44
    4096       34.81    35.02    35.36    34.83
    7168       58.80    60.56    59.45    58.82
    8192       66.72    69.23    67.91    67.16    66.66
    16384     130.55            135.80   132.62   132.61   132.38
    32768     258.10                     262.86   260.86   269.0

and for one row of 8192: 3.12, 2.53, 2.26, 2.17. So: as many threads as there are vectors, up to 1024, for few rows and
for many; registers as long as they hold the row. A thread then has two loads in flight, one of each input. The plain
norm with one vector per thread has one, and starves: 42.1 us at N = 8192 (1024 threads; half the roofline above is
33.4), 20.2 at 4096, while two vectors per thread reach 67.3 at 16384 (65.3). So half as many threads there.
"""

from typing import NamedTuple

REGISTER_ROWS_UP_TO = 32768
"""Longest row held in registers, in 2-byte elements (32 per thread at 1024 threads); longer ones are read twice."""


class Schedule(NamedTuple):
    """rows: rows of one program. block: columns of one chunk (a power of two). chunks: ceil(N / block).
    num_warps: of one program. long: the row is read twice instead of held in registers."""

    rows: int
    block: int
    chunks: int
    num_warps: int
    long: bool


def vector_elements(n: int, itemsize: int) -> int:
    """Elements per memory access: at most 16 bytes, and a divisor of N so that every row starts aligned."""
    return min(16 // itemsize, n & -n)


def schedule(n: int, itemsize: int, inputs: int, warp_size: int = 32) -> Schedule:
    """The schedule for rows of `n` elements of `itemsize` bytes, read from `inputs` tensors (2 with a residual), on a
    device with warps of `warp_size` threads."""
    per_thread = 16 // itemsize
    if n <= 64 * per_thread:
        block = max(per_thread, 1 << (n - 1).bit_length())
        return Schedule(max(1, 128 * per_thread // block), block, 1, 128 // warp_size, False)
    if n * itemsize > REGISTER_ROWS_UP_TO * 2:
        block = 1024 * per_thread
        return Schedule(1, block, -(-n // block), 1024 // warp_size, True)
    threads = 64
    while threads < 1024 and n * inputs >= 4 * threads * per_thread:
        threads *= 2
    block = threads * per_thread
    return Schedule(1, block, -(-n // block), threads // warp_size, False)
