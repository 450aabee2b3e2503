"""Where the tests of Triton's kernels find `ahead`, and where Triton keeps what it compiles."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # test folders are not packages
from kept import kept_folder  # noqa: E402


@pytest.fixture(autouse=True)
def triton_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one worker compiled is read by the other, and stays with the environment: Triton finds it by the kernel's
    text, what that calls, its own release and the options."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(kept_folder("triton")))
