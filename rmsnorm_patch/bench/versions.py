"""Versions of what a measurement ran with."""

from __future__ import annotations

import importlib.metadata
import sys

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "flashinfer-python", "vllm")


def versions(*more: str) -> dict[str, str]:
    """Package -> version of this interpreter and of those of PACKAGES and `more` that are installed."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in (*PACKAGES, *more):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
