"""Time RMSNorm kernels of every provider on one GPU, side by side, each checked against fp64 first.

    python scripts/bench_kernels.py --suite prefill --json out.json --plot out.svg --warm-jobs 14
    python scripts/bench_kernels.py --op rms_norm --mode cold --m 4096 --n 4096 8192 --provider my_module:my_function

Providers that do not import or that fail their check are listed with the reason and get no figure. A row of the JSON:
{"op", "mode", "dtype", "m", "n", "variant", "bytes", "us": {provider: median}, "spread": {provider: [10 %, 90 %]},
"failed": {provider: reason}, "roofline_us"}. "variant" is "" where peers compute the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from benchlib import cases, plots, providers, warm
from benchlib.cases import VARIANTS, Case
from benchlib.rows import FUSED, OURS, PAIR, PLAIN, best_peer, gain, geometric_mean
from benchlib.suites import DTYPE_NAMES, DTYPES, SUITES, Todo


def chosen(args: argparse.Namespace) -> list[Todo]:
    only = tuple(args.only or ())
    if not args.suite:
        shapes = [(m, n) for n in args.n for m in args.m]
        return [Todo(Case(args.op, args.mode, DTYPES[args.dtype], m, n, args.variant), only) for m, n in shapes]
    todo = [item for name in args.suite for item in SUITES[name]]
    return [Todo(item.case, only or item.only) for item in todo]


def run_case(item: Todo, found: list[providers.Provider], replays: int) -> dict:
    case = item.case
    us, spread, failed = {}, {}, {}
    for provider in found:
        if item.only and provider.name not in item.only:
            continue
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
    alone = bool(item.only) and set(item.only) <= set(OURS)
    bound = None if alone else cases.measure_roofline(case, replays)
    shape = {"op": case.op, "mode": case.mode, "dtype": DTYPE_NAMES[case.dtype], "m": case.m, "n": case.n}
    row = {**shape, "variant": case.variant, "bytes": case.bytes, "us": us, "spread": spread, "failed": failed}
    return {**row, "roofline_us": None if bound is None else round(bound, 4)}


def print_row(row: dict) -> None:
    times = "  ".join(f"{name} {t:.2f}" for name, t in sorted(row["us"].items(), key=lambda kv: kv[1]))
    ratio, peer = gain(row), best_peer(row)
    against = f"{ratio:.3f}x {peer[0]}" if ratio and peer else "-"
    bound = row["roofline_us"]
    share = f"{bound / min(row['us'].values()):.3f}" if bound and row["us"] else "-"
    print(
        f"{row['op'][:5]} {row['mode']:6} {row['dtype']} {row['m']:>5}x{row['n']:<6} {row['variant']} ours/best "
        f"{against:24} roofline {bound or '-'} (best at {share})  | {times}",
        flush=True,
    )
    for name, why in row["failed"].items():
        print(f"      {name}: no figure: {why}", flush=True)


def summary(rows: list[dict]) -> None:
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        ratio = gain(row)
        if ratio:
            groups.setdefault((row["op"], row["mode"], row["dtype"]), []).append(ratio)
    for key, ratios in groups.items():
        mean, worst = geometric_mean(ratios), min(ratios)
        print(f"{' '.join(key)}: best peer / ours, geometric mean {mean:.3f}, worst {worst:.3f}, n={len(ratios)}")


def run(todo: list[Todo], args: argparse.Namespace) -> list[dict]:
    rows: list[dict] = []
    loaded: dict[tuple, list[providers.Provider]] = {}
    begun = time.monotonic()
    for number, item in enumerate(todo):
        if time.monotonic() - begun > args.seconds:
            print(f"{len(todo) - number} of {len(todo)} cases not run: {args.seconds:.0f} s are over", flush=True)
            break
        key = (item.case.op, item.case.variant)
        if key not in loaded:
            loaded[key], missing = providers.load(
                item.case.op, item.case.spec, only_ours=bool(item.case.variant), extra=args.provider
            )
            for name, why in missing.items():
                print(f"{item.case.op}: {name} is not here: {why}", flush=True)
        rows.append(run_case(item, loaded[key], args.replays))
        print_row(rows[-1])
        torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), help="named sets of cases")
    parser.add_argument("--op", choices=(FUSED, PLAIN, PAIR), default=FUSED)
    parser.add_argument("--mode", choices=("cold", "hot", "chain", "host"), default="cold")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--variant", choices=list(VARIANTS), default="", help="other numerics, for our kernels alone")
    parser.add_argument("--m", type=int, nargs="+", default=[4096], help="rows; tokens for rms_norm_pair")
    parser.add_argument("--n", type=int, nargs="+", default=[4096], help="columns; of one head for rms_norm_pair")
    parser.add_argument("--only", nargs="+", help="names of providers")
    parser.add_argument("--provider", nargs="*", default=[], help="[name=]module:function of one more provider")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--warm-jobs", type=int, default=0, help="processes that compile everything before the timing")
    parser.add_argument("--warm-slice", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no case after this long; says what is left"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw the rows of each op and mode into this SVG")
    args = parser.parse_args()
    if args.mode == "chain" and args.op == PAIR:
        parser.error("--mode chain: the results of rms_norm_pair are not its operands")
    return args


def main() -> None:
    args = parsed()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels: needs a CUDA device; this machine has none")
    todo = chosen(args)
    with torch.no_grad():
        if args.warm_slice:
            warm.compile_slice(todo, *args.warm_slice)
            return
        if args.warm_jobs:
            begun = time.monotonic()
            warm.start(args.warm_jobs, sys.argv)
            print(f"compiled by {args.warm_jobs} processes in {time.monotonic() - begun:.0f} s", flush=True)
        rows = run(todo, args)
    summary(rows)
    if args.plot:
        plots.times(rows, args.plot)


if __name__ == "__main__":
    main()
