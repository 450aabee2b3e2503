"""The end-to-end benchmark on a tiny model on the CPU: its columns, ratios and JSON, and what it refuses to time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SMALL = ("--shape", "tiny", "--layers", "2", "--tokens", "3", "--rounds", "2", "--prefill", "1", "16", "--repeats", "1")
SMALL += ("--device", "cpu")
Bench = Callable[..., str]


@pytest.fixture
def bench(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    """`bench("--json", path)` runs it in this process and gives what it wrote. What --compile and --ops set for a
    process is as it was behind the test."""
    monkeypatch.setenv("RMSNORM_PATCH_COMPILE", "")
    monkeypatch.delenv("RMSNORM_PATCH_COMPILE")
    module = script("bench_hf")

    def run(*options: str) -> str:
        capsys.readouterr()
        module.main([*SMALL, *options])
        return capsys.readouterr().out

    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield run
    torch._dynamo.reset()


LONG = [pytest.mark.slow, pytest.mark.long]
MARKS = {"compiled": LONG, "compiled reduce-overhead with ops": LONG}
"""The short form of both is `test_norms_that_take_over_products_in_captured_graphs`."""

FEW = ("--layers", "1", "--variants", "stock", "patched")
"""Each variant is compiled for each work, and once more to be checked."""

MODES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "compiled": ("--compile",),
    "compiled reduce-overhead with ops": ("--compile", "reduce-overhead", "--ops", *FEW, "--batch", "2"),
}


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=MARKS.get(mode, [])) for mode in MODES])
def test_every_column_is_checked_timed_and_written(bench: Bench, tmp_path: Path, mode: str) -> None:
    target = tmp_path / "out.json"
    told = bench("--batch", "1", "2", "--json", str(target), *MODES[mode])
    rows = json.loads(target.read_text())
    if "ops" in mode:
        works, variants = ["decode 2", "prefill 1x16"], ["stock", "patched"]
    else:
        works = ["decode 1", "decode 2", "prefill 1x16"]
        variants = ["stock", "F.rms_norm", "patched", "removed"]
        assert "liger is not here: Liger's kernels need a GPU" in told
        assert {str(row["missing"]) for row in rows} == {str({"liger": "Liger's kernels need a GPU"})}
    assert [row["work"] for row in rows] == works
    for row in rows:
        assert row["mode"] == mode
        assert list(row["tokens_per_s"]) == variants
        for variant, ratio in row["ratio_to_stock"].items():
            low, high = row["spread"][variant]
            assert 0 < low <= row["tokens_per_s"][variant] <= high
            assert ratio == pytest.approx(row["tokens_per_s"][variant] / row["tokens_per_s"]["stock"], rel=1e-2)
        assert row["logit_error"]["patched"] == row["logit_error"]["stock"]
        assert mode != "eager" or row["logit_error"]["patched"] == 0.0
        assert row["logit_error"].keys() == {*variants} - {"removed"}


def test_a_captured_step_and_what_torch_puts_in_atens_place(bench: Bench, tmp_path: Path) -> None:
    """On the CPU the step is repeated as it is, and torch has nothing in aten's place."""
    target = tmp_path / "out.json"
    wanted = ("--captured", "--variants", "stock", "F.rms_norm", "F.rms_norm-quack", "patched")
    bench(*wanted, "--batch", "1", "2", "--json", str(target))
    rows = json.loads(target.read_text())
    assert [(row["work"], row["mode"]) for row in rows] == [("decode 1", "captured"), ("decode 2", "captured")]
    for row in rows:
        assert list(row["tokens_per_s"]) == ["stock", "F.rms_norm", "patched"]
        assert min(row["tokens_per_s"].values()) > 0
        assert row["norm_kernels"] == {"F.rms_norm": []}
        assert "no kernel in place of aten's _fused_rms_norm" in row["missing"]["F.rms_norm-quack"]


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


def test_sandwich_layouts_with_and_without_their_adds(bench: Bench, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    shape = ("--shape", "tiny-gemma2", "--variants", "stock", "F.rms_norm", "patched", "patched-apart")
    bench(*shape, "--batch", "1", "--json", str(target))
    for row in json.loads(target.read_text()):
        assert list(row["tokens_per_s"]) == ["stock", "patched", "patched-apart"]
        assert set(row["logit_error"].values()) == {0.0}
        assert row["missing"] == {"F.rms_norm": "it is for Llama's norm, not for gemma2's"}


@pytest.mark.slow
def test_norms_that_take_over_products_in_captured_graphs(bench: Bench, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    asked = ("--compile", "reduce-overhead", "--ops", "--layers", "1", "--variants", "stock", "joined", "--prefill")
    bench("--batch", "2", *asked, "--json", str(target))
    (row,) = json.loads(target.read_text())
    assert list(row["tokens_per_s"]) == ["stock", "joined"]
    assert (row["work"], row["mode"]) == ("decode 2", "compiled reduce-overhead with ops")
    assert 0 < row["logit_error"]["joined"] != row["logit_error"]["stock"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--prefill", "4"), "--prefill takes BATCH and LENGTH"),
        (("--prefill", "--batch"), "--prefill takes BATCH and LENGTH"),
        (("--captured", "--compile"), "a captured step is an eager one"),
        (("--variants", "patched"), "must hold stock"),
    ],
)
def test_wrong_uses(bench: Bench, words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(*words)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_variant_that_computes_something_else_is_not_timed(
    bench: Bench, script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.json"
    models = script("benchlib.models")
    monkeypatch.setitem(models.VARIANTS, "patched", models.removed_norm)
    with pytest.raises(SystemExit, match="patched differs from stock"):
        bench("--json", str(target))
    assert not target.exists()


def test_it_is_a_program(repository: Path) -> None:
    words = [sys.executable, "scripts/bench_hf.py", *SMALL, "--variants", "stock", "--batch", "1"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    ended = subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, check=True)
    assert "eager decode 1: stock" in ended.stdout
