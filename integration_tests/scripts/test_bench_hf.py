"""The end-to-end benchmark on a tiny model on the CPU: its columns, ratios and JSON, and what it refuses to time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ("--shape", "tiny", "--layers", "2", "--tokens", "3", "--rounds", "2", "--prefill", "1", "16", "--repeats", "1")


def bench(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(root / "scripts" / "bench_hf.py"), *SMALL, *options]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=900)


MARKS = {"compiled": [pytest.mark.slow, pytest.mark.long], "compiled reduce-overhead with ops": pytest.mark.slow}
"""Both flags together ask what each asks: the short form has no run with the first alone."""

MODES = {
    "eager": (),
    "compiled": ("--compile",),
    "compiled reduce-overhead with ops": ("--compile", "reduce-overhead", "--ops"),
}


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=MARKS.get(mode, [])) for mode in MODES])
def test_every_column_is_checked_timed_and_written(repository: Path, tmp_path: Path, mode: str) -> None:
    target = tmp_path / "out.json"
    ended = bench(repository, "--batch", "1", "2", "--json", str(target), *MODES[mode])
    assert ended.returncode == 0, ended.stderr
    assert "liger is not here: Liger's kernels need a GPU" in ended.stdout
    rows = json.loads(target.read_text())
    assert [row["work"] for row in rows] == ["decode 1", "decode 2", "prefill 1x16"]
    for row in rows:
        assert row["mode"] == mode
        assert list(row["tokens_per_s"]) == ["stock", "F.rms_norm", "patched", "removed"]
        for variant, ratio in row["ratio_to_stock"].items():
            low, high = row["spread"][variant]
            assert 0 < low <= row["tokens_per_s"][variant] <= high
            assert ratio == pytest.approx(row["tokens_per_s"][variant] / row["tokens_per_s"]["stock"], rel=1e-2)
        assert row["logit_error"]["patched"] == row["logit_error"]["stock"]
        assert mode != "eager" or row["logit_error"]["patched"] == 0.0
        assert row["logit_error"].keys() == {"stock", "F.rms_norm", "patched"}
        assert row["missing"] == {"liger": "Liger's kernels need a GPU"}


def test_sandwich_layouts_with_and_without_their_adds(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    shape = ("--shape", "tiny-gemma2", "--variants", "stock", "F.rms_norm", "patched", "patched-apart")
    ended = bench(repository, *shape, "--batch", "1", "--json", str(target))
    assert ended.returncode == 0, ended.stderr
    for row in json.loads(target.read_text()):
        assert list(row["tokens_per_s"]) == ["stock", "patched", "patched-apart"]
        assert set(row["logit_error"].values()) == {0.0}
        assert row["missing"] == {"F.rms_norm": "it is for Llama's norm, not for gemma2's"}


@pytest.mark.slow
def test_norms_that_take_over_products_in_captured_graphs(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    asked = ("--compile", "reduce-overhead", "--ops", "--variants", "stock", "joined", "--prefill")
    ended = bench(repository, "--batch", "2", *asked, "--json", str(target))
    assert ended.returncode == 0, ended.stderr
    (row,) = json.loads(target.read_text())
    assert list(row["tokens_per_s"]) == ["stock", "joined"]
    assert row["work"] == "decode 2"
    assert 0 < row["logit_error"]["joined"] != row["logit_error"]["stock"]


def test_no_work_is_a_wrong_use(repository: Path) -> None:
    for words in (("--prefill", "4"), ("--prefill", "--batch")):
        assert bench(repository, *words).returncode == 2


def test_a_variant_that_computes_something_else_is_not_timed(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    code = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "import bench_hf\n"
        "from benchlib import models\n"
        "models.VARIANTS['patched'] = models.removed_norm\n"
        f"sys.argv = ['bench_hf.py', *{SMALL!r}, '--json', {str(target)!r}]\n"
        "bench_hf.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "patched differs from stock" in ended.stderr
    assert not target.exists()


def test_stock_is_always_a_column(repository: Path) -> None:
    ended = bench(repository, "--variants", "patched")
    assert ended.returncode == 2
    assert "must hold stock" in ended.stderr
