"""Generate docs/results.md and its plots from a record.

    python scripts/results.py records/nvidia-h200.json

Every figure in the page comes from that file, except the columns that another project publishes
(`benchlib/published.json`), which are marked as theirs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FUSED = "fused_add_rms_norm"
OURS = ("ours", "ours_inplace")

PUBLISHED = json.loads((Path(__file__).parent / "benchlib" / "published.json").read_text())


def table(head: list[str], rows: Iterable[list[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def select(record: dict, op: str, mode: str, dtype: str = "bf16") -> list[dict]:
    rows = [r for r in record["kernels"] if (r["op"], r["mode"], r["dtype"]) == (op, mode, dtype) and r["us"]]
    return sorted(rows, key=lambda r: (r["n"], r["m"]))


def ours(row: dict) -> float | None:
    times = [row["us"][name] for name in OURS if name in row["us"]]
    return min(times) if times else None


def best_peer(row: dict) -> tuple[str, float] | None:
    peers = {name: t for name, t in row["us"].items() if not name.startswith("ours")}
    return min(peers.items(), key=lambda kv: kv[1]) if peers else None


def gain(row: dict) -> float | None:
    mine, peer = ours(row), best_peer(row)
    return peer[1] / mine if mine and peer else None


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def providers(rows: list[dict]) -> list[str]:
    names = {name for row in rows for name in row["us"]}
    return sorted(names, key=lambda name: (not name.startswith("ours"), name))


def peer_table(rows: list[dict]) -> str:
    names = providers(rows)
    body = []
    for row in rows:
        peer, ratio = best_peer(row), gain(row)
        share = f"{row['roofline_us'] / ours(row):.3f}" if row.get("roofline_us") and ours(row) else None
        times = [f"{row['us'][name]:.2f}" if name in row["us"] else None for name in names]
        against = f"{ratio:.3f} ({peer[0]})" if ratio else None
        body.append([f"{row['m']} x {row['n']}", *times, row.get("roofline_us"), share, against])
    return table(["rows x N", *names, "roofline", "of roofline", "best peer / ours"], body)


def summary_line(rows: list[dict]) -> str:
    ratios = [g for g in map(gain, rows) if g]
    if not ratios:
        return ""
    return f"Best peer over ours: geometric mean {geometric_mean(ratios):.3f}, worst shape {min(ratios):.3f}."


def section(record: dict, title: str, op: str, mode: str, note: str, dtype: str = "bf16") -> str:
    rows = select(record, op, mode, dtype)
    if not rows:
        return ""
    return f"## {title}\n\n{note} Microseconds per launch. {summary_line(rows)}\n\n{peer_table(rows)}\n"


def published_table(record: dict) -> str:
    rows = [r for r in select(record, FUSED, "kernel") if r["m"] == 4096 and r["n"] in PUBLISHED["n"]]
    if not rows:
        return ""
    body = []
    for row in rows:
        at = PUBLISHED["n"].index(row["n"])
        theirs = [PUBLISHED[gpu][at] for gpu in ("H200", "H20", "B200")]
        mine = ours(row)
        body.append(
            [
                row["n"],
                f"{mine:.2f}" if mine else None,
                *theirs,
                f"{theirs[0] / mine:.3f}" if mine else None,
            ]
        )
    head = ["N", "ours here", "published H200", "published H20", "published B200", "published H200 / ours"]
    return (
        "## Batch 4096, fused add, kernel time alone\n\nKernel durations from CUPTI beside the columns that "
        f"hp_rms_norm publishes (theirs).\n\n{table(head, body)}\n"
    )


def bandwidth_table(record: dict) -> str:
    rows = [r for r in select(record, "rms_norm", "cold", "fp16") if r["m"] == 4096]
    if not rows:
        return ""
    body = []
    for row in rows:
        rate = lambda us, row=row: 2 * row["m"] * row["n"] * 2 / us / 1e3  # noqa: E731
        mine, eager = ours(row), row["us"].get("eager")
        body.append(
            [row["n"], f"{rate(mine):.0f}" if mine else None, f"{rate(eager):.0f}" if eager else None,
             f"{eager / mine:.2f}x" if mine and eager else None]
        )  # fmt: skip
    return (
        "## 4096 tokens, fp16, against eager PyTorch\n\nBytes read once and written once, over time.\n\n"
        + table(["N", "ours GB/s", "eager PyTorch GB/s", "speed-up"], body)
        + "\n"
    )


def fp32_table(record: dict) -> str:
    rows = [r for r in select(record, "rms_norm", "hot", "fp32")]
    if not rows:
        return ""
    return f"## fp32 shapes\n\nOne buffer, graph of launches, microseconds.\n\n{peer_table(rows)}\n"


def hf_table(record: dict) -> str:
    if not record["hf"]:
        return ""
    names = list(record["hf"][0]["tokens_per_s"])
    body = []
    for row in record["hf"]:
        cells = [
            f"{row['tokens_per_s'][n]:.0f} ({row['ratio_to_stock'][n]:.3f}x)" if n in row["tokens_per_s"] else None
            for n in names
        ]
        body.append([f"{row['model']}, {row['layers']} layers", row["mode"], row["work"], *cells])
    return (
        "## End to end in Hugging Face transformers\n\nTokens per second, medians of alternating rounds on one set of "
        "random weights; `removed` has no norms at all (adds stay) and is a ceiling, not a model.\n\n"
        + table(["model", "mode", "work", *names], body)
        + "\n"
    )


def plot_roofline(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rmsnorm_patch"
    import matplotlib.pyplot as plt

    rows = [r for r in select(record, FUSED, "cold") if r["m"] == 4096 and r["roofline_us"]]
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for name in providers(rows):
        if name == "eager":
            continue
        points = [(r["n"], r["roofline_us"] / r["us"][name]) for r in rows if name in r["us"]]
        mine = name.startswith("ours")
        axes.plot(*zip(*points, strict=True), marker="o" if mine else ".", lw=2.2 if mine else 1, label=name)
    axes.axhline(1.0, color="grey", lw=0.8, ls="--")
    axes.set(xscale="log", xlabel="N (hidden size)", ylabel="fraction of same-traffic copy", ylim=(0.5, 1.1))
    axes.set_xscale("log", base=2)
    axes.set_title(f"Fused residual-add + RMSNorm, 4096 rows, bf16, {record['device']['name']}", fontsize=10)
    axes.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot_decode(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rmsnorm_patch"
    import matplotlib.pyplot as plt

    rows = select(record, FUSED, "chain")
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for m in sorted({r["m"] for r in rows}):
        points = [(r["n"], gain(r)) for r in rows if r["m"] == m and gain(r)]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{m} rows")
    axes.axhline(1.0, color="grey", lw=0.8, ls="--")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="N (hidden size)", ylabel="best peer's time / ours")
    axes.set_title(f"Decode: dependent chain of fused add + RMSNorm, bf16, {record['device']['name']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page(record: dict, name: str) -> str:
    device = record["device"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    tests = record["tests"] or {"passed": 0, "failed": 0, "skipped": 0}
    parts = [
        f"# Results on {device['name']}\n\nGenerated from `records/{name}` by `scripts/results.py`; code digest "
        f"`{record['digest'][:16]}`. {versions}. GPU tests: {tests['passed']} passed, {tests['failed']} failed, "
        f"{tests['skipped']} skipped.\n\nEach row is one run: every provider was checked against fp64 before it was "
        "timed, and the roofline is a copy of the same bytes in the same run.\n",
        "![fraction of roofline](results_roofline.svg)\n\n![decode](results_decode.svg)\n",
        section(record, "Prefill, fused add", FUSED, "cold", "Buffers rotate through ten times the L2."),
        section(record, "Prefill, plain norm", "rms_norm", "cold", "Buffers rotate through ten times the L2."),
        section(record, "Decode, dependent chain", FUSED, "chain", "Each launch reads what the one before wrote."),
        section(record, "One hot buffer", FUSED, "hot", "Everything stays in L2."),
        section(record, "Host cost of one eager call", FUSED, "host", "Outputs allocated where the API is functional."),
        section(record, "Host cost of one eager plain norm", "rms_norm", "host", "Output allocated."),
        published_table(record),
        bandwidth_table(record),
        fp32_table(record),
        hf_table(record),
    ]
    return "\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    args = parser.parse_args()
    record = json.loads(args.record.read_text())
    (DOCS / "results.md").write_text(page(record, args.record.name))
    plot_roofline(record, DOCS / "results_roofline.svg")
    plot_decode(record, DOCS / "results_decode.svg")
    print("docs/results.md written")


if __name__ == "__main__":
    main()
