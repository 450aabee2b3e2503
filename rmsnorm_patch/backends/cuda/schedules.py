"""Which schedules serve rows of a length, by `kernels/cuda/schedules` and what is tuned for a device.

Pure: touches no device. A schedule is chosen by (op, dtype, N, capability) and, among kernels with one and the same
reduction tree, by M: a row's result never depends on how many rows came with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...errors import KernelBuildError
from .registry import UNBOUNDED, Kernel, Override, Range, Rule, read_registry, read_tuned

Op = str
"""One of `registry.OPS`."""

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Config:
    """One schedule: the constants of `kernels/cuda/abi.cuh` that do not follow from the call's types.

    vec: elements of a logical chunk. m: the row counts it serves, inclusive. tree: identity of the reduction tree.
    """

    kernel: str
    source: str
    entry: str
    tree: str
    vec: int
    threads_per_row: int
    rows_per_cta: int
    rows_per_thread: int
    cluster: int
    min_ctas: int
    arch_suffix: str
    defines: tuple[tuple[str, int], ...]
    m: Range
    reason: str

    @property
    def threads(self) -> int:
        return self.threads_per_row * self.rows_per_cta // self.rows_per_thread


def sm(capability: int | tuple[int, int]) -> int:
    """90 for 90 or (9, 0)."""
    return capability if isinstance(capability, int) else capability[0] * 10 + capability[1]


@lru_cache(maxsize=1)
def registered_kernels() -> tuple[Kernel, ...]:
    return read_registry()


@lru_cache(maxsize=16)
def _overrides(device_name: str | None) -> tuple[Override, ...]:
    return read_tuned(device_name) if device_name else ()


def threads_for(n: int, vec: int, chunks_per_thread: int, cluster: int, whole_warps: bool = False) -> int:
    """Threads of one CTA for one row: a power of two within a warp, whole warps above.

    whole_warps: the reduction tree takes 32 chunks at a time, so a warp may not be shared by rows of more chunks than
    a row has lanes.
    """
    chunks = -(-n // vec)
    threads = -(-chunks // (chunks_per_thread * cluster))
    if whole_warps:
        threads = max(threads, min(chunks, 32))
    return 1 << (threads - 1).bit_length() if threads <= 32 else -(-threads // 32) * 32


def rows_for(threads_per_row: int, cta_threads: int) -> int:
    """Rows side by side in a CTA of about `cta_threads` threads: rows of several warps each need a named barrier."""
    rows = max(1, cta_threads // threads_per_row)
    return min(rows, 15) if threads_per_row > 32 else rows


def resident_ctas(threads: int, registers: int) -> int:
    """CTAs that one multiprocessor of 65536 registers and 2048 threads holds at this register bound.

    Registers are handed out to four warps at a time.
    """
    allocated = -(-threads // 128) * 128
    return max(1, min(65536 // (allocated * registers), 2048 // threads))


def within(value: int, span: Range) -> bool:
    return span[0] <= value <= span[1]


def configure(
    kernel: Kernel, rule: Rule, m: Range, tuned: tuple[Override, ...], op: Op, n: int, itemsize: int
) -> Config:
    values, reason = _chosen(kernel, rule, m, tuned, op, n, itemsize)
    vec = max(1, int(values["vec_bytes"] or 0) // itemsize)
    cluster = int(values["cluster"] or 1)
    lanes_tree = ("TREE_THREADS", 0) in rule.defines
    threads_per_row = values["threads_per_row"] or threads_for(
        n, vec, int(values["chunks_per_thread"] or 1), cluster, whole_warps=lanes_tree
    )
    chunks_per_thread = -(-n // (vec * threads_per_row * cluster))
    rows_per_thread = values["rows_per_thread"] or 1
    rows_per_cta = values["rows_per_cta"] or rows_for(threads_per_row, values["cta_threads"] or 1) * rows_per_thread
    threads = threads_per_row * rows_per_cta // rows_per_thread
    min_ctas = values["min_ctas"] or (resident_ctas(threads, values["registers"]) if values["registers"] else 1)
    tree = kernel.tree.format(
        vec=vec, threads_per_row=threads_per_row, cluster=cluster, chunks_per_thread=chunks_per_thread
    )
    return Config(
        kernel=kernel.name,
        source=kernel.source,
        entry=kernel.entry,
        tree=tree,
        vec=vec,
        threads_per_row=threads_per_row,
        rows_per_cta=rows_per_cta,
        rows_per_thread=rows_per_thread,
        cluster=cluster,
        min_ctas=min_ctas,
        arch_suffix=kernel.arch_suffix,
        defines=rule.defines,
        m=m,
        reason=reason,
    )


def _chosen(
    kernel: Kernel, rule: Rule, m: Range, tuned: tuple[Override, ...], op: Op, n: int, itemsize: int
) -> tuple[dict[str, int | None], str]:
    """The constants of the rule, with the first override that fits in their place, and the reason for them."""
    values: dict[str, int | None] = {
        "vec_bytes": rule.vec_bytes,
        "threads_per_row": rule.threads_per_row,
        "chunks_per_thread": rule.chunks_per_thread,
        "rows_per_cta": rule.rows_per_cta,
        "cta_threads": rule.cta_threads,
        "rows_per_thread": rule.rows_per_thread,
        "cluster": rule.cluster,
        "min_ctas": rule.min_ctas,
        "registers": rule.registers,
    }
    reason = rule.reason or kernel.reason
    for override in tuned:
        covers = override.m[0] <= m[0] and m[1] <= override.m[1]
        if override.kernel == kernel.name and op in override.ops and covers and within(n, override.n):
            if itemsize not in override.itemsize:
                continue
            chosen = dict(override.values)
            if "threads_per_row" in chosen:
                values["chunks_per_thread"] = None
            elif "chunks_per_thread" in chosen:
                values["threads_per_row"] = None
            if "cta_threads" in chosen:
                values["rows_per_cta"] = None
            if "registers" in chosen:
                values["min_ctas"] = None
            values.update(chosen)
            reason = override.reason or reason
            break
    return values, reason


def schedules(
    op: Op,
    x_dtype: torch.dtype,
    n: int,
    capability: int | tuple[int, int],
    device_name: str | None = None,
    kernels: tuple[Kernel, ...] | None = None,
    overrides: tuple[Override, ...] | None = None,
) -> tuple[Config, ...]:
    """Every schedule that can serve rows of length `n`, for ascending, gapless ranges of M; empty if M >= 1 has a gap.

    Raises KernelBuildError where two of them would reduce a row in different orders.
    """
    itemsize, arch = x_dtype.itemsize, sm(capability)
    tuned = _overrides(device_name) if overrides is None else overrides
    found: list[Config] = []
    next_m = 1
    for kernel in registered_kernels() if kernels is None else kernels:
        if op not in kernel.ops or not within(arch, kernel.capability) or DTYPE_NAMES[x_dtype] not in kernel.x_dtypes:
            continue
        for rule in kernel.rules:
            fits = itemsize in rule.itemsize and within(n, rule.n) and within(arch, rule.capability)
            row_bytes = n * itemsize
            fits = fits and within(row_bytes, rule.row_bytes) and row_bytes % rule.row_bytes_multiple_of == 0
            if fits and rule.m[0] <= next_m <= rule.m[1]:
                found.append(configure(kernel, rule, (next_m, rule.m[1]), tuned, op, n, itemsize))
                next_m = rule.m[1] + 1
        if next_m > UNBOUNDED:
            break
    if next_m <= UNBOUNDED:
        return ()
    trees = {config.tree for config in found}
    if len(trees) > 1:
        raise KernelBuildError(
            site=f"registry: {op}, N={n}, {DTYPE_NAMES[x_dtype]}, sm_{arch}",
            got="reduction trees " + ", ".join(sorted(trees)) + " for different M",
            supported="one reduction tree for all M",
            next_step="give the rules the same tree, or make one of them serve all M",
        )
    return tuple(found)


def no_kernel(op: Op, x_dtype: torch.dtype, n: int, arch: int) -> str:
    """Why no rule of `op` serves rows of `n` columns on sm_`arch`, in words."""
    able = [k for k in registered_kernels() if op in k.ops and DTYPE_NAMES[x_dtype] in k.x_dtypes]
    lowest = min((kernel.capability[0] for kernel in able), default=0)
    if able and arch < lowest:
        return f"needs sm_{lowest} or newer, device has sm_{arch}"
    rules = [rule for kernel in able for rule in kernel.rules if within(arch, kernel.capability)]
    rules = [rule for rule in rules if within(arch, rule.capability) and x_dtype.itemsize in rule.itemsize]
    longest = max((min(rule.n[1], rule.row_bytes[1] // x_dtype.itemsize) for rule in rules), default=0)
    if n > longest:
        return f"needs N <= {longest}, x has N={n} (sm_{arch})"
    return f"no CUDA kernel for {op}, {DTYPE_NAMES[x_dtype]}, N={n} on sm_{arch}"
