"""bench_silu.py on the CPU: every scheme is checked, and wrong rows are not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def test_every_scheme_is_checked_and_reported(script, tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    found = script("bench_silu").main(["--rows", "3", "--columns", "512", f"--json={target}"])
    assert json.loads(target.read_text()) == found
    bench = script("bench_silu")
    assert [(row["scheme"], row["m"], row["n"], row["failed"]) for row in found] == [
        (scheme, 3, 512, {}) for scheme in bench.SCHEMES
    ]


@pytest.mark.parametrize("scheme", ["static", "token", "block"])
def test_what_is_compiled_is_right(script, scheme: str) -> None:
    bench = script("bench_silu")
    with torch.compiler.set_stance("force_eager"):
        assert bench.wrong(bench.inductor(scheme), scheme, bench.operands(5, 512, 1)[0]) == ""


@pytest.mark.parametrize("scheme", ["static", "token", "block", "block-columns", "int8"])
def test_a_provider_that_computes_something_else_is_refused(script, scheme: str) -> None:
    bench = script("bench_silu")
    right = bench.providers(scheme)[0]["reference"]
    x = bench.operands(5, 512, 1)[0]
    assert bench.wrong(right, scheme, x) == ""
    larger = torch.cat([x[:, :512], x[:, 512:] * 1.3], -1)
    assert "half a step" in bench.wrong(lambda x: right(larger), scheme, x)
    assert "half a step" in bench.wrong(lambda x: right(x.roll(1, -1)), scheme, x)
    assert "returned" in bench.wrong(lambda x: right(x[:, ::2].contiguous()), scheme, x)


def test_bytes_are_those_of_both_halves_rows_and_scales(script) -> None:
    bench = script("bench_silu")
    m, n = 4096, 14336
    assert {scheme: bench.bytes_of(scheme, m, n) - 5 * m * n for scheme in bench.SCHEMES} == {
        "static": 0,
        "token": 4 * m,
        "block": 4 * m * 112,
        "block-columns": 4 * m * 112,
        "int8": 4 * m,
    }
