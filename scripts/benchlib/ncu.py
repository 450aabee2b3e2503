"""Nsight Compute over a program that marks its calls: the metrics of every kernel, call by call.

The program (`listen`) launches one marker ahead of each call, between `cudaProfilerStart` and `cudaProfilerStop`. ncu
runs every kernel alone and empties the caches before it.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

MARKER = "spin_kernel"
"""The kernel of `torch.cuda._sleep`."""


def listen(calls: Sequence[Callable[[], object]]) -> None:
    """In the profiled program: each call behind its marker. Compile and check before."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for call in calls:
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def profile(program: Sequence[str], metrics: Sequence[str], only: str = "") -> str:
    """ncu's CSV of this interpreter running `program`; the clocks are left as they are.

    only: a regular expression for the names of the kernels that count.
    """
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        raise SystemExit("ncu (Nsight Compute) is not on the PATH")
    words = [ncu, "--csv", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none"]
    words += ["--kernel-name", f"regex:{only}"] if only else []
    words += ["--metrics", ",".join(metrics), sys.executable, *program]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ncu ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def calls_of(text: str) -> list[list[dict[str, float]]]:
    """Of ncu's CSV: the kernels of each call in launch order, {metric: value} each, with the kernel's "name"."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise SystemExit(f"no table in ncu's output:\n{text[-2000:]}")
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[head:]))):
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    groups: list[list[dict]] = []
    for kernel in kernels.values():
        if MARKER in kernel["name"]:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    return groups
