"""Engines that were started several times: what each start gained."""

from __future__ import annotations

from statistics import median

from benchlib.pages import figure, table
from benchlib.vllm_engine import RECORDED

from rmsnorm_patch.bench.rows import Row

STARTED = ("ir", "oot", "oot-noir")
"""Variants whose starts are compared with stock's."""

HEAD = """
## Several starts

Where operands lie in memory stays as it is for the life of an engine, so engines are judged over several starts. Time
against stock's of the same start: of a decode step on the device, of a token of prefill. Negative is faster.

"""


def starts_text(record: Row) -> str:
    """A section with the starts of each engine that was started twice; "" where none was."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for start, rows in _starts(record).items():
        shared = {(row["shape"], row["case"], row["variant"]): row for row in rows if row["process"] == "shared"}
        for (shape, case, variant), row in shared.items():
            stock = shared.get((shape, case, "stock"))
            if stock and variant in STARTED:
                found.setdefault((shape, variant, case), {})[start] = _changed(row, stock)
    several = {key: by_start for key, by_start in sorted(found.items()) if len(by_start) > 1}
    if not several:
        return ""
    columns = sorted({start for by_start in several.values() for start in by_start})
    body = [
        [*key, *(figure(by_start.get(start), "+.1f") for start in columns), f"{median(by_start.values()):+.1f}"]
        for key, by_start in several.items()
    ]
    return HEAD + table(["shape", "engine", "work", *(f"start {start}, %" for start in columns), "median, %"], body)


def _changed(row: Row, stock: Row) -> float:
    """Percent of stock's time."""
    if row["case"] == "prefill":
        return 100 * (stock["tokens_per_s"] / row["tokens_per_s"] - 1)
    return 100 * (row["step_us"] / stock["step_us"] - 1)


def _starts(record: Row) -> dict[int, list[Row]]:
    """The rows of each start, from 1. A variant that has another name now takes the place of what bore it."""
    renamed = {(row["shape"], row["process"], RECORDED.get(row["variant"])) for row in record["vllm"]}
    first = [
        {**row, "variant": RECORDED.get(row["variant"], row["variant"])}
        for row in record["vllm"]
        if (row["shape"], row["process"], row["variant"]) not in renamed
    ]
    starts: dict[int, list[Row]] = {1: first}
    for row in record.get("vllm_starts", ()):
        starts.setdefault(row["start"], []).append(row)
    return starts
