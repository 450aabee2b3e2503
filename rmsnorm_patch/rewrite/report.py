"""What `apply` did to a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..backends.names import Backend
from ..page import page, summarised
from ..scan.plan import Compiled, Plan


@dataclass(frozen=True)
class Report:
    """The sites that were patched, in the plan's order.

    plan: what was asked for and what the scan found, the sites left alone and why among it.
    norms: module paths of the norms whose class was swapped. layers: module paths of the layers whose forward now
        calls a fused op. attentions: of those that norm queries and keys in one launch. notes: what a user should know
        beside that. wrapped: paths of modules under somebody's own forward, of any kind, which the plan leaves alone.
    proof: the report of `verify`, where `apply` was asked to prove itself. It is not kept on the model.
    """

    plan: Plan
    norms: tuple[str, ...]
    layers: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    wrapped: tuple[str, ...] = ()
    proof: Any = field(default=None, compare=False)

    @property
    def backend(self) -> Backend:
        """The backend asked for; "auto" chooses at each call, by device and capability."""
        return self.plan.backend

    @property
    def settings(self) -> Settings:
        return Settings(self.plan.backend, self.plan.include, self.plan.exclude, self.plan.compiled)

    def counts(self) -> dict[str, int]:
        """Sites per kind and action, as in `Plan.counts`."""
        return self.plan.counts()

    def __str__(self) -> str:
        """A page: what was done, and the plan's sites by kind, lines of at most 120 characters."""
        lines = [self._headline(), str(self.plan), *summarised(f"note: {note}" for note in self.notes)]
        proof = [] if self.proof is None else [str(self.proof)]
        return "\n".join([page(line for text in lines for line in text.splitlines()), *proof])

    def explain(self) -> str:
        """Every norm and layer that was patched, every site of the plan, the notes and the proof."""
        lines = [self._headline(), "norms with another class", *(f"  {path or '(root)'}" for path in self.norms)]
        lines += ["layers with another forward", *(f"  {path or '(root)'}" for path in self.layers)]
        if self.attentions:
            lines += ["attentions with another forward", *(f"  {path or '(root)'}" for path in self.attentions)]
        lines += ["plan", *self.plan.explain().splitlines(), *(f"note: {note}" for note in self.notes)]
        proof = [] if self.proof is None else [str(getattr(self.proof, "explain", self.proof.__str__)())]
        return "\n".join([page(lines), *proof])

    def _headline(self) -> str:
        done = f"{len(self.norms)} norms and {len(self.layers)} layers and stacks patched"
        done += f", {len(self.attentions)} attentions" if self.attentions else ""
        return f"{self.plan.model_class}: {done}"

    def with_proof(self, proof: Any) -> Report:
        return replace(self, proof=proof)

    def to_dict(self) -> dict[str, Any]:
        found = {
            "model_class": self.plan.model_class,
            "backend": self.backend,
            "counts": self.counts(),
            "norms": list(self.norms),
            "layers": list(self.layers),
            "attentions": list(self.attentions),
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
        }
        if self.proof is not None:
            found["proof"] = _plain(self.proof)
        return found

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)


@dataclass(frozen=True)
class Settings:
    """The options of `apply` that decide what a patched model computes."""

    backend: Backend
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    compiled: Compiled = "model"

    def __str__(self) -> str:
        compiled = "" if self.compiled == "model" else f", compiled={self.compiled!r}"
        return f"backend={self.backend!r}, include={list(self.include)}, exclude={list(self.exclude)}{compiled}"


def _plain(proof: Any) -> Any:
    if hasattr(proof, "to_dict"):
        return proof.to_dict()
    return dict(proof) if isinstance(proof, Mapping) else repr(proof)
