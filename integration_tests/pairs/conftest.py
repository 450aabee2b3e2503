"""The modules here, rows for the layers in `small_layers`, and a small Qwen3."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))  # test folders are not packages

pytest.register_assert_rewrite("small_layers", "query_and_key")

from small_layers import WIDTH  # noqa: E402


@pytest.fixture
def qwen3(small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model("qwen3", num_hidden_layers=2)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
