"""What a first call costs: compilation with an empty cache, and the same kernels from the disk in a new process.

    python scripts/bench_jit.py --json out.json

Each repeat is two processes: the first finds an empty cache, the second what the first left there. A row: {"what",
"op", "n", "kernels", "cold_ms": [...], "disk_ms": [...]}, one number for each repeat. "kernel" compiles and loads one
schedule of one shape, and the compiler itself; "first call" makes every schedule of a row length (few and many rows)
and launches; "warmup" is `rmsnorm_patch.warmup` of a model with Llama-1B norms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

OPS = ("fused_add_rms_norm", "rms_norm")
LENGTHS = (4096, 16384, 5125)
KERNEL_N = 8192
"""Its row length is in no other row, so that nothing has compiled it before."""


def _milliseconds(work) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return round((time.perf_counter() - begun) * 1e3, 2)


def _one_kernel() -> float:
    """One schedule from source (or disk) to a loaded function; the first of the process, so the compiler loads too."""
    from rmsnorm_patch.backends.cuda import driver, jit, kernel_set, schedules
    from rmsnorm_patch.numerics.spec import LLAMA

    dtype, index = torch.bfloat16, torch.cuda.current_device()
    config = kernel_set.configs_for("fused_add_rms_norm", dtype, KERNEL_N, index)[0]
    arch = schedules.sm(torch.cuda.get_device_capability(index))
    align = config.vec * dtype.itemsize
    build = jit.Build(config, LLAMA, True, KERNEL_N, 1, dtype, dtype, align, align, False, arch)

    def work() -> None:
        code = jit.machine_code(build)
        driver.load(code, build.config.entry, index, "bench_jit", build.config.cluster)

    return _milliseconds(work)


def _first_call(op: str, n: int) -> float:
    from rmsnorm_patch.backends.cuda import backend as cuda_backend
    from rmsnorm_patch.numerics.spec import LLAMA

    x, residual = (torch.randn(8, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.nn.Parameter(torch.ones(n, device="cuda", dtype=torch.bfloat16), requires_grad=False)
    operands = (x, weight) if op == "rms_norm" else (x, residual, weight)
    return _milliseconds(lambda: cuda_backend.bind(op, LLAMA)(*operands, 1e-6))


def _warmup() -> float:
    from benchlib import models

    import rmsnorm_patch

    model = models.build("llama-1b", "cuda", layers=2)
    rmsnorm_patch.apply(model, backend="cuda")
    return _milliseconds(lambda: rmsnorm_patch.warmup(model))


def _kernels() -> int:
    from rmsnorm_patch.backends.cuda import cache

    return len(list(cache.directory().glob("*.artefact")))


def child() -> list[dict]:
    from rmsnorm_patch.backends.cuda import launcher

    launcher.functions()  # the launcher is compiled once for a user, not for a kernel
    torch.zeros(1, device="cuda")
    rows: list[dict] = []
    before = _kernels()

    def add(what: str, op: str, n: int, taken: float) -> None:
        seen = before + sum(row["kernels"] for row in rows)
        rows.append({"what": what, "op": op, "n": n, "kernels": _kernels() - seen, "ms": taken})

    add("kernel", OPS[0], KERNEL_N, _one_kernel())
    for op in OPS:
        for n in LENGTHS:
            add("first call", op, n, _first_call(op, n))
    add("warmup", "both", 2048, _warmup())
    return rows


def run(repeats: int) -> list[dict]:
    found: list[dict] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            private = Path(folder, "cache")
            environment = {**os.environ, "RMSNORM_PATCH_CACHE_DIR": str(private), "OMP_NUM_THREADS": "1"}
            cold, disk = (_run_child(environment) for _ in range(2))
        for index, row in enumerate(cold):
            if len(found) <= index:
                found.append({**{k: row[k] for k in ("what", "op", "n", "kernels")}, "cold_ms": [], "disk_ms": []})
            found[index]["cold_ms"].append(row["ms"])
            found[index]["disk_ms"].append(disk[index]["ms"])
    return found


def _run_child(environment: dict[str, str]) -> list[dict]:
    words = [sys.executable, __file__, "--child"]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_jit: needs a CUDA device; this machine has none")
    if args.child:
        print(json.dumps(child()))
        return
    rows = run(args.repeats)
    for row in rows:
        print(f"{row['what']:10} {row['op']:18} N={row['n']:<6} cold {row['cold_ms']} ms, disk {row['disk_ms']} ms")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
