"""How many threads, columns and rows a program gets: a function of N and the element size, never of the row count.

That is what makes a row's result independent of its batch, and it lets N be a compile-time constant. Chunks instead of
one power-of-two block: N = 5120 is five chunks of 1024, not 8192 lanes of which 3072 idle.
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


def schedule(n: int, itemsize: int, warp_size: int = 32) -> Schedule:
    """The schedule for rows of `n` elements of `itemsize` bytes on a device with warps of `warp_size` threads."""
    per_thread = 16 // itemsize
    if n <= 64 * per_thread:
        block = max(per_thread, 1 << (n - 1).bit_length())
        return Schedule(max(1, 128 * per_thread // block), block, 1, 128 // warp_size, False)
    if n * itemsize > REGISTER_ROWS_UP_TO * 2:
        block = 1024 * per_thread
        return Schedule(1, block, -(-n // block), 1024 // warp_size, True)
    threads = 128
    while threads < 1024 and n > threads * per_thread * 8:
        threads *= 2
    block = threads * per_thread
    return Schedule(1, block, -(-n // block), threads // warp_size, False)
