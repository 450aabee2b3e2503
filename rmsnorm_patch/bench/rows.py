"""Reading a record's kernel rows: choosing them, and comparing ours with the best peer at the same shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..numerics.contract import FUSED_ADD, RMS_NORM

FUSED, PLAIN, PAIR = FUSED_ADD.name, RMS_NORM.name, "rms_norm_pair"
OURS = ("ours", "ours_inplace")
PEERS = ("eager", "F.rms_norm", "inductor", "liger", "quack", "flashinfer", "flashinfer_cuda", "vllm")

Row = dict[str, Any]


def select(record: Row, op: str, mode: str, dtype: str = "bf16", variant: str = "") -> list[Row]:
    """Rows with a figure, by columns and then rows."""
    wanted = (op, mode, dtype, variant)
    rows = [
        row
        for row in record["kernels"]
        if (row["op"], row["mode"], row["dtype"], row.get("variant", "")) == wanted and row["us"]
    ]
    return sorted(rows, key=lambda row: (row["n"], row["m"]))


def ours(row: Row) -> float | None:
    """The better of our two forms: functional, and in place as half of the peers are."""
    times = [row["us"][name] for name in OURS if name in row["us"]]
    return min(times) if times else None


def best_peer(row: Row) -> tuple[str, float] | None:
    peers = {name: us for name, us in row["us"].items() if not name.startswith("ours")}
    return min(peers.items(), key=lambda pair: pair[1]) if peers else None


def gain(row: Row) -> float | None:
    """The best peer's time over ours."""
    mine, peer = ours(row), best_peer(row)
    return peer[1] / mine if mine and peer else None


def share(row: Row) -> float | None:
    """The same-traffic copy's time over ours."""
    mine, copy = ours(row), row.get("roofline_us")
    return copy / mine if mine and copy else None


def rate(row: Row, name: str | None = None) -> float | None:
    """TB/s of one provider (default: the better of ours) over the bytes that must move."""
    us = ours(row) if name is None else row["us"].get(name)
    return row["bytes"] / us / 1e6 if us and "bytes" in row else None


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def shape(row: Row) -> str:
    return f"{row['m']} x {row['n']}"


def worst(rows: Sequence[Row], of: Any) -> tuple[float, str] | None:
    """The smallest of(row) and its shape; None where no row has a figure."""
    values = [(value, shape(row)) for row in rows if (value := of(row)) is not None]
    return min(values) if values else None


def named(entry: str) -> tuple[str, str]:
    """(name, "module:function") of a --provider entry, "[name=]module:function"; without a name it is the entry."""
    name, _, path = entry.rpartition("=")
    return name or entry, path
