"""Memory sectors and instructions of an RMSNorm, by Nsight Compute: norms of one kernel a step against our kernel.

    python scripts/profile_counts.py --json out.json

`eager` is PyTorch's kernel for each step, `naive` one of CUDA C++ for each (`benchlib/naive.cu`, fp32 alone). A row:
{"op", "dtype", "m", "n", "provider", "kernels", "counts": {metric: sum over the kernels of one call}, "us": their
durations, "dram_percent": of the memory's peak, weighted by duration}. ncu empties the caches before every kernel, so
each of several reads its operands from memory, as it also would where they exceed the L2.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from benchlib import ncu

METRICS = {
    "dram__sectors_read.sum": "DRAM read",
    "dram__sectors_write.sum": "DRAM written",
    "lts__t_sectors.sum": "L2",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "L1 global loads",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum": "L1 global stores",
    "smsp__inst_executed.sum": "instructions",
    "smsp__sass_inst_executed_op_shared_ld.sum": "shared loads",
    "smsp__sass_inst_executed_op_shared_st.sum": "shared stores",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum": "bank conflicts",
}
"""Nsight Compute's name of each metric, and what the results page calls it."""
DURATION = "gpu__time_duration.sum"
"""Nanoseconds."""
THROUGHPUT = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
BYTES = {"fp32": 4, "bf16": 2}
FLOPS = 5
"""Of an element: its square, that added, and the two products and the quotient behind."""
SHAPES = (
    ("rms_norm", "fp32", 1, 2048),
    ("rms_norm", "bf16", 4096, 4096),
    ("fused_add_rms_norm", "bf16", 4096, 4096),
)
NAIVE = "naive=benchlib.naive:rms_norm"


def providers_of(op: str, dtype: str) -> tuple[str, ...]:
    """Whom `drive` calls; the naive kernels know the plain norm of fp32 alone."""
    return ("naive", "eager", "ours") if (op, dtype) == ("rms_norm", "fp32") else ("eager", "ours")


def calls() -> list[dict]:
    """What `drive` launches, in this order."""
    return [
        {"op": op, "dtype": dtype, "m": m, "n": n, "provider": provider}
        for op, dtype, m, n in SHAPES
        for provider in providers_of(op, dtype)
    ]


def drive() -> None:
    """The program under the profiler; everything is compiled and checked before the profiler listens."""
    import torch

    from rmsnorm_patch.bench import cases, providers
    from rmsnorm_patch.bench.suites import DTYPES

    with torch.no_grad():
        ready = []
        for row in calls():
            case = cases.Case(row["op"], "hot", DTYPES[row["dtype"]], row["m"], row["n"])
            extra = (NAIVE,) if row["provider"] == "naive" else ()
            ((provider,), _) = providers.load(case.op, case.spec, wanted=(row["provider"],), extra=extra)
            wrong = cases.check(provider, case)
            if wrong:
                raise SystemExit(f"profile_counts: {provider.name} {row}: {wrong}")
            ready.append(partial(cases.invoke, provider, cases.operands(case, 1)[0], cases.weights_of(case)))
        ncu.listen(ready)


def rows_of(text: str) -> list[dict]:
    """The rows of ncu's CSV of `drive`."""
    groups, wanted = ncu.calls_of(text), calls()
    if len(groups) != len(wanted) or not all(groups):
        raise SystemExit(f"profile_counts: {[len(group) for group in groups]} kernels for {len(wanted)} calls")
    return [_row(call, group) for call, group in zip(wanted, groups, strict=True)]


def _row(call: dict, group: list[dict[str, float]]) -> dict:
    total = sum(kernel[DURATION] for kernel in group)
    busy = sum(kernel[THROUGHPUT] * kernel[DURATION] for kernel in group)
    counts = {metric: sum(kernel[metric] for kernel in group) for metric in METRICS}
    times = {"us": round(total / 1e3, 4), "dram_percent": round(busy / total, 2)}
    return {**call, "kernels": len(group), "counts": counts, **times}


def speed(row: dict) -> tuple[float, float, float]:
    """Microseconds; GB/s of x and weight read and the result written, each a row long; GFLOPS. Of a plain norm."""
    elements = row["m"] * row["n"]
    return row["us"], 3 * BYTES[row["dtype"]] * elements / row["us"] / 1e3, FLOPS * elements / row["us"] / 1e3


def line_of(row: dict) -> str:
    """What a row says, for a screen."""
    counts = ", ".join(f"{name} {row['counts'][metric]:.0f}" for metric, name in METRICS.items())
    rates = f"{row['us']:.2f} us, DRAM at {row['dram_percent']} %"
    if row["op"] == "rms_norm":
        rates += ", {1:.2f} GB/s, {2:.2f} GFLOPS".format(*speed(row))
    called = f"{row['op']} {row['dtype']} {row['m']}x{row['n']} {row['provider']}"
    return f"{called}: {row['kernels']} kernels; {rates}; {counts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive()
        return
    rows = rows_of(ncu.profile([__file__, "--drive"], [*METRICS, DURATION, THROUGHPUT]))
    for row in rows:
        print(line_of(row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
