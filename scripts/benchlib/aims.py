"""The aims of this project, each with what a record holds on it. No figure is typed in here but the aims' own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rmsnorm_patch.bench.rows import (
    FUSED,
    PAIR,
    PEERS,
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
    worst,
)
from rmsnorm_patch.bench.suites import PREFILL_N

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
GPU = "NVIDIA H200"
"""The aims were set for it: what memory and L2 allow differs between GPUs."""
LONG_N = (65536, 131072, 262144)
FEW = ("decode-1", "decode-8", "decode-32")
QUANTISED_CHAIN = {
    f"{FUSED}_fp8_static": (1.2, 1.1),
    f"{FUSED}_fp8_token": (1.8, 1.3),
    f"{FUSED}_fp8_block": (2.0, 1.5),
    f"{FUSED}_fp8_block_columns": (2.0, 1.5),
    f"{FUSED}_fp8_block_both": (2.0, 1.5),
    f"{FUSED}_int8_token": (None, None),
}
"""Op -> the best peer's time over ours in a dependent chain: at 1 to 64 rows, and at 128 and 256."""
COLD = "bf16, 4096 rows, N = 1024 to 32768, cold"
FUSED_MEAN = f"fused add, {COLD}: mean against the best peer"
PLAIN_COPY = f"plain norm, {COLD}: N >= 4096 against a copy of the same bytes"
CHAIN_FEW = "fused add, dependent chain, 1 to 64 rows"
CHAIN_MANY = "fused add, dependent chain, 128 and 256 rows"
HOT = "fused add, 4096 rows, N = 1024 to 2048, hot"
ONE_LAUNCH = "q and k norm, 4096 tokens x (32 + 8) x 128, strided: one launch for both"
LONG = "rows of 65536, 131072 and 262144, both ops"
DTYPES = "fp16, fp32, fp32 weight, 1 + w, weightless: bytes per second over the bf16 kernel's"
TRITON = "Triton fallback, prefill, over the CUDA kernel"
PATCHED_AHEAD = "Hugging Face, patched against every other column (`removed` is a ceiling)"
TOKENS_8B = f"vLLM, Llama-8B shapes, {', '.join(FEW)}: tokens/s over the compiled default"
SHARE_8B = f"vLLM, Llama-8B shapes, {', '.join(FEW)}: share of norms' and adds' device time saved"
SHARE_1B = SHARE_8B.replace("8B", "1B")
ABOVE_THE_NORM = 0.4
"""Microseconds that quantising may add to a norm."""


def of_quantised(op: str, what: str) -> str:
    """The work of an aim of `op`. what: "cold: ...", from memory; "few: ..." or "more: ...", rows in a chain."""
    when, _, said = what.partition(": ")
    rows = {"cold": "4096 and 16384 rows, cold", "few": "1 to 64 rows, chain", "more": "128 and 256 rows, chain"}
    return f"{op.removeprefix(f'{FUSED}_')}, {rows[when]}: {said}"


COPY, PEER, ABOVE = "against a copy of the same bytes", "against the best peer", "above our bf16 norm"


@dataclass(frozen=True)
class Aim:
    """met: None where the record holds nothing to judge by, or not every peer and the aim is met without them.

    figure, asked: what was measured and what is asked for, where one number must reach another, or (`at_most`) must
    not exceed it.
    """

    work: str
    wanted: str
    measured: str
    met: bool | None
    figure: float | None = None
    asked: float | None = None
    at_most: bool = False

    def worse(self, than: float) -> bool:
        """Whether what was measured misses `than`."""
        return self.figure is not None and (self.figure > than if self.at_most else self.figure < than)

    @classmethod
    def least(cls, work: str, wanted: float, found: tuple[float, str] | None, unit: str = "x") -> Aim:
        """The worst of several figures must reach `wanted`."""
        text = f"at least {wanted:g}{unit}"
        if found is None:
            return cls(work, text, "not measured", None)
        return cls(work, text, f"{found[0]:.3f}{unit} ({found[1]})", found[0] >= wanted, found[0], wanted)

    def against(self, rows: list[Row]) -> Aim:
        """Open where a peer was timed at none of `rows`: it might have been the best."""
        absent = [peer for peer in PEERS if not any(peer in row["us"] for row in rows)]
        if not rows or not absent:
            return self
        measured = f"{self.measured}; not timed: {', '.join(absent)}"
        return replace(self, measured=measured, met=None if self.met else self.met)


def set_for(record: Row) -> bool:
    """Whether the aims are those of the record's GPU."""
    return bool(record["device"]["name"] == GPU)


def prefill(record: Row) -> list[Row]:
    return [row for row in select(record, FUSED, "cold") if row["m"] == 4096 and row["n"] in PREFILL_N]


def plain(record: Row) -> list[Row]:
    return [row for row in select(record, PLAIN, "cold") if row["m"] == 4096 and row["n"] in PREFILL_N]


def chain(record: Row, least: int, most: int) -> list[Row]:
    return [row for row in select(record, FUSED, "chain") if least <= row["m"] <= most]


def long_rows(record: Row) -> list[Row]:
    return [row for op in (FUSED, PLAIN) for row in select(record, op, "cold") if row["n"] in LONG_N]


def _throughput(record: Row) -> Iterator[Aim]:
    for name, rows in (("fused add", prefill(record)), ("plain norm", plain(record))):
        work = f"{name}, {COLD}"
        yield Aim.least(f"{work}: worst against the best peer", 0.99, worst(rows, gain)).against(rows)
        gains = [g for g in map(gain, rows) if g]
        mean = (geometric_mean(gains), f"geometric mean of {len(gains)} shapes") if gains else None
        yield Aim.least(f"{work}: mean against the best peer", 1.02, mean).against(rows)
        wide = [row for row in rows if row["n"] >= 4096]
        yield Aim.least(f"{work}: N >= 4096 against a copy of the same bytes", 0.985, worst(wide, share))


def _published(record: Row) -> Iterator[Aim]:
    theirs = PUBLISHED["H200"]
    rows = [row for row in select(record, FUSED, "kernel") if row["m"] == 4096 and str(row["n"]) in theirs]
    found = worst(rows, lambda row: theirs[str(row["n"])] / mine if (mine := ours(row)) else None)
    work = "fused add, 4096 rows, kernel time alone, against the column published for H200"
    if found is None or not set_for(record):
        yield Aim(work, "below every row", "not measured" if found is None else "another GPU", None)
        return
    text = f"published / ours {found[0]:.3f} at worst ({found[1]}), {len(rows)} of {len(theirs)} rows"
    yield Aim(work, "below every row", text, found[0] > 1 and len(rows) == len(theirs))


def _decode(record: Row) -> Iterator[Aim]:
    groups = (
        (CHAIN_FEW, 1.40, chain(record, 1, 64)),
        (CHAIN_MANY, 1.12, chain(record, 128, 256)),
        (HOT, 1.05, select(record, FUSED, "hot")),
    )
    for work, wanted, rows in groups:
        yield Aim.least(work, wanted, worst(rows, gain)).against(rows)


def _query_key(record: Row) -> Iterator[Aim]:
    rows = [row for mode in ("cold", "hot") for row in select(record, PAIR, mode) if row["m"] == 4096]

    def against(name: str) -> Callable[[Row], float | None]:
        def ratio(row: Row) -> float | None:
            peer = best_peer(row)
            return peer[1] / row["us"][name] if peer and name in row["us"] else None

        return ratio

    each = ONE_LAUNCH.replace("one launch for both", "a launch each")
    yield Aim.least(each, 1.0, worst(rows, against("ours_two_launches"))).against(rows)
    yield Aim.least(ONE_LAUNCH, 1.3, worst(rows, against("ours"))).against(rows)


def _long(record: Row) -> Iterator[Aim]:
    rows = long_rows(record)
    yield Aim.least(LONG, 1.0, worst(rows, gain)).against(rows)


def variant_rates(record: Row) -> list[tuple[Row, float]]:
    """Every row of our kernels alone, with its bytes per second over the bf16 kernel's on as many bytes or more."""
    found = []
    for row in record["kernels"]:
        base = bf16_like(record, row)
        mine, its = rate(row), rate(base) if base else None
        if mine and its:
            found.append((row, mine / its))
    return found


def bf16_like(record: Row, row: Row) -> Row | None:
    if row["mode"] == "cold" and row.get("variant"):
        rows = select(record, row["op"], "cold", "bf16", "one rounding")
        return next((base for base in rows if base["m"] == row["m"] and base is not row), None)
    if (row["op"], row["mode"], row["dtype"]) == (PLAIN, "hot", "fp32"):
        wanted = (row["m"], 2 * row["n"])
        return next((b for b in select(record, PLAIN, "hot") if (b["m"], b["n"]) == wanted), None)
    return None


def _dtypes(record: Row) -> Iterator[Aim]:
    asked = {"one rounding", "fp32 weight", "1+w", "weightless", ""}
    rates = [(ratio, row) for row, ratio in variant_rates(record) if row.get("variant", "") in asked]
    found = min(rates, key=lambda pair: pair[0], default=None)
    label = found and " ".join(
        filter(None, [found[1]["op"], found[1]["dtype"], found[1].get("variant", ""), shape(found[1])])
    )
    yield Aim.least(DTYPES, 0.97, (found[0], label) if found else None)


def _host(record: Row) -> Iterator[Aim]:
    (row,) = select(record, FUSED, "host")[:1] or ({"us": {}},)
    for peer, limit in (("quack", 0.75), ("F.rms_norm", 0.6)):
        name = "quack" if peer == "quack" else "add + F.rms_norm"
        work = f"host cost of an eager fused add, output allocated, over {name}"
        if "ours" not in row["us"] or peer not in row["us"]:
            yield Aim(work, f"at most {limit:g}x", "not measured", None)
            continue
        mine, theirs = row["us"]["ours"], row["us"][peer]
        yield Aim(work, f"at most {limit:g}x", f"{mine / theirs:.3f}x ({mine:.2f} us)", mine <= limit * theirs)


def _triton(record: Row) -> Iterator[Aim]:
    def ratio(row: Row) -> float | None:
        return row["us"]["ours"] / row["us"]["ours_triton"] if {"ours", "ours_triton"} <= row["us"].keys() else None

    yield Aim.least(TRITON, 0.95, worst(prefill(record) + plain(record), ratio))


def _end_to_end(record: Row) -> Iterator[Aim]:
    rows = {row["work"]: row for row in record["hf"] if (row["model"], row["mode"]) == ("llama-8b", "eager")}
    for work, wanted in (("decode 1", 1.38), ("decode 32", 1.38), ("prefill 4x2048", 1.10)):
        row = rows.get(work)
        patched = row and row["ratio_to_stock"].get("patched")
        found = (patched, f"{row['layers']} layers") if row and patched else None
        aim = Aim.least(f"Hugging Face, Llama-8B shapes, {work}, over stock", wanted, found)
        spans = row and overlap(row, "stock")
        yield replace(aim, measured=f"{aim.measured}; rounds overlap: {spans}", met=None) if spans else aim
    found = nearest_column(record)
    if found is None:
        yield Aim(PATCHED_AHEAD, "ahead", "not measured", None)
        return
    ratio, row, name = found
    measured, spans = f"{ratio:.3f}x at worst ({row['work']}, {name})", overlap(row, name)
    yield Aim(
        PATCHED_AHEAD,
        "ahead",
        f"{measured}; rounds overlap: {spans}" if spans else measured,
        met=None if spans else ratio > 1,
    )


def overlap(row: Row, name: str) -> str | None:
    """What the rounds of the patched model and those of `name` span, where they overlap: nobody is ahead then."""
    spread = row.get("spread", {})
    if not {name, "patched"} <= spread.keys():
        return None
    (low, high), (its_low, its_high) = spread["patched"], spread[name]
    text = f"{low:.0f} to {high:.0f} tokens/s, {name} {its_low:.0f} to {its_high:.0f}"
    return text if low <= its_high and its_low <= high else None


def nearest_column(record: Row) -> tuple[float, Row, str] | None:
    """(patched over it, row, column) of the column that is worst for the patched model; `removed` is none.

    One that is ahead in every round goes first, then those whose rounds overlap with the patched model's.
    """
    others = [
        (row["tokens_per_s"]["patched"] / rate, row, name)
        for row in record["hf"]
        if (row["model"], row["mode"]) == ("llama-8b", "eager") and "patched" in row["tokens_per_s"]
        for name, rate in row["tokens_per_s"].items()
        if name not in ("patched", "removed")
    ]

    def order(other: tuple[float, Row, str]) -> tuple[bool, bool, float]:
        ratio, *where = other
        apart = overlap(*where) is None
        return not (apart and ratio <= 1), apart, ratio

    return min(others, key=order, default=None)


def _jit(record: Row) -> Iterator[Aim]:
    rows = record.get("jit", ())
    for what, key, wanted in (("cold", "cold_ms", 500), ("from the disk", "disk_ms", 30)):
        kernels = [
            (max(row[key]), min(row[key]), f"{row['op']}, N = {row['n']}")
            for row in rows
            if row["what"] in ("kernel", "first call")
        ]
        work = f"JIT, kernels of a first call {what}"
        if not kernels:
            yield Aim(work, f"under {wanted} ms", "not measured", None)
            continue
        slowest, least, where = max(kernels, key=lambda kernel: (kernel[1] >= wanted, kernel[0]))
        measured, met = f"{slowest:.1f} ms at worst ({where})", slowest < wanted
        if least < wanted <= slowest:  # the host was busy in one of them
            measured, met = f"{measured}; repeats overlap: {least:.1f} to {slowest:.1f} ms", None
        yield Aim(work, f"under {wanted} ms", measured, met)


def engines(record: Row) -> dict[tuple[str, str, str], Row]:
    """By shape, variant and case. Of engines with a process each and engines that share weights the latter count."""
    ordered = sorted(record["vllm"], key=lambda row: row["process"] == "shared")
    return {(row["shape"], row["variant"], row["case"]): row for row in ordered}


def overlapping(rows: dict[tuple[str, str, str], Row], case: str) -> str | None:
    """What the rounds of the 8B engine span in tokens a second, and stock's, where they overlap: nobody is ahead then.

    They have the host's time too; shares are of the device's.
    """
    spans = [rows.get(("llama-8b", variant, case), {}).get("tokens_per_s_range") for variant in ("ir", "stock")]
    if None in spans:
        return None
    (low, high), (its_low, its_high) = spans  # type: ignore[misc]
    text = f"{low:.0f} to {high:.0f} tokens/s, stock {its_low:.0f} to {its_high:.0f}"
    return text if low <= its_high and its_low <= high else None


def _engines(record: Row) -> Iterator[Aim]:
    rows = engines(record)

    def least(model: str, variant: str, cases: tuple[str, ...], key: str) -> tuple[float, str] | None:
        found = [(rows.get((model, variant, case), {}).get(key), case) for case in cases]
        return None if any(value is None for value, _ in found) else min(found)  # type: ignore[return-value]

    many = ("decode-256", "prefill")
    for work, cases, wanted in (
        (TOKENS_8B, FEW, 1.01),
        (TOKENS_8B.replace(", ".join(FEW), ", ".join(many)), many, 0.997),
    ):
        clear = tuple(case for case in cases if not overlapping(rows, case))
        found = least("llama-8b", "ir", clear, "speedup") if clear else None
        if not (found and found[0] < wanted):  # a case that misses it in every round goes before the others
            found = least("llama-8b", "ir", cases, "speedup")
        aim, spans = Aim.least(work, wanted, found), found and overlapping(rows, found[1])
        yield replace(aim, measured=f"{aim.measured}; rounds overlap: {spans}", met=None) if spans else aim
    reordered = SHARE_1B.replace(":", " with `reorder`:")
    shares = ((SHARE_8B, "llama-8b", "ir"), (SHARE_1B, "llama-1b", "ir"))
    for work, model, variant in (*shares, (reordered, "llama-1b", "ir-reorder")):
        yield Aim.least(work, 0.5, least(model, variant, FEW, "share_recovered"), unit="")


def _above_the_norm(record: Row, rows: list[Row]) -> tuple[float, str] | None:
    """The most that quantising adds to our bf16 norm of as many rows in a chain, us, and its shape."""
    plain_us = {(row["m"], row["n"]): ours(row) for row in chain(record, 1, 64)}
    added = [
        (mine - norm, shape(row))
        for row in rows
        if (mine := ours(row)) and (norm := plain_us.get((row["m"], row["n"])))
    ]
    return max(added) if added else None


def quantised(record: Row) -> Iterator[Aim]:
    """Those of norms that write quantised rows; their peers are as many as a scheme has."""
    for op, (few, more) in QUANTISED_CHAIN.items():
        cold = select(record, op, "cold")
        many = [row for row in select(record, op, "chain") if row["m"] in (128, 256)]
        small = [row for row in select(record, op, "chain") if row["m"] <= 64]
        yield Aim.least(of_quantised(op, f"cold: {COPY}"), 0.97, worst(cold, share))
        yield Aim.least(of_quantised(op, f"cold: {PEER}"), 1.0, worst(cold, gain))
        if few:
            yield Aim.least(of_quantised(op, f"few: {PEER}"), few, worst(small, gain))
            yield Aim.least(of_quantised(op, f"more: {PEER}"), more, worst(many, gain))
        yield _above(of_quantised(op, f"few: {ABOVE}"), _above_the_norm(record, small))


def _above(work: str, added: tuple[float, str] | None) -> Aim:
    wanted = f"at most {ABOVE_THE_NORM} us"
    if added is None:
        return Aim(work, wanted, "not measured", None)
    text, met = f"{added[0]:.2f} us ({added[1]})", added[0] <= ABOVE_THE_NORM
    return Aim(work, wanted, text, met, added[0], ABOVE_THE_NORM, at_most=True)


def of(record: Row) -> list[Aim]:
    """Every aim but those of quantised rows, in the order in which they were set."""
    groups = (_throughput, _published, _decode, _query_key, _long, _dtypes, _host, _triton, _end_to_end, _engines, _jit)
    return [aim for group in groups for aim in group(record)]
