"""What will happen to a model, and why: the objects that the scan produces and the rewriter carries out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .semantics import NormSpec

Backend = Literal["auto", "reference", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "triton", "cuda")

Action = Literal["fuse", "leave"]
PairKind = Literal["in_layer", "cross_layer", "final", "norm_add"]
"""in_layer: x = a + b; norm(x) within one layer's forward. cross_layer: the last add of a layer and the entry norm
of the next. final: the last add of the last layer and the model's final norm. norm_add: norm(x) + residual
(sandwich layouts), reported and not fused."""


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
class Plan:
    """The whole of what `apply` would do to one model."""

    model_class: str
    backend: Backend
    norms: tuple[NormSite, ...]
    pairs: tuple[PairSite, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def fused_norms(self) -> Iterator[NormSite]:
        return (site for site in self.norms if site.action == "fuse")

    def fused_pairs(self, kind: PairKind | None = None) -> Iterator[PairSite]:
        return (p for p in self.pairs if p.action == "fuse" and kind in (None, p.kind))

    def counts(self) -> dict[str, int]:
        """Sites per kind and action, e.g. {"norm/fuse": 65, "in_layer/fuse": 32}."""
        found = Counter(f"norm/{site.action}" for site in self.norms)
        found.update(f"{pair.kind}/{pair.action}" for pair in self.pairs)
        return dict(sorted(found.items()))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts()}

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)
