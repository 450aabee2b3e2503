"""Generate docs/results.md, its plots and the pages beside it from a record and from others of the same GPU.

`scripts/seeds.py` writes what stands beside published figures.

    python scripts/results.py records/nvidia-h200.json records/nvidia-h200-engines.json ...
    python scripts/results.py --name results_h200 records/superseded/nvidia-h200-...json ...   # pages of another GPU

Every figure in the page comes from these files. What the record does not hold is said to be missing. Engines of
another record are those of a newer plugin: they stand in place of the first record's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchlib import aims
from benchlib.aims_tables import aims_table, quantised_aims
from benchlib.pages import MISSING, figure, table, wrapped
from benchlib.starts import starts_text
from benchlib.vllm_engine import RECORDED

from rmsnorm_patch.bench import plots
from rmsnorm_patch.bench.quantised import QUANTISED
from rmsnorm_patch.bench.rows import (
    FUSED,
    PAIR,
    PLAIN,
    Row,
    best_peer,
    gain,
    geometric_mean,
    ours,
    rate,
    select,
    shape,
    share,
)

ROOT = Path(__file__).resolve().parents[1]
Records = dict[str, Row]
"""By file name; the first one has the kernels and models."""


def peer_table(rows: list[Row]) -> str:
    """Times of everybody; the fastest in bold."""
    names = plots.names_of(rows)
    body: list[list[object]] = []
    for row in rows:
        least = min(row["us"].values())
        times = [figure(row["us"].get(name)) for name in names]
        bold = [
            f"**{cell}**" if row["us"].get(name) == least else cell for name, cell in zip(names, times, strict=True)
        ]
        peer, ratio = best_peer(row), gain(row)
        against = f"{ratio:.3f} ({peer[0]})" if ratio and peer else None
        body.append([shape(row), *bold, figure(row.get("roofline_us")), figure(share(row), ".3f"), against])
    return table(["rows x N", *names, "copy", "copy / ours", "best peer / ours"], body) + failures(rows)


def failures(rows: list[Row]) -> str:
    """Who got no figure at which shape, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in row.get("failed", {}).items():
            found.setdefault((name, why), []).append(shape(row))
    where = lambda shapes: "any of these" if len(shapes) == len(rows) else ", ".join(shapes)  # noqa: E731
    lines = [
        f"- {name} has no figure at {where(shapes)}: {why.strip().removesuffix(':')}"
        for (name, why), shapes in found.items()
    ]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def peers(note: str, rows: list[Row]) -> str:
    if not rows:
        return MISSING
    gains = [g for g in map(gain, rows) if g]
    summary = ""
    if gains:
        summary = f" Best peer over ours: geometric mean {geometric_mean(gains):.3f}, worst {min(gains):.3f}."
    return f"{note} Microseconds per call.{summary}\n\n{peer_table(rows)}"


def decode_table(record: Row) -> str:
    rows = select(record, FUSED, "chain")
    if not rows:
        return MISSING
    ms = sorted({row["m"] for row in rows})
    cell = {(row["m"], row["n"]): row for row in rows}

    def text(m: int, n: int) -> str | None:
        row = cell.get((m, n))
        peer, ratio = (best_peer(row), gain(row)) if row else (None, None)
        return f"{ours(row):.2f}, {ratio:.2f}x {peer[0]}" if row and ratio and peer else None

    body = [[n, *(text(m, n) for m in ms)] for n in sorted({row["n"] for row in rows})]
    return (
        "Each launch reads what the one before wrote, in one graph: our microseconds, and the best peer's time over "
        "ours with its name.\n\n" + table(["N", *(f"{m} rows" for m in ms)], body)
    )


def host_table(record: Row) -> str:
    rows = select(record, FUSED, "host") + select(record, PLAIN, "host")
    if not rows:
        return MISSING
    names = sorted({name for row in rows for name in row["us"]}, key=lambda name: rows[0]["us"].get(name, 1e9))
    body = [[name, *(figure(row["us"].get(name)) for row in rows)] for name in names]
    head = ["", *(f"{row['op']} {shape(row)}" for row in rows)]
    return (
        "Wall time of an eager call while the device keeps up, microseconds. All but the in-place forms allocate their "
        "outputs.\n\n" + table(head, body)
    )


def variants_table(record: Row) -> str:
    rates = aims.variant_rates(record)
    body = [
        [
            row["op"],
            row["dtype"],
            row.get("variant") or "-",
            row["mode"],
            shape(row),
            f"{rate(row):.2f}",
            f"{ratio:.3f}",
        ]
        for row, ratio in rates
    ]
    if not body:
        return MISSING
    return (
        "Our kernels in other dtypes and numerics. The last column is over the bf16 kernel of the same run, with one "
        "rounding at the end. A hot fp32 row is held against a bf16 row of the same bytes.\n\n"
        + table(["op", "dtype", "numerics", "mode", "rows x N", "TB/s", "over bf16"], body)
    )


OVERLAP = "~"
"""Behind a ratio of tokens a second: rounds of both span times that overlap."""


def marked(ratio: str, spans: Sequence[Sequence[float] | None]) -> str:
    """A ratio, with what its two least and most tell of it."""
    if None in spans:
        return ratio
    (low, high), (its_low, its_high) = spans  # type: ignore[misc]
    return f"{ratio}{OVERLAP}" if low <= its_high and its_low <= high else ratio


def hf_table(record: Row) -> str:
    if not record["hf"]:
        return MISSING
    names = list(dict.fromkeys(name for row in record["hf"] for name in row["tokens_per_s"]))
    body = []
    for row in record["hf"]:
        rates, ratios, spread = row["tokens_per_s"], row["ratio_to_stock"], row.get("spread", {})

        def ratio(name: str, ratios: dict = ratios, spread: dict = spread) -> str:
            if name == "stock":
                return "1x"
            return marked(f"{ratios[name]:.3f}x", [spread.get(one) for one in (name, "stock")])

        cells = [f"{rates[n]:.0f} ({ratio(n)})" if n in rates else None for n in names]
        body.append([f"{row['model']}, {row['layers']} layers", row["mode"], row["work"], *cells])
    return (
        "Tokens per second, medians of alternating rounds over one set of random weights, and the ratio to stock. "
        f"With {OVERLAP} rounds overlap with stock's: nobody is ahead. "
        "`removed` has no norms at all (adds stay) and is a ceiling, not a model. Compiled: `torch.compile` with "
        "default settings, decoding into a static cache.\n\n" + table(["model", "mode", "work", *names], body)
    )


def vllm_table(record: Row) -> str:
    where = ("shape", "process", "case")
    stock = {tuple(row[k] for k in where): row for row in record["vllm"] if row["variant"] == "stock"}
    body: list[list[object]] = []
    for row in sorted(record["vllm"], key=lambda row: [row[k] for k in (*where, "variant")]):
        its = stock.get(tuple(row[k] for k in where), {})
        over = None
        if row.get("speedup"):
            over = marked(f"{row['speedup']:.4f}", [one.get("tokens_per_s_range") for one in (row, its)])
        shorter = None
        if row.get("step_us") and its.get("step_us") and its is not row:
            shorter = f"{(row['step_us'] / its['step_us'] - 1) * 100:+.1f} %"
        named = (row["shape"], row["process"], row["case"], row["variant"])
        times = (f"{row['tokens_per_s']:.0f}", over, figure(row.get("step_us") or None, ".1f"), shorter)
        body.append([*named, *times, figure(row.get("share_recovered"), ".2f")])
    head = [
        "shape",
        "process",
        "work",
        "engine",
        "tokens/s",
        "tokens/s over stock",
        "step us",
        "step over stock",
        "recovered",
    ]
    return table(head, body)


def with_engines(records: Records) -> Records:
    """The records whose engines count: of those after the first, if any of them has some."""

    def having(items: list[tuple[str, Row]]) -> Records:
        return {name: record for name, record in items if record["vllm"]}

    first, *others = records.items()
    return having(others) or having([first])


def engines_text(records: Records) -> str:
    shown = with_engines(records)
    if not shown:
        return MISSING
    named = {row["variant"] for record in shown.values() for row in record["vllm"]} & set(RECORDED)
    before = " ".join(
        f'In this record "{name}" is what is called "{RECORDED[name]}" now; its "{RECORDED[name]}" is "{name}-off" now.'
        for name in sorted(named)
    )
    return (
        "Compiled engines with CUDA graphs and dummy weights, medians of alternating rounds. Step: device time of one "
        "decode step. Recovered: the share of the time between stock and an engine without norms and adds. Process: "
        "each engine in its own, or all in one with one set of weights, so that they lie at one place in memory. "
        f"With {OVERLAP} rounds overlap with stock's: their tokens/s do not tell which is ahead.\n\n"
        + (f"{before}\n\n" if before else "")
        + "\n".join(f"{_source(name, record)}:\n\n{vllm_table(record)}" for name, record in shown.items())
        + "".join(starts_text(record) for record in shown.values())
    )


def jit_table(record: Row) -> str:
    rows = record.get("jit", ())
    if not rows:
        return MISSING
    cells = lambda values: " / ".join(f"{value:.1f}" for value in values)  # noqa: E731
    body = [[r["what"], r["op"], r["n"], r["kernels"], cells(r["cold_ms"]), cells(r["disk_ms"])] for r in rows]
    return (
        "Milliseconds, one figure for each repeat, which has a process of its own: with an empty cache, and from the "
        "disk. `kernel` is one schedule and the first of its process, `first call` compiles every schedule of a "
        "row length and launches, `warmup` makes a model with Llama-1B norms ready.\n\n"
        + table(["what", "op", "N", "kernels", "empty cache", "from disk"], body)
    )


FAILED_ONCE = """Of five full runs of the GPU tests of the code before, one had one failure:
`test_batch_invariant_and_repeatable[dtype0-8192]`, 8 processes, an empty kernel cache. It did not come back, and what
differed was not printed. The test casts its weight right in front of a norm, and a weight was read before the
dependency wait then: behind a kernel without a trigger of its own a stale one was seen since (128 of 48 992 calls on an
H100), behind a cast none (0 of 38 144). So this is the likely cause, and not a proved one. The weight is read behind
the wait now ([decisions](decisions/launch.md#the-weight-is-read-behind-the-dependency-wait)).
"""
"""What no record of a passing run would say."""


def tests_of_all(records: Records) -> str:
    """A run that stands in two records, in one of them with its sanitizers, is shown once."""
    run = lambda record: (record["digest"], str(record["tests"]))  # noqa: E731
    sanitized = {run(record) for record in records.values() if record.get("sanitizer")}
    shown = {
        name: record for name, record in records.items() if record.get("sanitizer") or run(record) not in sanitized
    }
    runs = "\n".join(f"{_source(name, record)}. {tests_text(record)}" for name, record in shown.items())
    return f"{runs}\n{FAILED_ONCE}"


def _counted(tests: Row | None) -> str:
    """Below the counts, why tests failed that were shown to be wrong themselves."""
    if not tests:
        return MISSING
    said = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped.\n"
    reasons = [[_in_cell(f"`{name}`"), _in_cell(why)] for name, why in tests.get("explained", {}).items()]
    return f"{said}\n{table(['failed', 'why'], reasons)}" if reasons else said


def _in_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def tests_text(record: Row) -> str:
    said = _counted(record["tests"])
    if record.get("engine_tests"):
        said += f"\nWith vLLM engines: {_counted(record['engine_tests'])}"
    rows = record.get("sanitizer", ())
    if not rows:
        return f"GPU tests: {said}\ncompute-sanitizer: {MISSING}"
    body = [[row["tool"], row["errors"], *(row.get(k) for k in ("passed", "failed", "skipped"))] for row in rows]
    return (
        f"GPU tests: {said}\ncompute-sanitizer over the tests that use our kernels directly. The planted fault is one "
        "that memcheck has to find.\n\n" + table(["tool", "errors", "tests passed", "failed", "skipped"], body)
    )


def long_and_odd(record: Row, op: str) -> list[Row]:
    in_prefill = set(aims.PREFILL_N)
    return [row for row in select(record, op, "cold") if row["m"] != 4096 or row["n"] not in in_prefill]


def quantised(record: Row, mode: str, note: str) -> str:
    """A table for each op that the record has rows of."""
    found = {op.removeprefix(f"{FUSED}_"): rows for op in QUANTISED if (rows := select(record, op, mode))}
    tables = [f"**{name}.** {peers('', rows).lstrip()}" for name, rows in found.items()]
    return "\n\n".join([note, *tables]) if tables else MISSING


COLD = "Buffers rotate through ten times the L2."
SECTIONS: dict[str, Callable[[Row], str]] = {
    "Aims": aims_table,
    "Prefill, fused add": lambda r: peers(COLD, aims.prefill(r)),
    "Prefill, plain norm": lambda r: peers(COLD, aims.plain(r)),
    "Decode": decode_table,
    "One hot buffer": lambda r: peers("Everything stays in the L2.", select(r, FUSED, "hot")),
    "Query and key norms": lambda r: peers(
        "32 + 8 heads, strided views of a packed projection; rows are tokens. `ours` is one launch for both, everybody "
        "else takes two (Inductor: one compiled function). First cold, then hot.",
        select(r, PAIR, "cold") + select(r, PAIR, "hot"),
    ),
    "Long and odd rows, fused add": lambda r: peers(COLD, long_and_odd(r, FUSED)),
    "Long rows, plain norm": lambda r: peers(COLD, long_and_odd(r, PLAIN)),
    "Other dtypes and numerics": variants_table,
    "Host cost": host_table,
    "Hugging Face transformers, end to end": hf_table,
    "Compilation": jit_table,
}
QUANTISED_SECTIONS: dict[str, Callable[[Row], str]] = {
    "Aims": quantised_aims,
    "From memory": lambda r: quantised(r, "cold", f"Add, norm and quantisation. {COLD}"),
    "In a chain": lambda r: quantised(r, "chain", "Add, norm and quantisation, chained by their sum."),
}


def draw(record: Row, folder: Path, name: str = "results") -> list[str]:
    """The plots that the record has rows for; their file names, which begin with `name`."""
    gpu, made = record["device"]["name"], []
    rows = aims.prefill(record)
    if any(row["roofline_us"] for row in rows):
        plots.roofline(rows, f"Fused add + RMSNorm, 4096 rows, bf16, cold, {gpu}", folder / f"{name}_roofline.svg")
        made.append(f"{name}_roofline.svg")
    rows = select(record, FUSED, "chain")
    if any(map(gain, rows)):
        plots.gains(rows, gain, f"Fused add + RMSNorm, dependent chain, bf16, {gpu}", folder / f"{name}_decode.svg")
        made.append(f"{name}_decode.svg")
    return made


def name_of(path: Path) -> str:
    """Where a record lies in `records/`; of one elsewhere its name."""
    folder, path = ROOT / "records", path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _source(name: str, record: Row) -> str:
    return f"`records/{name}`, code digest `{record['digest'][:16]}`"


def joined(records: Records) -> Row:
    """The first record with the engines that count: each of the first of their records that has it."""
    engines: dict[tuple[str, ...], Row] = {}
    for record in with_engines(records).values():
        for row in record["vllm"]:
            engines.setdefault((row["shape"], row["variant"], row["process"], row["case"]), row)
    return {**next(iter(records.values())), "vllm": list(engines.values())}


def page(records: Records, drawn: list[str], name: str = "results") -> str:
    """name: of this page, and the beginning of the names of those beside it."""
    record = joined(records)
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    first, *more = (_source(file, one) for file, one in records.items())
    parts = [
        f"# Results on {record['device']['name']}\n\nGenerated by `scripts/results.py` from {first}; "
        f"{'; '.join([versions, *more])}.\n\nA row is one run. Every provider was checked against fp64 "
        "before it was timed, and a copy of the same bytes was timed beside them. Figures are medians. Times hold for "
        "this GPU, ratios within a run.\n",
        *(f"![{file.removeprefix(f'{name}_').removesuffix('.svg')}]({file})\n" for file in drawn),
        *(f"## {title}\n\n{build(record)}" for title, build in SECTIONS.items()),
        f"## Quantised rows\n\nNorms that write quantised rows have [a page of their own]({name}_quantised.md).\n",
        f"## vLLM\n\nEngines have [a page of their own]({name}_vllm.md).\n",
        "## Published figures\n\nWhat others have published stands [beside ours](seeds.md).\n",
        f"## Tests\n\n{tests_of_all(records)}",
    ]
    return wrapped("\n".join(parts))


def quantised_page(records: Records, name: str = "results") -> str:
    """Of the first record, as the kernels are."""
    file, record = next(iter(records.items()))
    head = f"# Quantised rows on {record['device']['name']}\n\nGenerated by `scripts/results.py` from "
    head += f"{_source(file, record)}. How a row came about: [results]({name}.md).\n"
    parts = [head, *(f"## {title}\n\n{build(record)}" for title, build in QUANTISED_SECTIONS.items())]
    return wrapped("\n".join(parts))


def engines_page(records: Records) -> str:
    gpu = next(iter(records.values()))["device"]["name"]
    return wrapped(f"# vLLM engines on {gpu}\n\nGenerated by `scripts/results.py`.\n\n{engines_text(records)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pages and plots")
    parser.add_argument("--name", default="results", help="of the page; those beside it begin with it")
    args = parser.parse_args()
    records = {name_of(path): json.loads(path.read_text()) for path in args.records}
    gpus = {record["device"]["name"] for record in records.values()}
    if len(gpus) > 1:
        parser.error(f"records of {', '.join(sorted(gpus))}: a page is about one GPU; give its records alone")
    drawn = draw(next(iter(records.values())), args.out, args.name)
    pages = {
        f"{args.name}.md": page(records, drawn, args.name),
        f"{args.name}_quantised.md": quantised_page(records, args.name),
        f"{args.name}_vllm.md": engines_page(records),
    }
    for file, text in pages.items():
        (args.out / file).write_text(text)
    print(f"in {args.out}: {', '.join(pages)}; plots: {', '.join(drawn) or 'none'}")


if __name__ == "__main__":
    main()
