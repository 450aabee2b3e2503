"""Time RMSNorm kernels of every provider on one GPU, side by side, each checked against fp64 first.

    python scripts/bench_kernels.py --suite prefill --json out.json
    python scripts/bench_kernels.py --op rms_norm --mode cold --m 4096 --n 4096 8192 --provider my_module:my_function

Providers that do not import or that fail their check are listed with the reason and get no figure.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from benchlib import cases, providers
from benchlib.cases import FUSED, Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PREFILL_N = (*range(1024, 16385, 1024), 20480, 24576, 32768)
DECODE_N = (2048, 2880, 3584, 4096, 5120, 7168, 8192, 16384)

SUITES: dict[str, list[tuple[str, str, str, tuple[int, ...], tuple[int, ...]]]] = {
    "prefill": [(FUSED, "cold", "bf16", (4096,), PREFILL_N)],
    "prefill_norm": [("rms_norm", "cold", "bf16", (4096,), PREFILL_N)],
    "kernel": [(FUSED, "kernel", "bf16", (4096,), tuple(range(1024, 16385, 1024)))],
    "decode": [(FUSED, "chain", "bf16", (1, 16, 64, 128, 256), DECODE_N)],
    "hot": [(FUSED, "hot", "bf16", (4096,), (1024, 2048))],
    "long": [(FUSED, "cold", "bf16", (512,), (65536, 131072, 262144))],
    "dtypes": [
        (FUSED, "cold", "fp16", (4096,), tuple(range(1024, 8193, 1024))),
        (FUSED, "cold", "fp32", (4096,), (4096,)),
        ("rms_norm", "hot", "fp32", (1, 64), (768, 4096)),
        ("rms_norm", "hot", "fp32", (1024,), (4096,)),
        ("rms_norm", "cold", "fp16", (4096,), tuple(range(1024, 8193, 1024))),
    ],
    "host": [(FUSED, "host", "bf16", (8,), (4096,)), ("rms_norm", "host", "bf16", (8,), (4096,))],
}


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    if args.suite:
        rows = [row for name in args.suite for row in SUITES[name]]
    else:
        rows = [(args.op, args.mode, args.dtype, tuple(args.m), tuple(args.n))]
    return [Case(op, mode, DTYPES[dtype], m, n) for op, mode, dtype, ms, ns in rows for m in ms for n in ns]


def run_case(case: Case, found: list[providers.Provider], replays: int) -> dict:
    us, spread, failed = {}, {}, {}
    for provider in found:
        try:
            wrong = cases.check(provider, case)
            if wrong:
                failed[provider.name] = wrong
                continue
            taken = cases.measure(provider, case, replays)
        except Exception as error:  # one peer's limit at one shape must not end the run
            failed[provider.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            torch.cuda.synchronize()
            continue
        us[provider.name] = round(taken.us, 4)
        spread[provider.name] = [round(taken.low, 4), round(taken.high, 4)]
    bound = cases.measure_roofline(case, replays)
    dtype = next(k for k, v in DTYPES.items() if v == case.dtype)
    row = {**asdict(case), "dtype": dtype, "us": us, "spread": spread, "failed": failed}
    return {**row, "roofline_us": None if bound is None else round(bound, 4)}


def best_ratio(row: dict) -> tuple[float, str] | None:
    """(best peer's time / our best time, the peer's name)."""
    ours = [t for name, t in row["us"].items() if name in ("ours", "ours_inplace")]
    peers = {name: t for name, t in row["us"].items() if not name.startswith("ours")}
    if not ours or not peers:
        return None
    name = min(peers, key=peers.__getitem__)
    return peers[name] / min(ours), name


def print_row(row: dict) -> None:
    times = "  ".join(f"{name} {t:.2f}" for name, t in sorted(row["us"].items(), key=lambda kv: kv[1]))
    ratio = best_ratio(row)
    against = f"{ratio[0]:.3f}x {ratio[1]}" if ratio else "-"
    bound = row["roofline_us"]
    share = f"{bound / min(row['us'].values()):.3f}" if bound and row["us"] else "-"
    print(
        f"{row['op'][:5]} {row['mode']:6} {row['dtype']} {row['m']:>5}x{row['n']:<6} ours/best {against:24} "
        f"roofline {bound or '-'} (best at {share})  | {times}",
        flush=True,
    )
    for name, why in row["failed"].items():
        print(f"      {name}: no figure: {why}", flush=True)


def summary(rows: list[dict]) -> None:
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        ratio = best_ratio(row)
        if ratio:
            groups.setdefault((row["op"], row["mode"], row["dtype"]), []).append(ratio[0])
    for key, ratios in groups.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{' '.join(key)}: best peer / ours, geometric mean {mean:.3f}, worst {min(ratios):.3f}, n={len(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), help="named sets of cases")
    parser.add_argument("--op", choices=(FUSED, "rms_norm"), default=FUSED)
    parser.add_argument("--mode", choices=("cold", "hot", "chain", "host", "kernel"), default="cold")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--m", type=int, nargs="+", default=[4096], help="rows")
    parser.add_argument("--n", type=int, nargs="+", default=[4096], help="columns")
    parser.add_argument("--only", nargs="+", help="names of built-in providers")
    parser.add_argument("--provider", nargs="*", default=[], help="module:function of one more provider")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no case after this long; says what is left"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels: needs a CUDA device; this machine has none")
    rows, loaded = [], {}
    begun, todo = time.monotonic(), chosen_cases(args)
    with torch.no_grad():
        for number, case in enumerate(todo):
            if time.monotonic() - begun > args.seconds:
                print(f"{len(todo) - number} of {len(todo)} cases not run: {args.seconds:.0f} s are over", flush=True)
                break
            if case.op not in loaded:
                loaded[case.op] = providers.load(case.op, set(args.only or ()), tuple(args.provider))
                for name, why in loaded[case.op][1].items():
                    print(f"{case.op}: {name} is not here: {why}", flush=True)
            rows.append(run_case(case, loaded[case.op][0], args.replays))
            print_row(rows[-1])
            torch.cuda.empty_cache()
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    summary(rows)


if __name__ == "__main__":
    main()
