"""Generate docs/seeds.md: what five documents on RMSNorm kernels show, the command that shows it here, our figures.

    python scripts/seeds.py records/nvidia-h200.json ...

Our figures come from the records: of each section from the first that has it. Those of the documents stand in
`benchlib/published.json`, and are marked as theirs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from benchlib.aims import GPU, PUBLISHED
from benchlib.explained import unexplained
from benchlib.pages import MISSING, figure, table, wrapped
from kernel_table import GPUS
from profile_counts import METRICS, speed
from results import name_of, peers

from rmsnorm_patch.backends.cuda import registry, schedules
from rmsnorm_patch.bench.rows import FUSED, OURS, PLAIN, Row, ours, select, shape
from rmsnorm_patch.kernel_files import kernels_dir

ROOT = Path(__file__).resolve().parents[1]
ROWS = 4096
PROFILED = (PLAIN, "fp32", 1, 2048)
"""The call that the first document profiles."""
FP32_BYTES = 4
HIP = "HIP gfx942"
HOPPER = 90


def profile_text(record: Row) -> str:
    """Naive kernels, a kernel a step, with the profiler's metrics."""
    rows = [row for row in record.get("profile", ()) if row.get("us")]
    theirs = PUBLISHED["naive"]
    quoted = [theirs["gpu"], theirs["kernels"], f"{theirs['ms'] * 1e3:.2f}", theirs["gb_per_s"], theirs["gflops"]]
    found = [row for row in rows if (row["op"], row["dtype"], row["m"], row["n"]) == PROFILED]
    rates = [["the document's, quoted", *quoted]]
    for row in found:
        cells = [f"{rate:.2f}" for rate in speed(row)]
        rates.append([row["provider"], record["device"]["name"], row["kernels"], *cells])
    said = (
        f"{shape({'m': PROFILED[2], 'n': PROFILED[3]})} fp32: `naive` is a CUDA kernel for each step, as the document "
        "has them, `eager` PyTorch's. Time is the sum of the kernels' durations under Nsight Compute, caches emptied "
        "before each; the document's latency is of a call.\n\n"
    )
    said += table(["", "GPU", "kernels", "us", "GB/s", "GFLOPS"], rates)
    return said + ("\n" + counts_text(rows) if rows else "\n" + MISSING)


def counts_text(rows: list[Row]) -> str:
    body = [
        [f"{row['op']} {row['dtype']} {shape(row)}", row["provider"], row["kernels"]]
        + [f"{count:,.0f}" if (count := row["counts"].get(metric)) is not None else None for metric in METRICS]
        + [figure(row.get("us")), figure(row.get("dram_percent"), ".1f")]
        for row in rows
    ]
    return (
        "Sectors are 32 bytes, instructions are per warp. What a kernel leaves in the L2 when it ends is not counted "
        "as written. DRAM %: of its peak, while a kernel runs.\n\n"
        + table(["call", "", "kernels", *METRICS.values(), "us", "DRAM %"], body)
    )


def bandwidth_text(record: Row) -> str:
    """fp16 rows against eager PyTorch."""
    rows = [row for row in select(record, PLAIN, "cold", "fp16") if row["m"] == ROWS and "eager" in row["us"]]
    quoted = PUBLISHED["triton_fp16"]
    body: list[list[object]] = []
    for row in rows:
        names = ("ours", "ours_triton", "eager")
        speed = [2 * 2 * row["m"] * row["n"] / us / 1e3 if (us := row["us"].get(name)) else None for name in names]
        ratios = [row["us"]["eager"] / us if (us := row["us"].get(name)) else None for name in names[:2]]
        theirs = [*quoted["gb_per_s"][str(row["n"])], quoted["speedup"][str(row["n"])]]
        body.append([row["n"], *(figure(s, ".0f") for s in speed), *(figure(r, ".2f") for r in ratios), *theirs])
    head = ["N", "CUDA", "Triton", "eager PyTorch", "CUDA / eager", "Triton / eager"]
    head += ["quoted Triton", "quoted PyTorch", "quoted speed-up"]
    said = f"{ROWS} rows. Bytes read once and written once, over the time; GB/s. {quoted['note']}\n\n"
    return said + table(head, body) if rows else MISSING


def beside_published(record: Row, gpu: str) -> str:
    """Fused add, time of the kernel alone, a row for each length that `gpu` has published."""
    same, name = record["device"]["name"].endswith(gpu), record["device"]["name"]
    rows = {row["n"]: row for row in select(record, FUSED, "kernel") if row["m"] == ROWS and ours(row)}
    cold = {row["n"]: row for row in select(record, FUSED, "cold") if row["m"] == ROWS}
    others = sorted({name for row in rows.values() for name in row["us"] if name not in OURS})
    body: list[list[object]] = []
    for n, theirs in PUBLISHED[gpu].items():
        row, graph = rows.get(int(n), {"us": {}}), cold.get(int(n), {"us": {}})
        alone, launched, peer = ours(row), ours(graph), graph["us"].get("flashinfer_cuda")
        flashinfer = PUBLISHED["flashinfer"][gpu][n]
        ratios = [theirs / alone if alone else None] if same else []
        cells = [figure(alone), *(figure(row["us"].get(name)) for name in others)]
        cells += [figure(peer / launched if peer and launched else None, ".3f")]
        cells += [f"{theirs:.2f}", f"{flashinfer:.2f}", f"{flashinfer / theirs:.3f}"]
        body.append([n, *cells, *(figure(ratio, ".3f") for ratio in ratios)])
    head = ["N", f"ours, {name}", *(f"{name}, the same run" for name in others), "FlashInfer / ours", f"quoted {gpu}"]
    head += [f"quoted FlashInfer, {gpu}", "quoted speed-up", *([f"quoted {gpu} / ours"] if same else [])]
    return table(head, body)


KERNEL_ALONE = (
    f"Durations of the kernel alone by Nsight Compute, microseconds, {ROWS} rows of bf16, caches emptied before each. "
    "What a kernel leaves in the L2 when it ends is written later, so these are shorter than a launch in a graph. "
    "FlashInfer / ours: its CUDA kernel and ours as launches in a graph, of one run. The quoted columns are from "
    f"{PUBLISHED['source']}. FlashInfer's column stands beside it there.\n\n"
)


def published_text(record: Row) -> str:
    """On the GPU that has a published column, ours beside it."""
    if record["device"]["name"] != GPU or not select(record, FUSED, "kernel"):
        return MISSING
    return KERNEL_ALONE + beside_published(record, "H200")


def other_gpus_text(record: Row) -> str:
    """The published columns of GPUs that we have not run on, beside ours of another."""
    if not select(record, FUSED, "kernel"):
        return MISSING
    parts = [
        "The columns of two GPUs that we have not run on. Their memory is not that of ours: only speed-ups compare."
    ]
    parts += [f"**{gpu}**\n\n{beside_published(record, gpu)}".rstrip() for gpu in ("B200", "H20")]
    return "\n\n".join(parts) + "\n"


def traffic_text(record: Row) -> str:
    """What fusing the add saves: reads and writes of a row."""
    rows = [row for row in record.get("profile", ()) if row["op"] == FUSED]
    if not rows:
        return MISSING
    body = []
    for row in rows:
        counts = row["counts"]
        elements = row["m"] * row["n"]
        read, written = (counts[f"l1tex__t_sectors_pipe_lsu_mem_global_op_{way}.sum"] * 32 for way in ("ld", "st"))
        body.append([row["provider"], row["kernels"], f"{read / elements:.2f}", f"{written / elements:.2f}"])
    return (
        "The document counts reads and writes of a row: five without fusing, three with it. Ours stores the sum too, "
        "for the next layer. Bytes that the kernels load and store for each bf16 element, "
        f"{shape(rows[0])}, by the profiler:\n\n" + table(["", "kernels", "loaded", "stored"], body)
    )


def shapes_text(record: Row) -> str:
    """Five fp32 shapes."""
    rows = select(record, PLAIN, "hot", "fp32")
    sizes = [[shape(row), f"{row['m'] * row['n']:,}", f"{row['m'] * row['n'] * FP32_BYTES:,}"] for row in rows]
    times = peers("One buffer, plain norm.", rows)
    return table(["rows x N", "elements", "bytes of x"], sizes) + "\n" + times if rows else MISSING


def targets_text(records: Iterable[Row]) -> str:
    """Op by target. Ran: the GPU tests of a record that lists its kernel. Compiled, read: `make test` reads the machine
    code."""
    passed = [record for record in records if record.get("tests") and not unexplained(record["tests"])]

    def ran(arch: int, files: set[str]) -> bool:
        return any(
            record["device"]["capability"] == [arch // 10, arch % 10] and files <= record["files"].keys()
            for record in passed
        )

    body: list[list[object]] = []
    for op in registry.OPS:
        sources = {f"kernels/cuda/{kernel.source}" for kernel in schedules.registered_kernels() if op in kernel.ops}
        cells: list[object] = [op]
        for arch in GPUS:
            served = any(schedules.schedules(op, torch.bfloat16, n, arch) for n in (128, 4096))
            cells.append("no" if not served else "ran" if ran(arch, sources) else "compiled, read")
        file = f"triton/{'rms_norm' if op == 'rms_norm_pair' else op.rstrip('_').removesuffix('_parts')}.py"
        here = "ran" if ran(HOPPER, {f"kernels/{file}"}) else "compiled"
        cells += ["compiled", here, "compiled"] if (kernels_dir() / file).exists() else ["no"] * 3
        body.append([*cells, "ran"])
    return (
        "*Ran*: GPU tests passed there, tests that were wrong themselves [apart](results.md#tests), in a record that "
        "this page names. *Compiled, read*: the tests compile it and read the machine code; no such record has it run. "
        "On the CPU the reference of each runs in every test. Triton has no kernel of its own for a pair: it launches "
        "the plain norm twice. Its plain and its fused norm are compiled for each sm of this table, and for gfx950.\n\n"
        + table(
            ["op", *(f"sm_{arch}" for arch in GPUS), "Triton sm_80", f"Triton sm_{HOPPER}", f"Triton {HIP}", "CPU"],
            body,
        )
    )


DOCUMENTS: tuple[tuple[str, str, str, tuple[Callable[[Row], str], ...]], ...] = (
    (
        "A naive CUDA kernel and its profile",
        "Three kernels, a step each, on one row: latency, GB/s, GFLOPS, and the profiler's metrics of each.",
        "python scripts/profile_counts.py",
        (profile_text,),
    ),
    (
        "A Triton kernel against eager PyTorch",
        "One kernel for fp16 rows. One command prints whether it is right, its times at eight lengths, and a plot. So "
        "does ours.",
        "rmsnorm-patch bench-kernels --suite fp16 --plot fp16.svg",
        (bandwidth_text,),
    ),
    (
        "A high-performance fused add beside FlashInfer",
        "The add and norm with 256-bit loads on Blackwell, three GPUs, up to 32768 columns. The op's published "
        "signature, `fused_add_rmsnorm(input, residual, weight, eps, enable_pdl)`, is that of "
        "`rmsnorm_patch.compat.sglang.fused_add_rmsnorm` ([how](other_frameworks.md#sglang)).",
        "python scripts/kernel_time.py",
        (published_text, other_gpus_text),
    ),
    (
        "An explanation of the fused add",
        "Formula, reduction, and why fusing saves traffic.",
        "python scripts/profile_counts.py",
        (traffic_text,),
    ),
    (
        "One norm for nine targets",
        "A kernel in a buffer API, lowered to nine kinds of hardware, and five fp32 shapes to compare it at. Of the "
        "nine ours has one, CUDA ([op by op](#which-op-runs-where)).",
        "rmsnorm-patch bench-kernels --suite fp32",
        (shapes_text,),
    ),
)


def page(records: dict[str, Row]) -> str:
    """records: by their names in `records/`."""
    parts = [
        "# Published figures beside ours\n\nFive documents on RMSNorm kernels. Of each stand here what it shows, the "
        "command that shows it here, and our figures. Figures marked as quoted are the documents' own. Generated by "
        "`scripts/seeds.py`.\n"
    ]
    for title, shows, command, texts in DOCUMENTS:
        parts.append(f"## {title}\n\n{shows}\n\n```\n{command}\n```\n")
        parts += [_from_first(records, text) for text in texts]
    ran = ", ".join(f"`records/{name}`" for name in records)
    parts.append(f"## Which op runs where\n\nRuns are those of {ran}.\n\n{targets_text(records.values())}")
    return wrapped("\n".join(parts))


def _from_first(records: dict[str, Row], text: Callable[[Row], str]) -> str:
    """What the first record that has it says, with its name."""
    for name, record in records.items():
        if MISSING not in (said := text(record)):
            return f"From `records/{name}`, code digest `{record['digest'][:16]}`.\n\n{said}"
    return MISSING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "seeds.md")
    args = parser.parse_args()
    args.out.write_text(page({name_of(path): json.loads(path.read_text()) for path in args.records}))


if __name__ == "__main__":
    main()
