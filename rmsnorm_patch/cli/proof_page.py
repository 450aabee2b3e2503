"""A proof as one HTML file: the model's layers as a picture, every site's verdict and margin, the figures.

The file needs nothing beside it: no network, no script, pictures inline. `proof_page.html.j2` is its template.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..proof.report import Proof, SiteProof
from ..scan.plan import PAIR_MEANING, NormSite, PairSite, Plan, numerics

State = Literal["ok", "red", "unjudged", "left"]
STATE_WORDS: dict[State, str] = {
    "ok": "within tolerance",
    "red": "outside tolerance",
    "unjudged": "not judged",
    "left": "left alone",
}
WIDTH, LABEL, CELL, ROW = 360, 118, 40, 30
"""The picture in its own units: it is scaled to the page. A row holds what fits between label and edge."""


@dataclass(frozen=True)
class Glyph:
    """One norm in the picture, and the add in front of it: "fused", "left" or "" for none."""

    number: int
    x: int
    y: int
    name: str
    state: State
    add: str
    title: str


@dataclass(frozen=True)
class Band:
    """The norms of one layer, or of what stands outside the layers."""

    label: str
    y: int
    height: int
    glyphs: tuple[Glyph, ...]


@dataclass(frozen=True)
class SiteRow:
    """One norm of the plan. share: measured over allowed at its worst comparison, None where nothing was measured."""

    number: int
    norm: NormSite
    state: State
    word: str
    computes: str
    add: str
    calls: str
    share: float | None
    proof: SiteProof | None


def page_of(proof: Proof, plan: Plan) -> str:
    """The whole file as text. plan: of the model that was proved."""
    rows = _rows(proof, plan)
    bands = _bands(rows, plan)
    judged = [row.share for row in rows if row.share is not None]
    adds = [pair for pair in plan.pairs if pair.kind != "norm_add"]
    engine = Environment(
        loader=PackageLoader("rmsnorm_patch.cli", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return engine.get_template("proof_page.html.j2").render(
        proof=proof,
        plan=plan,
        rows=rows,
        bands=bands,
        width=WIDTH,
        height=bands[-1].y + bands[-1].height + 4 if bands else ROW,
        words=STATE_WORDS,
        verdicts=[(text[:3].strip(), *text[4:].split(": ", 1)) for text in proof.verdicts()],
        tiles=[
            ("norms fused", f"{sum(1 for _ in plan.fused_norms())} of {len(plan.norms)}"),
            ("adds fused with their norm", f"{sum(p.action == 'fuse' for p in adds)} of {len(adds)}"),
            ("worst margin used", _percent(max(judged)) if judged else "none measured"),
            ("greedy tokens", _greedy(proof)),
        ],
        left=[
            group
            for group in (*plan.norm_groups(), *plan.pair_groups(), *plan.query_key_groups())
            if group.action == "leave"
        ],
        percent=_percent,
    )


def write_page(path: Path, proof: Proof, plan: Plan) -> None:
    """Write the file at `path`, wholly or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(page_of(proof, plan), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _greedy(proof: Proof) -> str:
    if proof.greedy is None:
        return "not generated"
    return f"{proof.greedy.tokens} equal" if proof.greedy.equal else "they part"


def _percent(share: float) -> str:
    """Of what was allowed: "0 %", "34 %", "over 999 %"."""
    return "over 999 %" if share > 9.99 else f"{100 * share:.0f} %"


def _rows(proof: Proof, plan: Plan) -> list[SiteRow]:
    judged = {site.path: site for site in proof.sites}
    pairs = {pair.norm: pair for pair in plan.pairs if pair.kind != "norm_add"}
    rows = []
    for number, norm in enumerate(plan.norms, 1):
        site = judged.get(norm.path)
        worst = None if site is None else site.worst
        state: State = "left" if norm.action == "leave" else "unjudged"
        if site is not None and worst is not None:
            state = "ok" if site.passed else "red"
        rows.append(
            SiteRow(
                number=number,
                norm=norm,
                state=state,
                word=STATE_WORDS[state],
                computes=numerics(norm.spec) if norm.spec else norm.reason,
                add=_add(pairs.get(norm.path)),
                calls=_calls(site),
                share=None if worst is None else worst.severity,
                proof=site,
            )
        )
    return rows


def _add(pair: PairSite | None) -> str:
    if pair is None:
        return "no add in front"
    return f"{PAIR_MEANING[pair.kind]}: {'one kernel' if pair.action == 'fuse' else pair.reason}"


def _calls(site: SiteProof | None) -> str:
    if site is None or not site.calls:
        return "none"
    return ", ".join(f"{count} x {kind.replace('_', '-')}" for kind, count in sorted(site.calls.items()))


def _bands(rows: list[SiteRow], plan: Plan) -> list[Band]:
    fused = {pair.norm: pair.action for pair in plan.pairs if pair.kind != "norm_add"}
    room = (WIDTH - LABEL) // CELL
    bands, y = [], 4
    for label, members in groupby(rows, key=lambda row: _layer(row.norm.path)):
        glyphs = []
        for place, row in enumerate(members):
            add = {"fuse": "fused", "leave": "left"}.get(fused.get(row.norm.path, ""), "")
            name = row.norm.path.rpartition(".")[2] or "(root)"
            title = f"{row.norm.path or '(root)'}: {row.word}; {row.add}"
            x, line = LABEL + place % room * CELL, y + place // room * ROW
            glyphs.append(Glyph(row.number, x, line, name, row.state, add, title))
        height = (glyphs[-1].y - y) + ROW
        bands.append(Band(label, y, height, tuple(glyphs)))
        y += height
    return bands


def _layer(path: str) -> str:
    """ "model.layers.3" for "model.layers.3.self_attn.q_norm"; what stands in no layer has its parent."""
    numbered = re.match(r"(.*?\.\d+)\.", f"{path}.")
    return numbered[1] if numbered and numbered[1] != path else path.rpartition(".")[0] or "model"
