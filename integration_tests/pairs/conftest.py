"""The modules here, and rows for the layers in `small_layers`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # test folders are not packages

pytest.register_assert_rewrite("small_layers", "query_and_key")

from small_layers import WIDTH  # noqa: E402


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
