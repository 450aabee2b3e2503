"""Diffusion transformers and embedding models, as `scripts/diffusion_matrix.py` surveys them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import pytest
import torch

import rmsnorm_patch

if not all(map(importlib.util.find_spec, ("diffusers", "sentence_transformers"))):
    pytest.skip("the environment of vLLM does not have what makes these models", allow_module_level=True)
pytestmark = pytest.mark.slow

LEAST_NORMS = {
    "Flux": 12,
    "Stable Diffusion 3.5": 8,
    "LTX-Video": 12,
    "Wan": 8,
    "Lumina 2": 25,
    "HunyuanVideo": 12,
    "Qwen3-Embedding": 13,
    "EmbeddingGemma": 19,
    "E5-Mistral": 7,
}
"""Norms that are fused today; fewer is a regression."""
WITH_PAIRS = {"LTX-Video", "Lumina 2", "Qwen3-Embedding", "EmbeddingGemma", "E5-Mistral"}
"""Models in which a norm reads a residual sum, without a scale or shift in between."""


@pytest.fixture(scope="module")
def matrix(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("diffusion_matrix")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEAST_NORMS)
def test_bits_stay_and_what_was_planned_ran(matrix: ModuleType, name: str, dtype: torch.dtype) -> None:
    row = matrix.survey(name, dtype)
    assert row.identical
    assert row.fused("norm") >= LEAST_NORMS[name]
    assert (row.fused("in_layer") + row.fused("cross_layer") > 0) is (name in WITH_PAIRS)
    assert row.ran.get("in_layer", 0) == row.fused("in_layer")
    handed_over = row.fused("cross_layer") + row.fused("final")
    assert row.ran.get("taken", 0) == row.ran.get("cross_layer", 0) == handed_over
    assert row.ran["norm"] > 0 or name in WITH_PAIRS


def test_a_denoiser_and_an_embedder_can_be_proved(matrix: ModuleType) -> None:
    """What the pages tell a user to do: the model itself, or the encoder of a SentenceTransformer."""
    small = matrix.BUILDERS["E5-Mistral"](torch.float32)
    encoder = small.model[0].auto_model
    ids = {"input_ids": torch.arange(3, 17)[None], "attention_mask": torch.ones(1, 14, dtype=torch.long)}
    rmsnorm_patch.apply(encoder)
    assert rmsnorm_patch.verify(encoder, ids).passed


def test_the_survey_has_every_model(matrix: ModuleType) -> None:
    assert set(matrix.BUILDERS) == set(LEAST_NORMS)


def test_the_page_is_up_to_date(matrix: ModuleType) -> None:
    text = matrix.PAGE.read_text()
    for name in ("diffusers", "sentence-transformers", "transformers"):
        if f"{name} {version(name)}" not in text:
            pytest.skip(f"the page was made with another {name}")
    assert text == matrix.page(), "run scripts/diffusion_matrix.py"
