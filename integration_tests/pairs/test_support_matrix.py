"""Every causal-LM type of transformers, as `scripts/support_matrix.py` surveys them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from filelock import FileLock

pytestmark = pytest.mark.slow

PINNED = {
    "types": 196,
    "built": 182,
    "with RMSNorm": 119,
    "norms fused": 119,
    "in_layer": 101,
    "cross_layer": 97,
    "final": 107,
    "norm_add": 17,
    "norm_add left": 1,
    "query_key": 35,
    "rotation": 18,
}
"""For transformers 5.24, without optional packages. A drop is a regression; a rise is a new pin."""

CYCLES = {"hrm_text": 4}
"""Types whose forward runs its layers several times."""


@pytest.fixture(scope="module")
def matrix(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("support_matrix")


@pytest.fixture(scope="module")
def rows(matrix: ModuleType, shared_folder: Path) -> list:
    """Surveyed once for all workers of a run."""
    kept = shared_folder / "support_matrix.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_text(json.dumps([asdict(row) for row in matrix.survey_all()]))
    return [matrix.Row(**{**row, "reasons": tuple(row["reasons"])}) for row in json.loads(kept.read_text())]


def test_bits_stay_in_fp32(rows: list) -> None:
    assert [row.model_type for row in rows if not row.identical and not row.unbuilt] == []


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.long, id="all")])
def test_bits_stay_in_bf16(matrix: ModuleType, rows: list, share: int) -> None:
    """Rewriting does not look at a dtype: the short form takes a seeded eighth of the types that fp32 has proved."""
    types = [row.model_type for row in rows if row.has_norms]
    wrong = []
    for model_type in random.Random(0).sample(types, len(types) // share):
        half = matrix.survey(model_type, torch.bfloat16)
        if not half.identical and not half.unbuilt:
            wrong.append(model_type)
    assert wrong == []


def test_what_was_planned_ran(rows: list) -> None:
    for row in rows:
        times = CYCLES.get(row.model_type, 1)
        handed_over = row.fused("cross_layer") + row.fused("final")
        fused = (row.fused("in_layer"), handed_over, handed_over, row.fused("norm_add"), 2 * row.fused("query_key"))
        expected = tuple(times * count for count in fused)
        kinds = ("in_layer", "cross_layer", "taken", "norm_add", "together")
        ran = tuple(row.ran.get(kind, 0) for kind in kinds)
        assert ran == expected, row.model_type


@pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="pinned for transformers 5.24")
def test_counts(matrix: ModuleType, rows: list) -> None:
    counted = matrix.totals(rows)
    assert counted["in_layer"] >= 95
    assert counted["cross_layer"] >= 88
    assert counted == PINNED


@pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="the page is for transformers 5.24")
def test_page_is_up_to_date(matrix: ModuleType, rows: list) -> None:
    assert matrix.PAGE.read_text() == matrix.page(rows), "run scripts/support_matrix.py"
