"""How many threads, columns and rows a program gets, by `kernels/triton/schedules`.

A function of N and the element size, never of the row count: that makes a row's result independent of its batch, and
lets N be a compile-time constant. Chunks instead of one power-of-two block: N = 6144 is three chunks of 2048, not 8192
lanes of which 2048 idle.

Rows are kept as 16-bit values (`widened_again` in row_math.py), so that 4 to 8 vectors a thread leave room for two or
three programs on a multiprocessor.

The next kernel may start after the loads, but after the reduction for the light programs of the fused kernel: the next
one's programs, waiting, crowd on some multiprocessors there. A late start makes what stands above the wait costly, so
those have no prefetch.

The weight is read behind the wait. Asked for above it, by the first program alone, it costs nothing against a read
there. Longer fused rows lose by the prefetch, so they have none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from ...errors import KernelBuildError
from ...kernel_files import kernels_dir
from ..rule_table import UNBOUNDED, Range, Table, content_of

ACCESS_BYTES = 16
"""Of one load: a vector."""
MOST_THREADS = 1024
KEPT_VECTORS = 8
"""Vectors of a row that each of 1024 threads keeps in its 64 registers: 65536 2-byte elements. Of longer rows the rest
is read twice."""
UNROLL = 4
"""Chunks of the part that is read twice go in steps of this (row_math.py)."""


class Rule(NamedTuple):
    """A line of a file. None: as many rows as the threads have vectors for; all chunks in one batch, or ahead."""

    row_bytes: Range
    threads: int
    rows: int | None
    batch: int | None
    ahead: int | None
    prefetch: bool
    prefetch_weight: bool
    launch_late: bool


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
    return min(ACCESS_BYTES // itemsize, n & -n)


def schedule(kernel: str, n: int, itemsize: int, warp_size: int = 32, wide_sum: bool = False) -> Schedule:
    """The schedule of `kernel` for rows of `n` elements of `itemsize` bytes, on a device with warps of `warp_size`
    threads; `wide_sum`: the fp32 sum of 2-byte inputs is kept, in twice the registers."""
    rule = next(rule for rule in rules(kernel) if n * itemsize <= rule.row_bytes[1])
    per_thread = ACCESS_BYTES // itemsize
    held = rule.threads * per_thread
    if rule.rows is None:
        block = max(per_thread, 1 << (n - 1).bit_length())
        rows = max(1, held // block)
    else:
        rows, block = rule.rows, held // rule.rows
    chunks = -(-n // block)
    kept = KEPT_VECTORS // 2 if wide_sum else KEPT_VECTORS
    streams = rule.threads == MOST_THREADS and chunks > kept
    return Schedule(
        rows,
        block,
        chunks,
        rule.threads // warp_size,
        streamed=-(-(chunks - kept) // UNROLL) * UNROLL if streams else 0,
        batch=chunks if rule.batch is None else rule.batch,
        ahead=chunks if rule.ahead is None else rule.ahead,
        prefetch=rule.prefetch,
        prefetch_weight=rule.prefetch_weight,
        launch_late=rule.launch_late,
    )


@cache
def rules(kernel: str) -> tuple[Rule, ...]:
    """The rules of one kernel's file."""
    return read_rules(kernels_dir() / "triton" / "schedules" / f"{kernel}.toml")


def read_rules(file: Path) -> tuple[Rule, ...]:
    """A file's rules, ascending and without a gap; KernelBuildError naming file, key and what is allowed."""
    table = Table(file, "", content_of(file, "reinstall rmsnorm_patch"))
    table.integer("schema", None, (1,))
    table.text("name", allowed=(file.stem,))
    table.text("reason")
    found = tuple(_rule(each) for each in table.rules())
    table.done("schema, name, reason, columns, rules, reasons")
    starts = [1, *(rule.row_bytes[1] + 1 for rule in found)]
    if [rule.row_bytes[0] for rule in found] != starts[:-1] or starts[-1] != UNBOUNDED + 1:
        got = ", ".join(str(list(rule.row_bytes)) for rule in found)
        raise KernelBuildError(f"{file}: row_bytes", got, "ranges from 1 on without gap or end", "correct the ranges")
    return found


def _rule(table: Table) -> Rule:
    def optional(key: str) -> int | None:
        return table.integer(key, None) if key in table.values else None

    def flag(key: str) -> bool:
        return bool(table.integer(key, None, (0, 1), low=0))

    rule = Rule(
        row_bytes=table.span("row_bytes", None),
        threads=table.integer("threads", None, (128, 256, 512, 1024)),
        rows=optional("rows"),
        batch=optional("batch"),
        ahead=optional("ahead"),
        prefetch=flag("PREFETCH"),
        prefetch_weight=flag("PREFETCH_WEIGHT"),
        launch_late=flag("LAUNCH_LATE"),
    )
    table.done("row_bytes, threads, rows, batch, ahead, PREFETCH, PREFETCH_WEIGHT, LAUNCH_LATE")
    return rule
