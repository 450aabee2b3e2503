"""bench_diffusion.py on the CPU, with one layer and a few tokens: it runs, compares and reports."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)


@pytest.mark.slow
def test_a_step_is_compared_and_timed(script, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    sizes = {"layers": 1, "frames": 1, "height": 2, "width": 2, "rounds": 2, "repeats": 1}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    found = script("bench_diffusion").main(["--model=ltx", *words, f"--json={target}"])
    assert json.loads(target.read_text()) == found
    assert found["tokens"] == 4
    assert found["difference"] == 0.0  # on the CPU patched layers run the model's own operations
    assert set(found["ms"]) == {"stock", "patched"}
    assert found["speedup"] > 0
