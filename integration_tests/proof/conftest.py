"""Kernels of the tests' own under the bound ops."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.fused.norm_add.op import BoundNormAdd

sys.path.insert(0, str(Path(__file__).parent))  # `proof_models`: test folders are not packages


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """kernel(f) puts f(op, spec, x, residual or None, weight, eps) under every bound op; the ops of an add behind a
    norm are made of it."""

    def install(function: Callable) -> None:
        def call(self: ops.Bound, *args: torch.Tensor) -> object:
            x, weight, eps = args[0], args[-2], args[-1]
            return function(self.op, self.spec, x, args[1] if len(args) == 4 else None, weight, eps)

        monkeypatch.setattr(ops.Bound, "__call__", call)
        monkeypatch.setattr(BoundNormAdd, "_route", lambda self, x, weight: ("triton", self._apart))
        monkeypatch.setattr(ops.Bound, "backend_for", lambda self, x, weight=None, residual=None: "triton")

    return install
