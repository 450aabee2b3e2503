"""bench_gated.py on the CPU: every shape is built, and every provider held against the module."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def test_every_shape_is_checked_and_reported(script, tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    found = script("bench_gated").main(["--tokens", "2", "--mode", "hot", f"--json={target}"])
    assert json.loads(target.read_text()) == found
    assert {row["model"]: (row["m"], row["n"], row["failed"]) for row in found} == {
        "qwen3_next": (64, 128, {}),
        "mamba2": (2, 8192, {}),
        "bamba": (2, 8192, {}),
    }


def test_a_provider_that_computes_something_else_is_refused(script) -> None:
    bench = script("bench_gated")
    shape = bench.SHAPES["qwen3_next"]
    norm, (x, gate) = bench.module_of(shape), bench.operands(shape, 2, 1)[0]
    said = bench.wrong(lambda x, gate: norm(x, gate * 1.05), norm, x, gate, exact=True)
    assert "elements" in said or "ulp" in said
    assert "returned" in bench.wrong(lambda x, gate: norm(x, gate).to(torch.float32), norm, x, gate, exact=False)
