"""`rmsnorm-patch bench-kernels` without a GPU: its refusal, its words and its table."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rmsnorm_patch.cli.kernel_bench import Request, kernel_table, tell


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rmsnorm_patch", "bench-kernels", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so(repository: Path) -> None:
    ended = bench("--suite", "hot", "--json", cwd=repository)
    assert ended.returncode == 5
    document = json.loads(ended.stdout)
    assert document["exit_status"] == 5
    assert document["error"]["got"] == "no CUDA device"


def test_processes_that_compile_ahead_are_asked_for_the_same_cases() -> None:
    request = Request(
        ("hot", "qk"), {"op": "", "mode": "cold", "dtype": "fp16", "m": [1, 2], "n": None}, ("ours",), (), 20, 60.0
    )
    words = [
        "--suite",
        "hot",
        "--suite",
        "qk",
        "--only",
        "ours",
        "--mode",
        "cold",
        "--row-dtype",
        "fp16",
        "--m",
        "1",
        "--m",
        "2",
    ]
    assert request.arguments() == ["bench-kernels", *words]


def test_the_table_has_the_best_of_ours_and_the_best_peer() -> None:
    shape = {"op": "rms_norm", "mode": "cold", "dtype": "bf16", "variant": "", "m": 4096, "n": 2048}
    us = {"ours": 4.0, "ours_triton": 5.0, "quack": 6.0, "liger": 8.0}
    table = kernel_table([{**shape, "us": us, "failed": {}, "roofline_us": 3.8}])
    cells = [next(iter(column.cells)) for column in table.columns]
    others = "quack 6.00\nours_triton 5.00\nliger 8.00"
    assert cells == ["rms_norm cold bf16\n4096 x 2048", "4.00", others, "1.500", "0.950"]


def test_no_name_is_parted_on_a_narrow_screen() -> None:
    shape = {
        "op": "fused_add_rms_norm",
        "mode": "cold",
        "dtype": "bf16",
        "variant": "fp32 weight",
        "m": 4096,
        "n": 32768,
    }
    us = {"ours_inplace": 1234.5, "F.rms_norm": 3456.7, "flashinfer_cuda": 2345.6}
    console = Console(width=80, file=io.StringIO())
    console.print(kernel_table([{**shape, "us": us, "failed": {}, "roofline_us": 1000.0}]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in printed for name in ("fused_add_rms_norm", "4096 x 32768", "F.rms_norm", "flashinfer_cuda"))
    assert "…" not in printed


def test_what_was_right_the_times_and_the_plot_are_told() -> None:
    """Of one command: the correctness of every result, a table, and where the plot is."""
    shape = {"op": "rms_norm", "mode": "cold", "dtype": "fp16", "variant": "", "m": 4096, "n": 1024}
    row = {**shape, "us": {"ours": 4.0, "eager": 8.0}, "failed": {"liger": "relative error 0.1 > 0.01"}}
    console = Console(width=120, file=io.StringIO())
    tell(console, [{**row, "roofline_us": 3.8}], Path("fp16.svg"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "held against fp64 before they were timed: 2 results right, 1 without a figure" in printed
    assert "rms_norm cold 4096 x 1024: no figure for liger: relative error 0.1 > 0.01" in printed
    assert "4096 x 1024" in printed
    assert printed.rstrip().endswith("drawn: fp16.svg")
    tell(console, [{**row, "roofline_us": 3.8}], None)
    assert console.file.getvalue().count("drawn") == 1  # type: ignore[attr-defined]
