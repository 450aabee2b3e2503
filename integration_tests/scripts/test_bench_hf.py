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


def test_a_captured_step_and_what_torch_puts_in_atens_place(repository: Path, tmp_path: Path) -> None:
    """On the CPU the step is repeated as it is, and torch has nothing in aten's place."""
    target = tmp_path / "out.json"
    wanted = ("--captured", "--variants", "stock", "F.rms_norm", "F.rms_norm-quack", "patched")
    ended = bench(repository, *wanted, "--batch", "1", "2", "--json", str(target))
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(target.read_text())
    assert [(row["work"], row["mode"]) for row in rows] == [("decode 1", "captured"), ("decode 2", "captured")]
    for row in rows:
        assert list(row["tokens_per_s"]) == ["stock", "F.rms_norm", "patched"]
        assert min(row["tokens_per_s"].values()) > 0
        assert row["norm_kernels"] == {"F.rms_norm": []}
        assert "no kernel in place of aten's _fused_rms_norm" in row["missing"]["F.rms_norm-quack"]
    assert bench(repository, "--captured", "--compile").returncode == 2


OVERRIDDEN = """
import sys; sys.path.insert(0, "scripts")
import torch
from benchlib import models
from torch._native import registry
def doubled(input, normalized_shape, weight, eps):
    return 2 * input, input
registry.register_op_override("cutedsl", "aten", models.REPLACED, "CPU", lambda *given: True, doubled)
registry._register_all_overrides()
def ran():
    return float(torch.ops.aten._fused_rms_norm(torch.ones(1, 4), [4], torch.ones(4), 1e-6)[0][0, 0])
before = ran()
for variant in ("F.rms_norm", models.VENDORED, "patched", models.VENDORED):
    with models.kernels_of(variant):
        print(variant, round(ran()))
print("as before", ran() == before == 2.0)
"""


def test_only_the_column_of_that_name_has_torchs_replacement(repository: Path) -> None:
    pytest.importorskip("torch._native.registry", reason="this torch replaces no kernel of aten's")
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    words = [sys.executable, "-c", OVERRIDDEN]
    ended = subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, check=True)
    assert [line.partition(" ")[2] for line in ended.stdout.splitlines()] == ["1", "2", "1", "2", "before True"]


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
