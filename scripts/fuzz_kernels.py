"""Random calls of the norms' kernels on a GPU, each against fp64 with canaries around its operands.

    python scripts/fuzz_kernels.py --cases 20000 --workers 14 --seconds 200

Every worker has variants (op, spec, dtypes, row length, layout) of its own, compiles their kernels and makes many calls
of each. The result goes to `records/fuzz/<gpu>.json` and holds each call that was wrong, with its seed. Exit status 1:
a call was wrong, or fewer were made than asked for.

    python scripts/fuzz_kernels.py --backend triton --device cpu --cases 60     the interpreter, without a GPU
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchlib.stamp import stamp  # noqa: E402

SHOWN = 50
"""Wrong calls that a result names."""


def work(numbers: range, args: argparse.Namespace, end: float, results: Any) -> None:
    """One process: many calls of each variant of these numbers, until `end`."""
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from benchlib import kernel_cases

    torch.set_num_threads(1)
    variants = kernel_cases.variants(args.variants, args.seed)
    mine = [variants[i] for i in numbers]
    made, wrong, by_op = 0, [], Counter()
    each = -(-args.cases // args.variants)
    for variant, seed in ((v, s) for v in mine for s in range(each)):
        if time.monotonic() > end:
            break
        case = kernel_cases.drawn(variant, args.seed * 1_000_003 + seed)
        try:
            fault = kernel_cases.fault_in(case, args.backend, args.device)
        except Exception as error:  # a finding like any other: the run goes on
            fault = f"{type(error).__name__}: {error}"
        made += 1
        by_op[variant.op] += 1
        if fault:
            wrong.append(f"{case.named}: {fault}")
            if "CUDA error" in fault:
                break
    results.put((made, wrong, by_op))


def run(args: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    parts = [range(k, args.variants, args.workers) for k in range(args.workers)]
    processes = [context.Process(target=work, args=(p, args, began + args.seconds, results)) for p in parts]
    for process in processes:
        process.start()
    made, wrong, by_op, told = 0, [], Counter(), 0
    while told < len(processes) and time.monotonic() < began + args.seconds + 60:
        try:
            count, faults, ops = results.get(timeout=2)
        except Exception:
            if all(not process.is_alive() for process in processes) and results.empty():
                break
            continue
        made, wrong, by_op, told = made + count, wrong + faults, by_op + ops, told + 1
    if told < len(processes):
        wrong.append(f"{len(processes) - told} processes died or hung without a result")
    for process in processes:
        process.join(5)
        process.kill()
    return {
        "device": _device(args.device),
        "backend": args.backend,
        **stamp(),
        "seed": args.seed,
        "asked": args.cases,
        "made": made,
        "variants": args.variants,
        "by_op": dict(sorted(by_op.items())),
        "wrong": len(wrong),
        "wrong_calls": sorted(wrong)[:SHOWN],
        "seconds": round(time.monotonic() - began, 1),
    }


def _device(device: str) -> str:
    import torch

    if device == "cpu":
        return "CPU"
    if not torch.cuda.is_available():
        raise SystemExit("fuzz_kernels: needs a CUDA device; this machine has none")
    return torch.cuda.get_device_name(0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--variants", type=int, default=0, help="default: one for forty cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=200, help="after which no new call is made")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--result", type=Path, help="default: records/fuzz/<gpu>.json")
    args = parser.parse_args()
    args.variants = args.variants or max(args.workers, args.cases // 40)
    return args


def main() -> None:
    args = parsed()
    _device(args.device)
    found = run(args)
    name = re.sub(r"[^a-z0-9]+", "-", f"{found['device']}-{args.backend}".lower()).strip("-")
    path = args.result or ROOT / "records" / "fuzz" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    raise SystemExit(1 if found["wrong"] or found["made"] < args.cases else 0)


if __name__ == "__main__":
    main()
