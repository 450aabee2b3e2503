"""`kernels/cuda/schedules/<kernel>.toml` and `kernels/tuned/<gpu>.toml`, checked: a mistake names file, key and what is
allowed.

A kernel's file: name; source (file in kernels/cuda); entry; ops; order, in which kernels are tried; capability =
[min, max] (90 = sm_90; the maximum is optional); x_dtypes; arch_suffix ("a"/"f", only if the code needs it); tree: name
of the reduction tree, in which {threads_per_row}, {vec}, {cluster}, {chunks_per_thread} are replaced; reason.

`rules` is a table, a line a rule, whose columns `columns` names; "-" stands for nothing said. The first rule serves
whose n = [min, max] (or row_bytes = [min, max]), itemsize (bytes of x), m = [min, max], capability match:
vec_bytes: logical chunk; either threads_per_row, or chunks_per_thread (threads_per_row follows: ceil(chunks /
(chunks_per_thread * cluster)), to a power of two up to 32, else a multiple of 32); row_bytes_multiple_of: only rows
whose length in bytes is a multiple of this; rows_per_cta, or cta_threads (as many rows side by side as fit about that
many threads), of which a thread serves rows_per_thread; cluster; min_ctas, or registers (the bound per thread: as many
CTAs as a multiprocessor then holds); UPPER_CASE: a -D integer of kernels/cuda/abi.cuh; reason: a key of `reasons`.

For one shape, rules that differ only in m must have the same tree: a row's result never depends on how many rows came
with it. `schedules` refuses a registry that breaks this.

What is tuned for a GPU is such a table too: its columns kernel and ops say whose constants it replaces.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import KernelBuildError
from ...kernel_files import kernels_dir
from ...numerics.contract import PLAIN_OPS
from ..rule_table import UNBOUNDED, Range, Table, content_of

OPS = (
    *PLAIN_OPS,
    "rms_norm_pair",
    "rms_norm_rotated",
    "rms_norm_partials",
    "rms_norm_quantised",
    "rms_norm_add",
    "rms_norm_gated",
    "silu_and_mul_quantised",
    "silu_and_mul_quantised_parts",
)
"""rms_norm_pair: two plain norms of one spec and N, each with its own rows and weight, in one launch (q and k).
rms_norm_rotated: the same, and each row rotated by its token's angles.
rms_norm_partials: fused_add_rms_norm_ of a product that comes in parts.
rms_norm_quantised: the norm, with or without an add, that writes quantised rows.
rms_norm_add: the norm and the add behind it, with or without the norm of the sum.
rms_norm_gated: the norm of x times an activated gate, or the norm times one.
silu_and_mul_quantised: silu(gate) * up, written as quantised rows that have a scale each.
silu_and_mul_quantised_parts: the same where no scale is a whole row's; M counts the parts of all rows."""
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Rule:
    """Launch constants for a range of shapes; the fields are documented at the head of this file."""

    n: Range
    m: Range
    capability: Range
    itemsize: tuple[int, ...]
    row_bytes: Range
    row_bytes_multiple_of: int
    vec_bytes: int
    threads_per_row: int | None
    chunks_per_thread: int | None
    rows_per_cta: int | None
    cta_threads: int | None
    rows_per_thread: int
    cluster: int
    min_ctas: int | None
    registers: int | None
    defines: tuple[tuple[str, int], ...]
    reason: str


@dataclass(frozen=True)
class Kernel:
    """One source file's entry and the rules that configure it."""

    order: int
    name: str
    source: str
    entry: str
    ops: tuple[str, ...]
    capability: Range
    x_dtypes: tuple[str, ...]
    tree: str
    arch_suffix: str
    reason: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Override:
    """Constants measured on one GPU that replace a rule's."""

    kernel: str
    ops: tuple[str, ...]
    n: Range
    m: Range
    itemsize: tuple[int, ...]
    values: tuple[tuple[str, int], ...]
    reason: str


TUNABLE = (
    "vec_bytes",
    "threads_per_row",
    "chunks_per_thread",
    "rows_per_cta",
    "cta_threads",
    "rows_per_thread",
    "cluster",
    "min_ctas",
    "registers",
)


def _launch_values(table: Table, key: str, default: int | None) -> int:
    allowed = {"vec_bytes": (2, 4, 8, 16, 32), "cluster": (1, 2, 4, 8, 16), "threads_per_row": None}.get(key)
    return table.integer(key, default, allowed)


def _optional(table: Table, key: str) -> int | None:
    return _launch_values(table, key, None) if key in table.values else None


def _rule(table: Table) -> Rule:
    explicit = "threads_per_row" in table.values
    if explicit == ("chunks_per_thread" in table.values):
        raise table.error(table.where, sorted(table.values), "exactly one of threads_per_row, chunks_per_thread")
    names = [name for name in table.values if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)]
    defines = {name: table.integer(name, None, low=0) for name in names}
    rule = Rule(
        n=table.span("n", (1, UNBOUNDED)),
        m=table.span("m", (1, UNBOUNDED)),
        capability=table.span("capability", (0, UNBOUNDED), low=0),
        itemsize=table.itemsizes(),
        row_bytes=table.span("row_bytes", (1, UNBOUNDED)),
        row_bytes_multiple_of=table.integer("row_bytes_multiple_of", 1, tuple(1 << bit for bit in range(17))),
        vec_bytes=_launch_values(table, "vec_bytes", 16),
        threads_per_row=_launch_values(table, "threads_per_row", None) if explicit else None,
        chunks_per_thread=None if explicit else _launch_values(table, "chunks_per_thread", None),
        rows_per_cta=_optional(table, "rows_per_cta"),
        cta_threads=_optional(table, "cta_threads"),
        rows_per_thread=_launch_values(table, "rows_per_thread", 1),
        cluster=_launch_values(table, "cluster", 1),
        min_ctas=_optional(table, "min_ctas"),
        registers=_optional(table, "registers"),
        defines=tuple(sorted(defines.items())),
        reason=table.text("reason", ""),
    )
    conditions = "n, m, capability, itemsize, row_bytes, row_bytes_multiple_of, reason, "
    table.done(conditions + ", ".join(TUNABLE) + ", and integers in UPPER_CASE")
    return rule


def read_kernel(file: Path) -> Kernel:
    """One kernel's schedules; KernelBuildError naming file, key and what is allowed."""
    table = Table(file, "", content_of(file, "reinstall rmsnorm_patch"))
    table.integer("schema", None, (1,))
    kernel = Kernel(
        order=table.integer("order", None),
        name=table.text("name"),
        source=table.text("source"),
        entry=table.text("entry"),
        ops=table.texts("ops", OPS),
        capability=table.span("capability", None, low=0),
        x_dtypes=table.texts("x_dtypes", DTYPES, DTYPES),
        tree=table.text("tree"),
        arch_suffix=table.text("arch_suffix", "", ("", "a", "f")),
        reason=table.text("reason", ""),
        rules=tuple(_rule(rule) for rule in table.rules()),
    )
    table.done(
        "schema, order, name, source, entry, ops, capability, x_dtypes, tree, arch_suffix, reason, columns, rules, "
        "reasons"
    )
    if kernel.name != file.stem:
        raise table.error("name", kernel.name, f"the file's: {file.stem}")
    return kernel


def read_registry(folder: Path | None = None) -> tuple[Kernel, ...]:
    """Every kernel's schedules, in the order in which they are tried. Errors as `read_kernel`."""
    folder = folder or kernels_dir() / "cuda" / "schedules"
    kernels = sorted(map(read_kernel, folder.glob("*.toml")), key=lambda kernel: (kernel.order, kernel.name))
    if not kernels:
        raise KernelBuildError(str(folder), "no schedules", "a folder of <kernel>.toml", "reinstall rmsnorm_patch")
    for before, after in itertools.pairwise(kernels):
        if before.order == after.order:
            raise KernelBuildError(
                f"{folder / after.name}.toml: order", str(after.order), f"another than {before.name}'s", "renumber one"
            )
    return tuple(kernels)


def replaced(kernels: tuple[Kernel, ...], path: Path) -> tuple[Kernel, ...]:
    """`kernels` with those that a file, or every file of a folder, describes in their place."""
    others = read_registry(path) if path.is_dir() else (read_kernel(path),)
    return tuple(sorted({kernel.name: kernel for kernel in (*kernels, *others)}.values(), key=lambda each: each.order))


def gpu_slug(device_name: str) -> str:
    """File name of a GPU's tuning: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def read_tuned(device_name: str, folder: Path | None = None) -> tuple[Override, ...]:
    """Overrides for one GPU; empty where none were measured. KernelBuildError naming file, key and what is allowed."""
    file = (folder or kernels_dir() / "tuned") / f"{gpu_slug(device_name)}.toml"
    if not file.is_file():
        return ()
    table = Table(file, "", content_of(file, "correct it, or remove it to use the schedules' own rules"))
    table.integer("schema", None, (1,))
    table.text("device")
    overrides = tuple(_override(item) for item in table.rules())
    table.done("schema, device, columns, rules, reasons")
    return overrides


def _override(table: Table) -> Override:
    chosen = tuple((key, _launch_values(table, key, None)) for key in TUNABLE if key in table.values)
    if not chosen:
        raise table.error(table.where, sorted(table.values), "one or more of " + ", ".join(TUNABLE))
    override = Override(
        kernel=table.text("kernel"),
        ops=table.texts("ops", OPS, OPS),
        n=table.span("n", None),
        m=table.span("m", (1, UNBOUNDED)),
        itemsize=table.itemsizes(),
        values=chosen,
        reason=table.text("reason", ""),
    )
    table.done("kernel, ops, n, m, itemsize, reason, " + ", ".join(TUNABLE))
    return override
