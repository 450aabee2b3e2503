"""How test processes and the starter of engines collect garbage: rarely, and not among what they imported."""

from __future__ import annotations

import gc

THRESHOLDS = (20_000, 20, 100)
"""A model, or a compiler at work, is many objects, most of which go without a collection."""


def keep_what_is_there() -> None:
    """What was imported stays to the end: no collection need look through it, and no child need copy its pages."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
