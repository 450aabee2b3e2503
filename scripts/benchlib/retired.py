"""Aims that were given up: the reason, the limit that a record's own rows show, and what is held in their place.

An aim is shown as retired while it is missed, the record shows the limit, the limit lies below the aim, and what is
held is reached. Otherwise it is met, missed or open as any other: a figure that falls is seen, and so is a limit that
is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rmsnorm_patch.bench.rows import FUSED, PAIR, PLAIN, Row, best_peer, ours, select, shape, share

from .aims import CHAIN_FEW, FEW, HOT, ONE_LAUNCH, PATCHED_AHEAD, PLAIN_COPY, SHARE_1B, Aim, nearest_column, set_for


@dataclass(frozen=True)
class Limit:
    """What can be had. figure: in the aim's unit; None where the limit has another one, and says that itself."""

    text: str
    figure: float | None = None


@dataclass(frozen=True)
class Retired:
    """held: the least figure, in the aim's unit, below which the aim is missed again. because: the aim's own page has
    what was tried."""

    held: float
    because: str
    limit: Callable[[Row], Limit | None]


def _row(record: Row, op: str, mode: str, m: int, n: int) -> Row | None:
    return next((row for row in select(record, op, mode) if (row["m"], row["n"]) == (m, n)), None)


def _chain(record: Row) -> Limit | None:
    """A launch of one short row, and the bytes at the rate of a copy that stays in the L2."""
    row, short = _row(record, FUSED, "chain", 64, 8192), _row(record, FUSED, "chain", 1, 2048)
    hot = _row(record, FUSED, "hot", 4096, 1024)
    peer, launch = row and best_peer(row), short and ours(short)
    if not (row and peer and launch and hot and hot.get("roofline_us") and "bytes" in row):
        return None
    moved = row["bytes"] / (hot["bytes"] / hot["roofline_us"])
    found = peer[1] / (launch + moved)
    text = (
        f"{found:.3f}x ({shape(row)}): one row of 2048 takes {launch:.2f} us in the chain, the bytes {moved:.2f} us at "
        f"the rate of a copy in the L2, {peer[0]} {peer[1]:.2f} us"
    )
    return Limit(text, found)


def _copy_of(op: str, mode: str, m: int, n: int) -> Callable[[Row], Limit | None]:
    """A kernel that takes as long as a copy of the same bytes."""

    def limit(record: Row) -> Limit | None:
        row = _row(record, op, mode, m, n)
        peer, copy = row and best_peer(row), row and row.get("roofline_us")
        if not (row and peer and copy):
            return None
        found = peer[1] / copy
        text = f"{found:.3f}x ({shape(row)}): a copy of the same bytes takes {copy:.2f} us, {peer[0]} {peer[1]:.2f} us"
        return Limit(text, found)

    return limit


def _nearest_peer(record: Row) -> Limit | None:
    """The longest plain rows: how near the best peer comes to the copy."""
    row = _row(record, PLAIN, "cold", 4096, 32768)
    peer, copy, mine = row and best_peer(row), row and row.get("roofline_us"), row and share(row)
    if not (row and peer and copy and mine):
        return None
    return Limit(f"{copy / peer[1]:.3f}x is the nearest peer ({peer[0]}, {shape(row)})", copy / peer[1])


def _rounds_overlap(record: Row) -> Limit | None:
    """Prefill beside the best column: rounds that overlap put nobody ahead."""
    _, row, name = nearest_column(record) or (None, {}, "")
    spread = row.get("spread", {})
    if name not in spread or not row["work"].startswith("prefill"):
        return None
    (low, high), (its_low, its_high) = spread["patched"], spread[name]
    text = f"rounds overlap: {low:.0f} to {high:.0f} tokens/s, {name} {its_low:.0f} to {its_high:.0f}"
    return Limit(text) if low <= its_high and its_low <= high else None


def _reordered(record: Row) -> Limit | None:
    """Shares with sums in another order, in the same engines."""
    found = {
        row["case"]: row["share_recovered"]
        for row in record["vllm"]
        if (row["shape"], row["variant"]) == ("llama-1b", "ir-reorder") and row.get("share_recovered") is not None
    }
    if any(case not in found for case in FEW):
        return None
    return Limit(f"with `reorder`, which may change bits, {min(found[case] for case in FEW):.3f}")


RETIRED: dict[str, Retired] = {
    CHAIN_FEW: Retired(
        1.27,
        "64 rows of 8192 are bound by the L2 and by the hand-over from launch to launch; no schedule tried was faster "
        "([what was tried](decisions/kernels.md#clusters-for-a-few-rows))",
        _chain,
    ),
    HOT: Retired(
        1.0,
        "rows, residual and results do not stay in the L2 together, so memory bounds it "
        "([decisions](decisions/kernels_measured.md#hot-operands))",
        _copy_of(FUSED, "hot", 4096, 2048),
    ),
    ONE_LAUNCH: Retired(
        1.1,
        "it would have to be faster than a copy of its bytes "
        "([decisions](decisions/benchmarks.md#q-and-k-in-one-launch-13x-is-out-of-reach))",
        _copy_of(PAIR, "cold", 4096, 128),
    ),
    PLAIN_COPY: Retired(
        0.975,
        "a sweep of schedules found none that is nearer, and where operands lie moves the time by more than what is "
        "missing ([decisions](decisions/kernels_measured.md#plain-norms-a-sweep-of-schedules))",
        _nearest_peer,
    ),
    PATCHED_AHEAD: Retired(
        0.99,
        "both wait for the device in prefill, where norms are a small part of the time "
        "([decisions](decisions/kernels_measured.md#what-the-record-misses))",
        _rounds_overlap,
    ),
    SHARE_1B: Retired(
        0.2,
        "cuBLAS splits one of 1B's products unevenly and the other not at all; no norm can add up such parts with no "
        "bit changed ([decisions](decisions/products_in_parts.md#uneven-splits-cannot-be-had))",
        _reordered,
    ),
}
"""By the aim's work."""


def of(aim: Aim, record: Row) -> tuple[Retired, Limit] | None:
    """Why `aim` is retired, and the limit in this record; None where it is not, or was not set for
    this GPU."""
    known = RETIRED.get(aim.work)
    if known is None or not set_for(record) or aim.met is not False or aim.figure is None or aim.least_figure is None:
        return None
    limit = known.limit(record)
    reached = limit is not None and limit.figure is not None and limit.figure >= aim.least_figure
    return None if limit is None or reached or aim.figure < known.held else (known, limit)
