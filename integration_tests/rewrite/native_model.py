"""A model whose pairs launcher.c serves on the CPU, and its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_driver import Driver, table_of
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.rewrite import layer_calls, native

TOKENS = torch.arange(1, 8)[None]
LAYERS = 3
PAIRS = 2 * LAYERS
"""One in each layer, one from each layer to the next norm."""


def patch(model: PreTrainedModel, path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Apply, and let launcher.c serve the model's pairs."""
    rmsnorm_patch.apply(model)
    norm = model.model.norm
    kernel = layer_calls.kernel_of(norm)
    assert kernel is not None
    table = table_of("fused_add_rms_norm", type(norm)._rmsnorm_patch_key.spec, model.config.hidden_size)
    monkeypatch.setattr(kernel.fused, "table", table)
    native.enroll(type(norm), kernel)
    return Driver(path)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def settle(model: PreTrainedModel) -> None:
    """The first step finds where the loop's frame is; from then on no Python check runs."""
    model(TOKENS)
