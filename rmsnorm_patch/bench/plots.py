"""SVG plots of benchmark rows; small, and the same file for the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "ours": "#c1121f",
    "ours_inplace": "#e36414",
    "ours_triton": "#8f2d56",
    "ours_two_launches": "#e36414",
    "quack": "#1d4e89",
    "liger": "#2a9d8f",
    "inductor": "#6a994e",
    "flashinfer": "#7b2cbf",
    "flashinfer_cuda": "#b388eb",
    "vllm": "#b08900",
    "F.rms_norm": "#8d99ae",
    "eager": "#bdbdbd",
}


def _axes(width: float = 8.0):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "rmsnorm_patch", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, 4.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.4, alpha=0.6)
    return figure, axes


def _finish(figure: Any, axes: Any, rows: Sequence[dict], ylabel: str, title: str, path: Path, legend: int = 7) -> None:
    """The columns of `rows` below, the texts around; legend: its font size."""
    import matplotlib.pyplot as plt

    _columns(axes, rows)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.legend(fontsize=legend, ncol=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _line(axes: Any, name: str, points: Sequence[tuple[float, float]]) -> None:
    mine = name.startswith("ours")
    style = {"marker": "o" if mine else ".", "ms": 4, "lw": 2.0 if mine else 1.0}
    axes.plot(*zip(*points, strict=True), label=name, color=COLOURS.get(name), zorder=3 if mine else 2, **style)


def _columns(axes: Any, rows: Sequence[dict]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted({row["n"] for row in rows if row["n"] & (row["n"] - 1) == 0})
    axes.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    axes.set_xlabel("columns of a row (hidden size)")


def names_of(rows: Sequence[dict]) -> list[str]:
    return sorted({name for row in rows for name in row["us"]}, key=lambda name: (not name.startswith("ours"), name))


def roofline(rows: Sequence[dict], title: str, path: Path, skip: Sequence[str] = ("eager", "F.rms_norm")) -> None:
    """Time of the same-traffic copy over each provider's: 1.0 is the copy."""
    figure, axes = _axes()
    for name in names_of(rows):
        points = [(r["n"], r["roofline_us"] / r["us"][name]) for r in rows if name in r["us"] and r["roofline_us"]]
        if name not in skip and points:
            _line(axes, name, points)
    axes.axhline(1.0, color="black", lw=0.8, ls="--")
    _finish(figure, axes, rows, "speed relative to a copy of the same bytes", title, path)


def gains(rows: Sequence[dict], gain: Any, title: str, path: Path) -> None:
    """Best peer's time over ours, a line for each number of rows."""
    figure, axes = _axes()
    for m in sorted({row["m"] for row in rows}):
        points = [(row["n"], gain(row)) for row in rows if row["m"] == m and gain(row)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=f"{m} row{'s' * (m > 1)}")
    axes.axhline(1.0, color="black", lw=0.8, ls="--")
    _finish(figure, axes, rows, "best peer's time / ours", title, path, legend=8)


def times(rows: Sequence[dict], path: Path) -> None:
    """Microseconds of every provider over the columns, for the first op, mode, dtype and number of rows that came."""
    if not rows:
        return
    first = tuple(rows[0][key] for key in ("op", "mode", "dtype", "m"))
    chosen = [row for row in rows if tuple(row[key] for key in ("op", "mode", "dtype", "m")) == first]
    figure, axes = _axes()
    for name in names_of(chosen):
        _line(axes, name, [(row["n"], row["us"][name]) for row in chosen if name in row["us"]])
    axes.set_yscale("log")
    title = " ".join(map(str, (*first[:3], f"{first[3]} rows")))
    _finish(figure, axes, chosen, "microseconds", title, path)
