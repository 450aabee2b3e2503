"""Where the tests of Triton's kernels find `ahead`, and where Triton keeps what it compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # test folders are not packages
from kept import kept_folder  # noqa: E402


@pytest.fixture(autouse=True)
def triton_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one worker compiled is read by the other, and stays with the environment: Triton finds it by the kernel's
    text, what that calls, its own release and the options."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(kept_folder("triton")))


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Runs kernels in the interpreter, and keeps what its operation of a name is handed first, as arrays."""
    from rmsnorm_patch.backends.triton import loader

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loader.load("row_math", interpreted=True)
    from triton.runtime.interpreter import interpreter_builder

    def kept(name: str) -> list[Any]:
        inherited, found = getattr(interpreter_builder, name), []

        def heard(values: Any, *rest: Any) -> Any:
            found.append(values.data.copy())
            return inherited(values, *rest)

        monkeypatch.setattr(interpreter_builder, name, heard)
        return found

    return kept
