"""launcher.c serves CPU tensors: its driver is `cpu_driver.c`. Models as they are and patched."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import cache, driver, launcher
from rmsnorm_patch.rewrite import native

sys.path.insert(0, str(Path(__file__).parent))  # modules here: test folders are not packages

import native_model
from handing_over import LAYERS, Model
from native_driver import Driver

DLPACK_CPU = 1


@pytest.fixture(scope="session")
def driver_path(shared_library: Callable[..., Path]) -> Path:
    return shared_library(Path(__file__).with_name("cpu_driver.c"), "-lm")


@pytest.fixture
def launchers(driver_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(driver_path.parent / "cache"))  # compiled once for all tests
    monkeypatch.delenv(launcher.VARIABLE, raising=False)
    monkeypatch.setattr(driver, "LIBRARY", str(driver_path))
    monkeypatch.setattr(cuda_backend, "DLPACK_CUDA", DLPACK_CPU)
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    pairs = ("in_layer", "hand_over", "take", "alone", "norm_add", "norm_add_norm", "norm_hand_over")
    pairs += ("query_key", "rotated")
    for name in pairs:  # `enroll` fills them
        monkeypatch.setattr(native, name, native._declined)
    for name in ("_classes", "_alone", "_norm_add", "_norm_add_norm", "_query_key", "_rotated"):
        monkeypatch.setattr(native, name, {})
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()
    yield driver_path
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def twins(small_model) -> Callable[[], tuple[Model, Model]]:
    """(unpatched, patched) models of the same weights."""

    def make(model_type: str = "llama", **fields: object) -> tuple[Model, Model]:
        plain = small_model(model_type, num_hidden_layers=LAYERS, **fields)
        patched = copy.deepcopy(plain)
        rmsnorm_patch.apply(patched, backend="reference")
        return plain, patched

    return make


@pytest.fixture
def any_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers hand over to a test that calls them, as they do to the model's own loop."""
    monkeypatch.setattr("rmsnorm_patch.rewrite.layer_calls._called_by_loop", lambda loop: True)


@pytest.fixture
def model(small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model("llama", torch.float32, num_hidden_layers=native_model.LAYERS)


@pytest.fixture
def patched(model, launchers, monkeypatch) -> tuple[PreTrainedModel, Driver]:
    return model, native_model.patch(model, launchers, monkeypatch)
