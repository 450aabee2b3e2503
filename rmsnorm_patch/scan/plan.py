"""What will happen to a model, and why: the objects that the scan produces and the rewriter carries out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..backends.names import Backend
from ..page import folded, numbered, page

if TYPE_CHECKING:
    from ..numerics.gating import GateSpec
    from ..numerics.spec import NormSpec


Action = Literal["fuse", "leave"]
Compiled = Literal["model", "joined"]
"""What the graphs of `torch.compile` hold of a patched model: its own arithmetic, or, where they are captured, norms
that take over the split product in front."""
PairKind = Literal["in_layer", "cross_layer", "final", "norm_add"]
"""in_layer: x = a + b; norm(x) within one layer's forward. cross_layer: the last add of a layer and the entry norm
of the next. final: the last add of the last layer and the model's final norm. norm_add: residual + norm(x) (sandwich
layouts); the add may be one of the other kinds too."""


PAIR_MEANING: dict[PairKind, str] = {
    "in_layer": "add -> norm in one layer",
    "cross_layer": "last add -> next layer's norm",
    "final": "last add -> final norm",
    "norm_add": "norm -> add",
}
SHOWN_GROUPS, SHOWN_NOTES = 40, 10
JOINED = "compiled: in captured graphs those of {} norms that read an add take over the split product in front of it"


def numerics(spec: NormSpec | None) -> str:
    """A spec in a few words, e.g. "x*rstd rounded, w, eps 1e-05"."""
    if spec is None:
        return "unknown"
    rounding = {"input": "x*rstd rounded", "weight": "rounded to the weight's type", "none": "one rounding"}
    weight = {"none": "w", "fp32": "1+w", "weight_dtype": "1+w in its type"}[spec.weight_offset]
    words = [rounding[spec.round_before_weight], weight if spec.has_weight else "no weight"]
    words.append("eps of the dtype" if spec.eps is None else f"eps {spec.eps:g}")
    words += [f"width {spec.width}"] * (spec.width is not None) + [f"groups of {spec.group}"] * (spec.group is not None)
    return ", ".join(words)


@dataclass(frozen=True)
class NormSite:
    """One module that looks like an RMSNorm.

    path: module path from the model's root ("" for the root itself). A module shared at several paths has one site;
        the others are in `shared_paths`.
    spec: the numerics that its own forward matched bitwise, or None where nothing matched.
    eps_attribute: name of the attribute that holds eps, read again at every call; None where the value is a constant in
        the class's code, which `spec.eps` then holds.
    weight_attribute: name of the 1-D parameter (or buffer) that scales the output; None for a weightless norm.
    reason: why the action was chosen, in words a user can act on.
    falls_back: why calls of a norm that is fused will run the original arithmetic as the model is now; "" where nothing
        is known that would.
    inputs: dtypes that it is called with in a model of mixed dtypes; () where nobody looked, or none came.
    gating: how the gate enters a norm that is called with one; `spec` is that of the norm in it.
    """

    path: str
    class_name: str
    spec: NormSpec | None
    action: Action
    reason: str
    hidden_size: int | None = None
    weight_dtype: str | None = None
    eps_attribute: str | None = None
    shared_paths: tuple[str, ...] = ()
    weight_attribute: str | None = None
    falls_back: str = ""
    inputs: tuple[str, ...] = ()
    gating: GateSpec | None = None


@dataclass(frozen=True)
class PairSite:
    """One residual-add and the norm that reads its sum.

    layer: module path of the layer whose forward holds the add. norm: module path of the norm.
    source: "file.py:line" of the add in the layer's own source.
    """

    kind: PairKind
    layer: str
    norm: str
    action: Action
    reason: str
    source: str = ""


@dataclass(frozen=True)
class QueryKeySite:
    """Two norms of one attention forward, the query's and the key's, that one launch can compute.

    layer: module path of the attention. query, key: module paths of its norms; the same where one module norms both.
    source: "file.py:line" of the query's norm in the attention's own source.
    rotation: whether the rotation by position behind the norms is part of the launch, for `rotation_reason`; None where
        there is none, or the norms are left.
    """

    layer: str
    query: str
    key: str
    action: Action
    reason: str
    source: str = ""
    rotation: Action | None = None
    rotation_reason: str = ""


@dataclass(frozen=True)
class SiteGroup:
    """Sites that are treated alike for the same reason, those of the layers of a stack for example.

    what: the norms' class, or what kind of pair. where: their paths, with a range of layers. why: numerics or reason.
    """

    action: Action
    count: int
    what: str
    where: str
    why: str

    def line(self) -> str:
        many = f"{self.count:4} x " if self.count > 1 else ""
        return f"  {self.action:5} {many}{self.where}: {self.what}: {self.why}"


def _grouped(sites: Iterable[tuple[Action, str, str, str]], fold: bool) -> tuple[SiteGroup, ...]:
    """Of (action, what, path, why); fold: sites at paths that differ in numbers alone share a group."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for action, what, path, why in sites:
        groups.setdefault((action, what, numbered(path)[0] if fold else path, why), []).append(path)
    return tuple(
        SiteGroup(action, len(paths), what, folded(paths), why)  # type: ignore[arg-type]
        for (action, what, _, why), paths in groups.items()
    )


@dataclass(frozen=True)
class Plan:
    """The whole of what `apply` would do to one model."""

    model_class: str
    backend: Backend
    norms: tuple[NormSite, ...]
    pairs: tuple[PairSite, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    query_key: tuple[QueryKeySite, ...] = ()
    compiled: Compiled = "model"

    def fused_norms(self) -> Iterator[NormSite]:
        return (site for site in self.norms if site.action == "fuse")

    def fused_pairs(self, kind: PairKind | None = None) -> Iterator[PairSite]:
        return (p for p in self.pairs if p.action == "fuse" and kind in (None, p.kind))

    def fused_query_key(self) -> Iterator[QueryKeySite]:
        return (site for site in self.query_key if site.action == "fuse")

    def counts(self) -> dict[str, int]:
        """Sites per kind and action, e.g. {"norm/fuse": 65, "in_layer/fuse": 32, "query_key/fuse": 32}."""
        counter = Counter(f"norm/{site.action}" for site in self.norms)
        counter.update(f"{pair.kind}/{pair.action}" for pair in self.pairs)
        counter.update(f"query_key/{site.action}" for site in self.query_key)
        counter.update(f"rotation/{site.rotation}" for site in self.query_key if site.rotation is not None)
        return dict(sorted(counter.items()))

    def norm_groups(self, fold: bool = True) -> tuple[SiteGroup, ...]:
        """The norms as rows of a table. fold: norms at paths that differ in layer numbers alone share one."""

        def why(site: NormSite) -> str:
            gating = "" if site.gating is None else f" {site.gating}"
            computed = f"{numerics(site.spec)}{gating}, N={site.hidden_size}"
            fused = f"{computed}; falls back: {site.falls_back}" if site.falls_back else computed
            return fused if site.action == "fuse" else site.reason

        return _grouped(((s.action, s.class_name, s.path, why(s)) for s in self.norms), fold)

    def pair_groups(self, fold: bool = True) -> tuple[SiteGroup, ...]:
        """The adds, as `norm_groups`."""
        falling = {site.path for site in self.norms if site.falls_back}

        def why(pair: PairSite) -> str:
            where = pair.source.rsplit("/", 1)[-1] + ("; falls back with its norm" if pair.norm in falling else "")
            return pair.reason if pair.action == "leave" else where

        return _grouped(((p.action, PAIR_MEANING[p.kind], p.norm, why(p)) for p in self.pairs), fold)

    def query_key_groups(self, fold: bool = True) -> tuple[SiteGroup, ...]:
        """The attentions, as `norm_groups`."""

        def what(site: QueryKeySite) -> str:
            rotated = ", with their rotation" if site.rotation == "fuse" else ""
            return f"q and k norms in one launch{rotated}"

        def why(site: QueryKeySite) -> str:
            if site.action == "leave":
                return site.reason
            left = f"; their rotation by itself: {site.rotation_reason}" if site.rotation == "leave" else ""
            return f"{site.source}{left}"

        return _grouped(((s.action, what(s), s.query, why(s)) for s in self.query_key), fold)

    def __str__(self) -> str:
        """A page: sites by kind with their counts, lines of at most 120 characters."""
        return page(self._lines(fold=True, shown=SHOWN_GROUPS, notes=SHOWN_NOTES))

    def explain(self) -> str:
        """Every site, with what happens to it and why."""
        return page(self._lines(fold=False, shown=None, notes=None))

    def _lines(self, fold: bool, shown: int | None, notes: int | None) -> Iterator[str]:
        fused = (sum(1 for _ in self.fused_norms()), sum(1 for _ in self.fused_pairs()))
        line = f"{self.model_class}, backend {self.backend}: {fused[0]} of {len(self.norms)} norms fused, "
        line += f"{fused[1]} of {len(self.pairs)} adds with their norm"
        if self.query_key:
            together = sum(1 for _ in self.fused_query_key())
            line += f", {together} of {len(self.query_key)} attentions norm q and k in one launch"
            rotated = sum(site.rotation == "fuse" for site in self.query_key)
            line += f" ({rotated} with their rotation)" if rotated else ""
        yield line
        falling = sum(1 for site in self.fused_norms() if site.falls_back)
        if falling:
            yield f"as the model is now, {falling} of the fused norms will run the original arithmetic (falls back)"
        if self.compiled == "joined":
            yield JOINED.format(sum(site.action == "fuse" and not site.gating for site in self.norms))
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            if patterns:
                yield f"{option}: {', '.join(patterns)}"
        for name, groups in (
            ("norms", self.norm_groups(fold)),
            ("adds", self.pair_groups(fold)),
            ("queries and keys", self.query_key_groups(fold)),
        ):
            if groups:
                yield name
            yield from (group.line() for group in groups[:shown])
            if len(groups) > len(groups[:shown]):
                yield f"  ... and {len(groups) - len(groups[:shown])} more kinds, see explain()"
        yield from (f"note: {note}" for note in self.notes[:notes])
        if len(self.notes) > len(self.notes[:notes]):
            yield f"... and {len(self.notes) - len(self.notes[:notes])} more notes, see explain()"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts()}

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)
