"""Proof that a patched model computes what the unpatched one does: `verify`, and logits recorded on one machine and
compared on another."""

from __future__ import annotations

from .prove import verify
from .recorded import Comparison, compare_logits, record_logits
from .report import FiredProof, FlowProof, GreedyProof, LogitProof, Measurement, Proof, SiteProof

__all__ = [
    "Comparison",
    "FiredProof",
    "FlowProof",
    "GreedyProof",
    "LogitProof",
    "Measurement",
    "Proof",
    "SiteProof",
    "compare_logits",
    "record_logits",
    "verify",
]
