"""Memory sectors and instructions of an RMSNorm, by Nsight Compute: one PyTorch kernel per step against our kernel.

    python scripts/profile_counts.py --json out.json

A row: {"op", "dtype", "m", "n", "provider", "kernels", "counts": {metric: sum over the kernels of one call}}. ncu
empties the caches before every kernel, so each kernel of the naive norm reads its operands from memory, as it also
would where they exceed the L2.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

METRICS = {
    "dram__sectors_read.sum": "DRAM read",
    "dram__sectors_write.sum": "DRAM written",
    "lts__t_sectors.sum": "L2",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "L1 global loads",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum": "L1 global stores",
    "smsp__inst_executed.sum": "instructions",
    "smsp__sass_inst_executed_op_shared_ld.sum": "shared loads",
    "smsp__sass_inst_executed_op_shared_st.sum": "shared stores",
}
"""Nsight Compute's name of each metric, and what the results page calls it."""
SHAPES = (
    ("rms_norm", "fp32", 1, 2048),
    ("rms_norm", "bf16", 4096, 4096),
    ("fused_add_rms_norm", "bf16", 4096, 4096),
)
PROVIDERS = ("eager", "ours")
MARKER = "spin_kernel"
"""The kernel of `torch.cuda._sleep`; one is launched ahead of every call, so that its kernels can be told apart."""


def calls() -> list[dict]:
    """What `drive` launches, in this order."""
    return [
        {"op": op, "dtype": dtype, "m": m, "n": n, "provider": provider}
        for op, dtype, m, n in SHAPES
        for provider in PROVIDERS
    ]


def drive() -> None:
    """The program under the profiler; everything is compiled and checked before the profiler listens."""
    import torch
    from benchlib import cases, providers
    from benchlib.suites import DTYPES

    with torch.no_grad():
        ready = []
        for row in calls():
            case = cases.Case(row["op"], "hot", DTYPES[row["dtype"]], row["m"], row["n"])
            (provider,), _ = providers.load(case.op, case.spec, wanted=(row["provider"],))
            wrong = cases.check(provider, case)
            if wrong:
                raise SystemExit(f"profile_counts: {provider.name} {row}: {wrong}")
            ready.append((provider, cases.operands(case, 1)[0], cases.weights_of(case)))
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        for provider, inputs, weights in ready:
            torch.cuda._sleep(1)
            cases.invoke(provider, inputs, weights)
            torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def profile() -> str:
    """ncu's CSV of `drive`."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        raise SystemExit("profile_counts: ncu (Nsight Compute) is not on the PATH")
    words = [ncu, "--csv", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none"]
    words += ["--metrics", ",".join(METRICS), sys.executable, __file__, "--drive"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"profile_counts: ncu ended with {done.returncode}:\n{said}")
    return done.stdout


def parse(text: str) -> list[dict[str, float]]:
    """One {metric: value} for each profiled kernel in launch order, its name under "name"."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise SystemExit(f"profile_counts: no table in ncu's output:\n{text[-2000:]}")
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[head:]))):
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


def rows_of(kernels: list[dict]) -> list[dict]:
    """The kernels between two markers belong to one call."""
    groups: list[list[dict]] = []
    for kernel in kernels:
        if MARKER in kernel["name"]:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    wanted = calls()
    if len(groups) != len(wanted) or not all(groups):
        raise SystemExit(f"profile_counts: {[len(group) for group in groups]} kernels for {len(wanted)} calls")
    return [
        {**call, "kernels": len(group), "counts": {m: sum(kernel[m] for kernel in group) for m in METRICS}}
        for call, group in zip(wanted, groups, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive()
        return
    rows = rows_of(parse(profile()))
    for row in rows:
        counts = ", ".join(f"{name} {value:.0f}" for name, value in row["counts"].items())
        print(f"{row['op']} {row['dtype']} {row['m']}x{row['n']} {row['provider']}: {row['kernels']} kernels; {counts}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
