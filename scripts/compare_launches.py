"""Launches of several versions of the package in one process, in alternating rounds: their bits, GPU and host time.

    python scripts/compare_launches.py export COMMIT FOLDER    # where git is: a version for `run`
    python scripts/compare_launches.py run --old FOLDER --also change=FOLDER --json records/launches/<gpu>.json
    python scripts/compare_launches.py write                   # the tables of docs/decisions/launch.md; or: check

Versions: `old`; `again`, a second copy of `old`, whose ratios say what this measurement cannot tell apart; those of
`--also`; `now`, the checkout itself. `run` exits with 1 where one has other bits than `old`. A round visits each twice,
there and back, so that a steady drift hits all alike; its ratio is over `old` in the same round. Without a GPU host
times alone are taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchlib import trees  # noqa: E402
from benchlib.pages import table  # noqa: E402
from benchlib.stamp import stamp  # noqa: E402
from benchlib.trees import Tree  # noqa: E402

from rmsnorm_patch.backends.cuda import cache  # noqa: E402
from rmsnorm_patch.bench import cases  # noqa: E402
from rmsnorm_patch.bench.rows import PAIR  # noqa: E402
from rmsnorm_patch.bench.versions import versions  # noqa: E402
from rmsnorm_patch.numerics.contract import PLAIN_OPS  # noqa: E402

RECORDS = ROOT / "records" / "launches"
PAGE = ROOT / "docs" / "decisions" / "launch.md"
BEGIN, END = "<!-- written by scripts/compare_launches.py -->", "<!-- end -->"

OPS = (*PLAIN_OPS, PAIR)
"""The pair, whose launch Python makes, has no form for the CPU."""
SHAPES = dict.fromkeys(PLAIN_OPS, ("1x2048", "1x4096", "8x4096", "64x4096", "4096x4096", "4096x8192"))
SHAPES[PAIR] = ("1x128", "64x128", "4096x128")
HOST_ROWS = 64
"""A call's host work is the same for any number of rows; up to here the device keeps up with it."""
HOST_CALLS = 200
GRAPH_LAUNCHES = {True: 400, False: 20}
"""Of a graph, for few rows and for many: it takes half a millisecond or more."""
FORMS = ("bound", "op")
"""What patched models and eager code hold (`bind_*`), and what graphs hold (`torch.ops`)."""
LIMIT = 0.005
"""What a ratio may differ from 1."""
LIBRARY = re.compile(r"rmsnorm_patch\S*launcher")
"""A launcher among the files that the process has mapped."""
Call = Callable[[], Any]
Sample = TypeVar("Sample")


def operands(op: str, m: int, n: int) -> tuple[torch.Tensor, ...]:
    """bf16 rows and weights, which are parameters as models have them."""
    case = cases.Case(op, "hot", torch.bfloat16, m, n)
    return (*cases.operands(case, 1)[0], *cases.weights_of(case))


def forms_of(op: str) -> tuple[str, ...]:
    return FORMS[:1] if op == PAIR else FORMS


def function(tree: Tree, op: str, form: str) -> Callable[..., Any]:
    """f(*operands, eps) of a tree, with the numerics of Llama."""
    if form == "op":
        return getattr(getattr(torch.ops, tree.package), op).default  # type: ignore[no-any-return]
    place = tree.module("fused.query_key_norm.kernel", "cuda_pair") if op == PAIR else tree.module("ops")
    bind: Callable[..., Any] = getattr(place, f"bind_{op}")
    return bind(tree.module("numerics.spec", "semantics").NormSpec())


def results(op: str, called: Callable[..., Any], given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What a call gives, as the integers that its bits are."""
    in_place = op != PAIR and PLAIN_OPS[op].in_place
    own = [tensor.clone() for tensor in given] if in_place else list(given)
    made = called(*own, cases.EPS)
    made = own[:-1] if in_place else made if isinstance(made, tuple) else (made,)
    return [tensor.view(torch.int16) for tensor in made]


def differing(compared: list[Tree], op: str, given: tuple[torch.Tensor, ...]) -> dict[str, int]:
    """Elements of each tree's results that are not the first one's, over all forms of the call."""
    found = dict.fromkeys((tree.name for tree in compared[1:]), 0)
    for form in forms_of(op):
        want, *others = (results(op, function(tree, op, form), given) for tree in compared)
        for name, got in zip(found, others, strict=True):
            found[name] += sum(int((a != b).sum()) for a, b in zip(want, got, strict=True))
    return found


def alternated(samplers: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[tuple[Sample, Sample]]]:
    """Both samples of each round by name: all names are visited in order, then in the opposite one."""
    found: dict[str, list[tuple[Sample, Sample]]] = {name: [] for name in samplers}
    for _ in range(rounds):
        there = {name: sampler() for name, sampler in samplers.items()}
        back = {name: samplers[name]() for name in reversed(samplers)}
        for name in samplers:
            found[name].append((there[name], back[name]))
    return found


def summary(samples: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """us: medians over rounds. ratio: to the first name, in the same round: the median, an interval that holds the
    true median with 95 % (between two of the ordered rounds), and the 10th and 90th percentile."""
    means = {name: [sum(pair) / 2 for pair in pairs] for name, pairs in samples.items()}
    base, *others = means
    ratio = {}
    for name in others:
        each = sorted(new / old for new, old in zip(means[name], means[base], strict=True))
        count = len(each)
        outside = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
        last = count - 1
        ratio[name] = {
            "median": round(statistics.median(each), 5),
            "interval": [round(each[outside], 5), round(each[last - outside], 5)],
            "spread": [round(each[round(0.1 * last)], 5), round(each[round(0.9 * last)], 5)],
        }
    return {"us": {name: round(statistics.median(values), 4) for name, values in means.items()}, "ratio": ratio}


def host_sampler(call: Call, calls: int) -> Callable[[], float]:
    """Microseconds of the host per call; the device is waited for afterwards."""

    def sample() -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        taken = time.perf_counter() - begun
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken * 1e6 / calls

    return sample


def host_times(calls: Mapping[str, Call], rounds: int) -> dict[str, Any]:
    samplers = {name: host_sampler(call, HOST_CALLS) for name, call in calls.items()}
    collecting = gc.isenabled()
    gc.disable()
    try:
        alternated(samplers, 2)
        return summary(alternated(samplers, rounds))
    finally:
        if collecting:
            gc.enable()


def gpu_times(calls: Mapping[str, Call], launches: int, rounds: int) -> dict[str, Any]:
    """Replays of one graph of `launches` calls for each; their results lie at the same addresses, in one pool."""
    pool, graphs = torch.cuda.graph_pool_handle(), {}
    for name, call in calls.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], pool=pool):
            for _ in range(launches):
                call()  # what it gives is dropped at once: the next call writes to the same memory

    def sampler(graph: torch.cuda.CUDAGraph) -> Callable[[], tuple[torch.cuda.Event, torch.cuda.Event]]:
        def sample() -> tuple[torch.cuda.Event, torch.cuda.Event]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            return begin, end

        return sample

    samplers = {name: sampler(graph) for name, graph in graphs.items()}
    alternated(samplers, 3)
    marks = alternated(samplers, rounds)
    torch.cuda.synchronize()
    us = lambda mark: mark[0].elapsed_time(mark[1]) * 1e3 / launches  # noqa: E731
    times = {name: [(us(there), us(back)) for there, back in pairs] for name, pairs in marks.items()}
    for graph in graphs.values():
        graph.reset()
    return summary(times)


def rows_of(compared: list[Tree], op: str, m: int, n: int, args: argparse.Namespace, device: str) -> list[dict]:
    """What differs, then what was timed."""
    given = operands(op, m, n)
    found: list[dict[str, Any]] = [{"what": "bits", "differing": differing(compared, op, given)}]

    def calls(form: str) -> dict[str, Call]:
        def call_of(called: Callable[..., Any]) -> Call:
            return lambda: called(*given, cases.EPS)

        return {tree.name: call_of(function(tree, op, form)) for tree in compared}

    if device == "cuda":
        found.append({"what": "gpu", **gpu_times(calls("bound"), GRAPH_LAUNCHES[m <= HOST_ROWS], args.rounds)})
    if m <= HOST_ROWS:
        found += [{"what": f"host {form}", **host_times(calls(form), args.host_rounds)} for form in forms_of(op)]
    return [{"op": op, "m": m, "n": n, **row} for row in found]


def check_launchers(compared: list[Tree]) -> str:
    """How all start kernels ("c", "python"); SystemExit where they differ, or two have one library."""
    kinds = {tree.name: tree.module("backends.cuda.launcher", "launcher").functions().kind for tree in compared}
    if len(set(kinds.values())) > 1:
        raise SystemExit(f"compare_launches: launchers differ: {kinds}")
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    libraries = {(line[3], line[4]) for line in lines if len(line) > 5 and LIBRARY.search(line[5])}
    kind = kinds[compared[0].name]
    if kind == "c" and len(libraries) < len(compared):
        raise SystemExit(f"compare_launches: {len(compared)} versions have {len(libraries)} libraries between them")
    return kind


def loaded(args: argparse.Namespace, place: Path) -> list[Tree]:
    """old, again, those of --also, now."""
    folders = [("old", args.old), ("again", args.old), *args.also]
    return [*(trees.load(*each, place, 2 + i) for i, each in enumerate(folders)), trees.this()]


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ[cache.DIRECTORY_VARIABLE] = str(cache.directory())  # of this version: equal sources are compiled once
    with tempfile.TemporaryDirectory() as place:
        compared = loaded(args, Path(place))
        launcher = check_launchers(compared) if device == "cuda" else "none"
        rows: list[dict] = []
        for op in args.op:
            if op == PAIR and device == "cpu":
                continue
            for shape in args.shapes or SHAPES[op]:
                m, n = map(int, shape.split("x"))
                rows += rows_of(compared, op, m, n, args, device)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": versions(),
        "date": stamp()["date"],
        "launcher": launcher,
        "trees": {tree.name: {"commit": tree.commit, "digest": tree.digest} for tree in compared},
        "rounds": {"gpu": args.rounds, "host": args.host_rounds},
        "rows": rows,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _cell(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["interval"]
    return f"{ratio['median']:.4f} ({low:.4f}-{high:.4f})"


def _middle(rows: list[dict], tree: str) -> str:
    return f"{statistics.median(row['ratio'][tree]['median'] for row in rows):.4f}" if rows else "-"


def _count(fulfilled: list[bool]) -> str:
    return f"{sum(fulfilled)} of {len(fulfilled)}"


def tables_of(record: Mapping[str, Any], name: str) -> list[str]:
    """What one record says, as paragraphs of Markdown."""
    bits, gpu = ([row for row in record["rows"] if row["what"] == what] for what in ("bits", "gpu"))
    host = [row for row in record["rows"] if row["what"].startswith("host")]
    commits = {tree: known["commit"] or known["digest"][:12] for tree, known in record["trees"].items()}
    others = list(commits)[1:]
    overall = []
    for tree in others:
        near = [[abs(row["ratio"][tree]["median"] - 1) <= LIMIT for row in rows] for rows in (gpu, host)]
        equal = _count([row["differing"][tree] == 0 for row in bits])
        overall.append([tree, commits[tree], equal, *(_middle(rows, tree) for rows in (gpu, host)), *map(_count, near)])
    limit = f"within {LIMIT:.1%}"
    parts = [
        f"{record['device']}, torch {record['versions']['torch']}: `records/launches/{name}`. "
        f"`old` is {commits['old']}.",
        table(["version", "commit", "same bits", "GPU", "host", f"GPU {limit}", f"host {limit}"], overall),
        "Medians of rounds, and intervals that hold the true median with 95 %:",
    ]
    for what, rows in (("GPU", gpu), ("host", host)):
        form = ["call"] if what == "host" else []
        lines = [
            [
                row["op"],
                f"{row['m']} x {row['n']}",
                *(row["what"].removeprefix("host ") for _ in form),
                f"{row['us']['old']:.2f}",
                *(_cell(row["ratio"][tree]) for tree in others),
            ]
            for row in rows
        ]
        if lines:
            parts.append(table(["op", "shape", *form, f"{what} us, old", *others], lines))
    return [part.rstrip("\n") for part in parts]


def page(text: str, folder: Path = RECORDS) -> str:
    """The page with the tables of the records that are there."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = [part for name, record in found.items() for part in tables_of(record, name)]
    head, rest = text.split(BEGIN)
    written = "\n\n".join(parts or ["Not measured on a GPU yet."])
    return f"{head}{BEGIN}\n\n{written}\n\n{END}{rest.split(END, 1)[1]}"


def _named_folder(word: str) -> tuple[str, Path]:
    name, _, folder = word.partition("=")
    if not name.isidentifier() or not folder or name in ("old", "again", "now"):
        raise argparse.ArgumentTypeError(f"{word!r} is no NAME=FOLDER; old, again and now are taken")
    return name, Path(folder)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    exporting = parts.add_parser("export", help="a commit's kernels and package into a new folder")
    exporting.add_argument("commit")
    exporting.add_argument("folder", type=Path)
    running = parts.add_parser("run", help="compare and time")
    running.add_argument("--old", type=Path, required=True, metavar="FOLDER", help="an exported commit, or a checkout")
    running.add_argument("--also", type=_named_folder, nargs="+", default=[], metavar="NAME=FOLDER")
    running.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    running.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS")
    running.add_argument("--rounds", type=int, default=80, help="on the GPU")
    running.add_argument("--host-rounds", type=int, default=60)
    running.add_argument("--json", type=Path)
    parts.add_parser("write", help="the tables into the page")
    parts.add_parser("check", help="exit 1 where the page has others")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parsed(arguments)
    if args.part == "export":
        print(trees.export(args.commit, args.folder))
    elif args.part == "run":
        found = run(args)
        print("\n\n".join(tables_of(found, args.json.name if args.json else "-")))
        return int(any(any(row["differing"].values()) for row in found["rows"] if row["what"] == "bits"))
    else:
        text = PAGE.read_text()
        new = page(text)
        if args.part == "check":
            print(
                "as written" if new == text else f"{PAGE.name} has other tables: run scripts/compare_launches.py write"
            )
            return int(new != text)
        PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
