"""The aims as tables of a page: what is met, and what is known of each that is not."""

from __future__ import annotations

from collections.abc import Iterable

from rmsnorm_patch.bench.quantised import QUANTISED
from rmsnorm_patch.bench.rows import Row, select

from . import aims, retired
from .aims import Aim
from .pages import MISSING, table

SAID = {True: "yes", False: "**no**", None: "open"}
BESIDE = {**SAID, False: "below"}
"""Of a GPU for which no aim was set."""


def _said_of(record: Row, page: str) -> tuple[dict[bool | None, str], str]:
    """The words for met, missed and open, and what is said in front of the table. page: the one that judges aims."""
    if aims.set_for(record):
        return SAID, ""
    return BESIDE, (
        f"The aims were set for one {aims.GPU}, and [its page]({page}#aims) judges them. The figures here are of this "
        "GPU. "
    )


def _tables(record: Row, found: Iterable[Aim], said: dict[bool | None, str]) -> str:
    """Every aim, and below them what is known of those that are missed."""
    judged = [(aim, retired.of(aim, record)) for aim in found]
    body = [[aim.work, aim.wanted, aim.measured, known.word if known else said[aim.met]] for aim, known in judged]
    parts = [table(["work", "aim", "measured", "met"], body)]
    limited = [(aim, known) for aim, known in judged if known]
    held = any(known.held is not None for _, known in limited)
    rows: list[list[object]] = [
        [aim.work, *([f"{known.held:g}"] if held else []), known.limit, known.because] for aim, known in limited
    ]
    if limited:
        parts.append(
            "What is known of the retired aims. The limit is of this record. An aim counts as missed again where its "
            "figure is worse than what is held instead, or its limit reaches it.\n"
            if held
            else 'What is known of the aims that are marked "below". The limit is of this record.\n'
        )
        parts.append(table(["work", *(["held instead"] if held else []), "limit that was measured", "because"], rows))
    return "\n".join(parts)


def quantised_aims(record: Row) -> str:
    if not any(select(record, op, mode) for op in QUANTISED for mode in ("cold", "chain")):
        return MISSING
    said, note = _said_of(record, "results_quantised.md")
    text = (
        f"{note}Figures are computed from the record. The worst shape counts, against the peers that have a figure "
        "there. Open: not measured, or no peer has a figure."
    )
    return f"{text}{_given_up(record)}\n\n{_tables(record, aims.quantised(record), said)}"


def aims_table(record: Row) -> str:
    said, note = _said_of(record, "results.md")
    text = (
        f"{note}Figures are computed from the record. `ours` is the better of the functional and the in-place form, "
        "since peers have one or the other. The best peer is the best at that shape. Open: not measured, not against "
        "every peer, or in rounds that overlap."
    )
    return f"{text}{_given_up(record)}\n\n{_tables(record, aims.of(record), said)}"


def _given_up(record: Row) -> str:
    return " Retired: missed and given up, for the reason below." if aims.set_for(record) else ""
