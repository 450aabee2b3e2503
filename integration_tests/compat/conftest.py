"""The kernel folder, written once, and models that the `kernels` library gives its layers to."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn as nn
import transformers

import kernels

MARK = re.compile(r'^@use_kernel_forward_from_hub\("(RMSNorm\w*)"\)\nclass (\w+)', flags=re.MULTILINE)


@pytest.fixture(scope="session")
def named_classes() -> list[tuple[str, type[nn.Module]]]:
    """(layer name, class) of every class that this transformers marks for one of our layers."""
    folder = Path(transformers.__file__).parent / "models"
    found = []
    for path in sorted(folder.glob("*/modeling_*.py")):
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        found += [
            (layer, getattr(importlib.import_module(module), name)) for layer, name in MARK.findall(path.read_text())
        ]
    return found


@pytest.fixture(scope="session")
def kernel_folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "rmsnorm-patch"
    subprocess.run([sys.executable, repository / "scripts" / "kernel_folder.py", folder], check=True)
    return folder


@pytest.fixture
def kernelize(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`kernelize(model, {"RMSNorm": LlamaRMSNorm}, mode)`: the library puts our layers over these classes.

    transformers marks its classes itself only for the release of `kernels` that it wants; here they are marked by the
    library's own function, which is what the mark calls.
    """

    def run(model: Any, classes: dict[str, type], mode: Any = kernels.Mode.INFERENCE) -> Any:
        for layer, cls in classes.items():
            for name in ("kernel_layer_name", "kernel_condition"):
                monkeypatch.setattr(cls, name, vars(cls).get(name), raising=False)
            kernels.replace_kernel_forward_from_hub(cls, layer)
        mapping = {layer: {"cpu": kernels.LocalLayerRepository(kernel_folder, layer_name=layer)} for layer in classes}
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            return kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)

    return run


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU: Triton's, interpreted. Set before a module is called for the first time."""
    monkeypatch.setenv("RMSNORM_PATCH_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
