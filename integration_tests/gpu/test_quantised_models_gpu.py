"""Hugging Face models with quantised products on this GPU: our kernels serve every norm, and proofs pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

import rmsnorm_patch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89"
    ),
]

KINDS = (
    "fine-grained",
    "compressed token",
    "compressed static",
    "compressed int8",
    "optimized",
    "torchao Float8WeightOnlyConfig",
    "torchao Float8DynamicActivationFloat8WeightConfig",
)
"""Of `quantised_models.made`."""
Make = Callable[[str], PreTrainedModel]


@pytest.fixture
def make(quantised_models: ModuleType, tmp_path: Path) -> Iterator[Make]:
    def made(kind: str) -> PreTrainedModel:
        return quantised_models.made(kind, tmp_path / str(len(list(tmp_path.iterdir()))), "cuda")  # type: ignore[no-any-return]

    with quantised_models.product_of_the_hub():
        yield made


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_proved_with_our_kernels(kind: str, backend: str, make: Make) -> None:
    """Every add is fused with its norm, behind the wrappers that a library puts over forwards too."""
    model = make(kind)
    ids = torch.tensor([list(b"You may copy"), list(b"This program")], device="cuda")
    with torch.no_grad():
        before = model(ids).logits
    report = rmsnorm_patch.apply(model, backend=backend, verify=ids)  # type: ignore[arg-type]
    assert report.proof is not None
    assert report.proof.passed, str(report.proof)
    assert "fired: 9 of 9 norm calls, 8 of 8 with their add" in str(report.proof)
    with torch.no_grad():
        model(ids)
    status = rmsnorm_patch.status(model)
    assert sum(site.fallen_back for site in status.sites) == 0, str(status)
    rmsnorm_patch.revert(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
