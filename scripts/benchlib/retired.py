"""Why aims are missed that were given up.

A given-up aim has a reason, the limit that a record's own rows show, and what is held in its place. It is shown as
retired while it is missed, the record shows the limit, the limit misses the aim too, and what is held is reached.
Otherwise it is met, missed or open as any other: a figure that falls is seen, and so is a limit that is gone. A GPU for
which no aim was set has reasons and limits of its own rows, and nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rmsnorm_patch.bench.rows import (
    FUSED,
    PAIR,
    PLAIN,
    Row,
    best_peer,
    gain,
    geometric_mean,
    ours,
    select,
    shape,
    share,
)

from .aims import (
    ABOVE,
    CHAIN_FEW,
    CHAIN_MANY,
    COPY,
    DTYPES,
    FEW,
    FUSED_MEAN,
    HOT,
    LONG,
    ONE_LAUNCH,
    PEER,
    PLAIN_COPY,
    SHARE_1B,
    SHARE_8B,
    TRITON,
    Aim,
    bf16_like,
    chain,
    engines,
    long_rows,
    of_quantised,
    plain,
    prefill,
    set_for,
    variant_rates,
)


@dataclass(frozen=True)
class Limit:
    """What can be had. figure: in the aim's unit; None where the limit has another one, and says that itself."""

    text: str
    figure: float | None = None


LimitOf = Callable[[Row], "Limit | None"]


@dataclass(frozen=True)
class Retired:
    """held: the figure, in the aim's unit, that counts in its place. because: the aim's own page has what was tried."""

    held: float
    because: str
    limit: LimitOf


@dataclass(frozen=True)
class Known:
    """What a page says of a missed aim. word: in place of "no". held: None where no aim was set for the GPU."""

    word: str
    because: str
    held: float | None
    limit: str


def _row(record: Row, op: str, mode: str, m: int, n: int) -> Row | None:
    return next((row for row in select(record, op, mode) if (row["m"], row["n"]) == (m, n)), None)


def _slowest(rows: list[Row], measure: Callable[[Row], float | None]) -> Row | None:
    """The row whose `measure` is least."""
    judged = [row for row in rows if measure(row) is not None]
    return min(judged, key=lambda row: measure(row) or 0.0, default=None)


def _chain(least: int, most: int) -> LimitOf:
    """A launch of one short row, and the bytes at the rate of a copy that stays in the L2."""

    def limit(record: Row) -> Limit | None:
        row, short = _slowest(chain(record, least, most), gain), _row(record, FUSED, "chain", 1, 2048)
        hot = _row(record, FUSED, "hot", 4096, 1024)
        peer, launch = row and best_peer(row), short and ours(short)
        if not (row and peer and launch and hot and hot.get("roofline_us") and "bytes" in row):
            return None
        moved = row["bytes"] / (hot["bytes"] / hot["roofline_us"])
        found = peer[1] / (launch + moved)
        text = (
            f"{found:.3f}x ({shape(row)}): one row of 2048 takes {launch:.2f} us in the chain, the bytes {moved:.2f} "
            f"us at the rate of a copy in the L2, {peer[0]} {peer[1]:.2f} us"
        )
        return Limit(text, found)

    return limit


def _copy(row: Row | None) -> Limit | None:
    """A kernel that takes as long as a copy of the same bytes."""
    peer, copy = row and best_peer(row), row and row.get("roofline_us")
    if not (row and peer and copy):
        return None
    found = peer[1] / copy
    text = f"{found:.3f}x ({shape(row)}): a copy of the same bytes takes {copy:.2f} us, {peer[0]} {peer[1]:.2f} us"
    return Limit(text, found)


def _mean_copy(record: Row) -> Limit | None:
    """Kernels that take as long as copies of the same bytes, at every length."""
    found = [limit.figure for row in prefill(record) if (limit := _copy(row)) and limit.figure]
    if not found:
        return None
    mean = geometric_mean(found)
    return Limit(f"{mean:.3f}x: a copy of the same bytes at each of the {len(found)} shapes", mean)


def _nearest_peer(record: Row) -> Limit | None:
    """The longest plain rows: how near the best peer comes to the copy."""
    row = _row(record, PLAIN, "cold", 4096, 32768)
    peer, copy, mine = row and best_peer(row), row and row.get("roofline_us"), row and share(row)
    if not (row and peer and copy and mine):
        return None
    return Limit(f"{copy / peer[1]:.3f}x is the nearest peer ({peer[0]}, {shape(row)})", copy / peer[1])


def _long(record: Row) -> Limit | None:
    rows = long_rows(record)
    row = _slowest(rows, gain)
    peer, mine = row and best_peer(row), row and ours(row)
    if not (row and peer and mine and row.get("roofline_us")):
        return None
    ahead = sum((gain(other) or 0) >= 1 for other in rows)
    return Limit(
        f"{row['op']} {shape(row)}: {mine:.2f} us, {peer[0]} {peer[1]:.2f} us, a copy {row['roofline_us']:.2f} us; "
        f"ahead at {ahead} of {len(rows)} shapes"
    )


def _short_fp32(record: Row) -> Limit | None:
    """A launch's own time: of rows that are nothing beside it alone."""
    rates = [(ratio, row) for row, ratio in variant_rates(record) if row["mode"] == "hot"]
    _, row = min(rates, key=lambda pair: pair[0], default=(0.0, None))
    base = row and bf16_like(record, row)
    mine, its = row and ours(row), base and ours(base)
    if not (row and base and mine and its):
        return None
    peer = best_peer(row)
    beside = f", the best peer {peer[1]:.2f} us ({peer[0]})" if peer else ""
    return Limit(f"{shape(row)} of fp32: {mine:.2f} us, {shape(base)} of bf16 {its:.2f} us{beside}")


def _triton(record: Row) -> Limit | None:
    rows = [row for row in prefill(record) + plain(record) if {"ours", "ours_triton"} <= row["us"].keys()]
    row = _slowest(rows, lambda row: row["us"]["ours"] / row["us"]["ours_triton"])
    if not (row and row.get("roofline_us")):
        return None
    times = f"{row['us']['ours_triton']:.2f} us, CUDA {row['us']['ours']:.2f} us, a copy {row['roofline_us']:.2f} us"
    return Limit(f"{row['op']} {shape(row)}: Triton {times}")


def _share(record: Row) -> Limit | None:
    """The share by the rounds: the least and the most that they give."""
    rows = engines(record)
    shares = {case: rows.get(("llama-8b", "ir", case), {}).get("share_recovered") for case in FEW}
    case = min((case for case in FEW if shares[case] is not None), key=lambda case: shares[case] or 0.0, default="")
    mine, stock, none = (rows.get(("llama-8b", variant, case), {}) for variant in ("ir", "stock", "removed"))
    if "step_us" not in none or not {"step_us_range"} <= mine.keys() & stock.keys():
        return None
    ceiling = stock["step_us"] - none["step_us"]
    (low, high), (its_low, its_high) = mine["step_us_range"], stock["step_us_range"]
    least, most = (its_low - high) / ceiling, (its_high - low) / ceiling
    return Limit(f"rounds give {least:.2f} to {most:.2f} ({case})") if most >= 0.5 else None


def _best_round(record: Row) -> Limit | None:
    """The most that a round of the engines gives, where it gives least."""
    rows, found = engines(record), []
    for case in FEW:
        steps = [rows.get(("llama-1b", name, case), {}).get("step_us_rounds") for name in ("stock", "ir", "removed")]
        if all(steps):
            shares = [(stock - mine) / (stock - none) for stock, mine, none in zip(*steps, strict=True)]  # type: ignore[arg-type]
            found.append((max(shares), case))
    if len(found) < len(FEW):
        return None
    share, case = min(found)
    return Limit(f"{share:.3f} in the best round ({case})", share)


def _reordered(record: Row) -> Limit | None:
    """Shares with sums in another order, in the same engines."""
    rows = engines(record)
    found = [rows.get(("llama-1b", "ir-reorder", case), {}).get("share_recovered") for case in FEW]
    shares = [share for share in found if share is not None]
    if len(shares) < len(FEW):
        return None
    return Limit(f"with `reorder`, which may change bits, {min(shares):.3f}")


def _in_chain(record: Row, op: str, of: str) -> Row | None:
    """The row of a few rows, or of more, at which `op` does worst: against its best peer, or above the norm."""
    rows = [row for row in select(record, op, "chain") if (row["m"] <= 64) == (of != "more")]
    if of != "above":
        return _slowest(rows, gain)

    def below(row: Row) -> float | None:
        norm, mine = _row(record, FUSED, "chain", row["m"], row["n"]), ours(row)
        return (ours(norm) or 0.0) - mine if norm and mine else None

    return _slowest(rows, below)


def _beside(op: str, of: str) -> LimitOf:
    """Our norm and each scheme at the shape at which `op` does worst."""

    def limit(record: Row) -> Limit | None:
        row = _in_chain(record, op, of)
        if row is None:
            return None
        names = {"our norm": FUSED, **{name: f"{FUSED}_{name}" for name in ("fp8_static", "fp8_token", "fp8_block")}}
        names[op.removeprefix(f"{FUSED}_")] = op
        rows = {name: _row(record, one, "chain", row["m"], row["n"]) for name, one in names.items()}
        times = [f"{name} {time:.2f} us" for name, one in rows.items() if one and (time := ours(one))]
        peer = best_peer(row) if of != "above" else None
        return Limit(f"{shape(row)}: {', '.join(times)}" + (f", {peer[0]} {peer[1]:.2f} us" if peer else ""))

    return limit


def _free(op: str, of: str) -> LimitOf:
    """A quantisation that costs nothing: our norm alone beside the peer of `op`."""

    def limit(record: Row) -> Limit | None:
        row = _in_chain(record, op, of)
        norm = row and _row(record, FUSED, "chain", row["m"], row["n"])
        peer, alone = row and best_peer(row), norm and ours(norm)
        if not (row and peer and alone):
            return None
        found = peer[1] / alone
        return Limit(
            f"{found:.3f}x ({shape(row)}): our norm alone takes {alone:.2f} us, {peer[0]} {peer[1]:.2f} us", found
        )

    return limit


def _in_rows(op: str) -> LimitOf:
    """The same blocks with their scales in rows, at the shape at which `op` is furthest from the copy."""

    def limit(record: Row) -> Limit | None:
        row = _slowest(select(record, op, "cold"), share)
        other = row and _row(record, f"{FUSED}_fp8_block", "cold", row["m"], row["n"])
        reached = other and share(other)
        return Limit(f"{reached:.3f}x with scales in rows ({shape(row)})") if row and reached else None

    return limit


SECOND_REDUCTION = (
    "the largest value of a row or a block is known behind rstd: a second reduction "
    "([measured](decisions/quantised_rows.md#a-second-reduction-for-a-scale-of-a-row))"
)
ONE_SCHEDULE = (
    "all schemes share one schedule, chosen on an H200 "
    "([measured](decisions/quantised_rows.md#a-second-reduction-for-a-scale-of-a-row))"
)
IN_COLUMNS = (
    "two rows a thread, for whole stores of scales, lost ([tried](decisions/quantised_rows.md#ideas-that-lost))"
)
STATIC, TOKEN, BLOCK, COLUMNS, BOTH, INT8 = (
    f"{FUSED}_{name}"
    for name in ("fp8_static", "fp8_token", "fp8_block", "fp8_block_columns", "fp8_block_both", "int8_token")
)
QUANTISED: dict[str, Retired] = {
    of_quantised(STATIC, f"cold: {PEER}"): Retired(
        0.97,
        "Inductor's kernel is ahead of a copy of the bytes there "
        "([measured](decisions/quantised_rows.md#a-second-reduction-for-a-scale-of-a-row))",
        lambda record: _copy(_slowest(select(record, STATIC, "cold"), gain)),
    ),
    of_quantised(STATIC, f"few: {PEER}"): Retired(1.1, ONE_SCHEDULE, _beside(STATIC, "few")),
    of_quantised(TOKEN, f"few: {PEER}"): Retired(1.4, SECOND_REDUCTION, _beside(TOKEN, "few")),
    of_quantised(BLOCK, f"few: {PEER}"): Retired(1.9, ONE_SCHEDULE, _beside(BLOCK, "few")),
    of_quantised(BOTH, f"few: {PEER}"): Retired(0.95, ONE_SCHEDULE, _free(BOTH, "few")),
    of_quantised(BOTH, f"more: {PEER}"): Retired(0.8, ONE_SCHEDULE, _free(BOTH, "more")),
    of_quantised(COLUMNS, f"cold: {COPY}"): Retired(0.93, IN_COLUMNS, _in_rows(COLUMNS)),
    of_quantised(BOTH, f"cold: {COPY}"): Retired(0.93, IN_COLUMNS, _in_rows(BOTH)),
    **{
        of_quantised(op, f"few: {ABOVE}"): Retired(held, SECOND_REDUCTION, _beside(op, "above"))
        for op, held in ((TOKEN, 0.5), (BLOCK, 0.5), (COLUMNS, 0.5), (BOTH, 0.65), (INT8, 0.5))
    },
}
RETIRED: dict[str, Retired] = {
    FUSED_MEAN: Retired(
        1.01,
        "peers are as near to a copy as ours are ([decisions](decisions/kernels_measured.md#what-the-record-misses))",
        _mean_copy,
    ),
    CHAIN_FEW: Retired(
        1.25,
        "64 rows of 8192 are bound by the L2 and by the hand-over from launch to launch; no schedule tried was faster "
        "([what was tried](decisions/kernels.md#clusters-for-a-few-rows))",
        _chain(1, 64),
    ),
    CHAIN_MANY: Retired(
        1.09,
        "so are 128 rows of 8192 ([what was tried](decisions/kernels.md#the-next-kernel-after-the-reduction))",
        _chain(128, 256),
    ),
    HOT: Retired(
        1.0,
        "rows, residual and results do not stay in the L2 together, so memory bounds it "
        "([decisions](decisions/kernels_measured.md#hot-operands))",
        lambda record: _copy(_row(record, FUSED, "hot", 4096, 2048)),
    ),
    ONE_LAUNCH: Retired(
        1.1,
        "it would have to be faster than a copy of its bytes "
        "([decisions](decisions/benchmarks.md#q-and-k-in-one-launch-13x-is-out-of-reach))",
        lambda record: _copy(_row(record, PAIR, "cold", 4096, 128)),
    ),
    LONG: Retired(
        0.97,
        "of the schedules that were tried none is faster ([what was tried](decisions/kernels.md#long-rows))",
        _long,
    ),
    DTYPES: Retired(
        0.92,
        "such rows take the time of a launch: their bytes are nothing beside it "
        "([decisions](decisions/kernels_measured.md#what-the-record-misses))",
        _short_fp32,
    ),
    TRITON: Retired(
        0.94,
        "of the schedules that were tried none is nearer ([what was tried](decisions/triton.md#threads-of-a-program))",
        _triton,
    ),
    PLAIN_COPY: Retired(
        0.975,
        "a sweep of schedules found none that is nearer, and where operands lie moves the time by more than what is "
        "missing ([decisions](decisions/kernels_measured.md#plain-norms-a-sweep-of-schedules))",
        _nearest_peer,
    ),
    SHARE_8B: Retired(
        0.45,
        "at 32 rows the H100's products do not all come in parts, so norms take over less "
        "([decisions](decisions/vllm_measured.md#engines-beside-stock))",
        _share,
    ),
    SHARE_1B: Retired(
        0.2,
        "cuBLAS splits one of 1B's products unevenly and the other not at all; no norm can add up such parts with no "
        "bit changed ([decisions](decisions/products_in_parts.md#uneven-splits-cannot-be-had))",
        lambda record: _reordered(record) or _best_round(record),
    ),
    **QUANTISED,
}
"""By the aim's work."""


def of(aim: Aim, record: Row) -> Known | None:
    """What is known of a missed aim by its record; None where it is none, or nothing is known."""
    if aim.met is not False:
        return None
    judged = set_for(record)
    entry = RETIRED.get(aim.work)
    limit = entry and entry.limit(record)
    if not (entry and limit) or aim.figure is None or aim.asked is None:
        return None
    if limit.figure is not None and limit.figure >= aim.asked:
        return None
    if judged and aim.worse(entry.held):
        return None
    return Known("retired" if judged else "below", entry.because, entry.held if judged else None, limit.text)
