"""`rmsnorm-patch bench-kernels`: what is asked for, and how rows are shown."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..bench.rows import Row, best_peer, gain, ours, share
from ..errors import KernelBuildError, UnsupportedInput
from .output import Output

SITE = "rmsnorm-patch bench-kernels"


@dataclass(frozen=True)
class Request:
    """shapes: fields of `bench.runs.Shapes`, those that were not given empty."""

    suites: tuple[str, ...]
    shapes: dict[str, Any]
    only: tuple[str, ...]
    providers: tuple[str, ...]
    replays: int
    seconds: float

    def arguments(self) -> list[str]:
        """The command line that asks for the same cases."""
        words = ["bench-kernels"]
        named = {"suite": self.suites, "only": self.only, "provider": self.providers, **self.shapes}
        for name, value in named.items():
            option = "--row-dtype" if name == "dtype" else f"--{name}"  # --dtype is that of a model
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [option, str(one)] if one else []
        return words


def run(
    out: Output, request: Request, warm_jobs: int, warm_slice: str, rows_file: Path | None, plot: Path | None
) -> None:
    """Raises KernelBuildError without a CUDA device, UnsupportedInput where a plot lacks matplotlib."""
    if not torch.cuda.is_available():
        step = "run it on one; `rmsnorm-patch env` lists the devices of this machine"
        raise KernelBuildError(SITE, "no CUDA device", "a machine with an NVIDIA GPU", step)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedInput("--plot", "no package matplotlib", "a plot where it is installed", "install matplotlib")
    from ..bench import plots, runs, warm

    given = {name: value for name, value in request.shapes.items() if value}
    try:
        todo = runs.chosen(request.suites, runs.Shapes(**given), request.only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows: list[Row] = []
    with torch.no_grad():
        if warm_slice:
            warm.compile_slice(todo, *map(int, warm_slice.split("/")))
            return
        if warm_jobs:
            _warm(out, request, warm_jobs)
        timed = runs.rows_of(todo, request.providers, request.replays, request.seconds, out.warn)
        with out.progress(len(todo), "timing") as step:
            for row in timed:
                rows.append(row)
                if rows_file is not None:
                    rows_file.write_text(json.dumps(rows, indent=1))
                step(f"{row['op']} {row['mode']} {row['m']} x {row['n']}")
    out.document({**_machine(), "summary": runs.summary(rows), "rows": rows})
    if plot is not None:
        plots.times(rows, plot)
    if not out.as_json:
        tell(out.console, rows, plot)


def tell(console: Console, rows: Sequence[Row], plot: Path | None) -> None:
    """What was right, the times, what has none and why, and where the plot is."""
    from ..bench import runs

    console.print(runs.checked(rows), markup=False, highlight=False)
    console.print(kernel_table(rows))
    drawn = [] if plot is None else [f"drawn: {plot}"]
    for line in (*_failures(rows), *runs.summary(rows), *drawn):
        console.print(line, markup=False, highlight=False)


def _warm(out: Output, request: Request, jobs: int) -> None:
    from ..bench import warm

    begun = time.monotonic()
    with out.progress(None, f"compiling in {jobs} processes"):
        failed = warm.start(jobs, request.arguments())
    out.progress_console.print(f"compiled in {time.monotonic() - begun:.0f} s", style="dim")
    if failed:
        out.warn(f"{failed} of {jobs} compiling processes ended early; the timing compiles what is missing")


def _machine() -> dict[str, Any]:
    from ..bench.versions import versions

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": {"name": properties.name, "capability": [properties.major, properties.minor]},
        "versions": versions(),
    }


def kernel_table(rows: Sequence[Row]) -> Table:
    """Microseconds a launch; a copy of the same bytes is the limit where memory decides. A shape stands under its work,
    and the others in one cell, the best peer first, so that no name is parted on a screen of 80 columns."""
    table = Table(title="microseconds a launch, median", title_justify="left")
    for name in ("work, rows x columns", "ours", "the others", "peer /\nours", "copy /\nours"):
        table.add_column(name, justify="left" if name in ("work, rows x columns", "the others") else "right")
    for row in rows:
        mine, peer, ratio, limit = ours(row), best_peer(row), gain(row), share(row)
        others = [(us, name) for name, us in row["us"].items() if us != mine and (peer is None or name != peer[0])]
        first = [] if peer is None else [(peer[1], peer[0])]
        work = " ".join(filter(None, (row["op"], row["mode"], row["dtype"], row["variant"])))
        table.add_row(
            f"{work}\n{row['m']} x {row['n']}",
            "-" if mine is None else f"{mine:.2f}",
            "\n".join(f"{name} {us:.2f}" for us, name in [*first, *sorted(others)]) or "-",
            "-" if ratio is None else f"{ratio:.3f}",
            "-" if limit is None else f"{limit:.3f}",
        )
    return table


def _failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['op']} {row['mode']} {row['m']} x {row['n']}: no figure for {name}: {why}"
        for row in rows
        for name, why in row["failed"].items()
    ]
