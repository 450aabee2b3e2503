"""Durations of the fused kernel alone by Nsight Compute, at the shapes whose kernel times others have published.

    python scripts/kernel_time.py --json out.json
    python scripts/kernel_time.py --provider hp_rms_norm=module:function

ncu empties the caches before each kernel and stops at its end: lines that are then still to be written cost it nothing.
That is how such figures are usually taken; a launch in a graph (rmsnorm-patch bench-kernels) takes longer.
A row is one of rmsnorm-patch bench-kernels in mode "kernel".
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

from benchlib import ncu
from benchlib.aims import PUBLISHED

from rmsnorm_patch.bench.rows import FUSED, named

METRIC = "gpu__time_duration.sum"
"""Nanoseconds."""
ROWS = 4096
COLUMNS = tuple(map(int, PUBLISHED["B200"]))
PROVIDERS = ("ours", "ours_inplace")
REPEATS = 5


def calls(outside: list[str]) -> list[tuple[int, str]]:
    """(columns, provider) of what `drive` launches, in this order, each REPEATS times behind one marker."""
    names = [*PROVIDERS, *(named(entry)[0] for entry in outside)]
    return [(n, name) for n in COLUMNS for name in names]


def drive(outside: list[str]) -> None:
    """The program under the profiler; everything is compiled and checked before the profiler listens."""
    import torch

    from rmsnorm_patch.bench import cases, providers

    with torch.no_grad():
        spec = cases.Case(FUSED, "hot", torch.bfloat16, ROWS, COLUMNS[0]).spec
        found = {p.name: p for p in providers.load(FUSED, spec, wanted=PROVIDERS, extra=outside)[0]}
        ready = []
        for n, name in calls(outside):
            case = cases.Case(FUSED, "hot", torch.bfloat16, ROWS, n)
            wrong = cases.check(found[name], case)
            if wrong:
                raise SystemExit(f"kernel_time: {name} at {ROWS}x{n}: {wrong}")
            ready.append(partial(_repeat, found[name], case))
        ncu.listen(ready)


def _repeat(provider, case) -> None:
    """REPEATS launches on operands of their own, which do not outlive them."""
    from rmsnorm_patch.bench import cases

    inputs, weights = cases.operands(case, 1)[0], cases.weights_of(case)
    for _ in range(REPEATS):
        cases.invoke(provider, inputs, weights)


def rows_of(text: str, outside: list[str]) -> list[dict]:
    """The rows of ncu's CSV of `drive`."""
    groups, wanted = ncu.calls_of(text), calls(outside)
    if [len(group) for group in groups] != [REPEATS] * len(wanted):
        raise SystemExit(f"kernel_time: {[len(group) for group in groups]} kernels for {len(wanted)} x {REPEATS} calls")
    rows: dict[int, dict] = {}
    for (n, name), group in zip(wanted, groups, strict=True):
        shape = {"op": FUSED, "mode": "kernel", "dtype": "bf16", "m": ROWS, "n": n, "variant": ""}
        new = {**shape, "bytes": 4 * ROWS * n * 2, "us": {}, "spread": {}, "failed": {}, "roofline_us": None}
        row = rows.setdefault(n, new)
        times = sorted(kernel[METRIC] / 1e3 for kernel in group)
        row["us"][name] = round(statistics.median(times), 4)
        row["spread"][name] = [round(times[0], 4), round(times[-1], 4)]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", nargs="*", default=[], help="[name=]module:function of one more provider")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(args.provider)
        return
    program = [__file__, "--drive", *(("--provider", *args.provider) if args.provider else ())]
    # Operands are drawn between a marker and its calls: only kernels of a norm count.
    rows = rows_of(ncu.profile(program, [METRIC], only=f"{ncu.MARKER}|rms_norm"), args.provider)
    for row in rows:
        published = PUBLISHED["H200"].get(str(row["n"]), "nothing")
        print(f"{row['m']}x{row['n']}: {row['us']}, published for H200 {published}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
