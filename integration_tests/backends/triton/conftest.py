"""Where the tests of Triton's kernels find `ahead`, and where Triton keeps what it compiles."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test folders are not packages


@pytest.fixture(autouse=True)
def triton_cache(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is answered from an earlier run, and what one worker compiled is read by the other."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared_folder / "triton"))
