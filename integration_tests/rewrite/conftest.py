"""launcher.c serves CPU tensors: its driver is `cpu_driver.c`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import cache, driver, launcher
from rmsnorm_patch.rewrite import native

sys.path.insert(0, str(Path(__file__).parent))  # `native_driver`: test folders are not packages

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
    pairs = ("in_layer", "hand_over", "take", "alone", "norm_add", "norm_add_norm", "norm_hand_over", "query_key")
    for name in pairs:  # `enroll` fills them
        monkeypatch.setattr(native, name, native._declined)
    for name in ("_classes", "_alone", "_norm_add", "_norm_add_norm", "_query_key"):
        monkeypatch.setattr(native, name, {})
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()
    yield driver_path
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()
