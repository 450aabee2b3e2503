"""The trial of a rotation in the launch of a query's and a key's norm: its kernel compiles, its figure comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def trial(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("trial_query_key")


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_kernel_compiles_with_its_arguments_as_they_are_packed(trial: ModuleType, arch: int) -> None:
    code, build, layout = trial.machine_code(arch, 128)
    assert trial.ENTRY.encode() in code
    assert build.config.kernel == "rms_norm_pair"
    assert layout.size == 112


def test_the_figure_comes_out_as_one_ratio(trial: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    written = tmp_path / "trial.json"
    arguments = ["--shape", "tiny", "--tokens", "2", "--rounds", "2", "--batch", "1", "2", "--json", str(written)]
    rows = trial.main(arguments)
    assert json.loads(written.read_text()) == rows
    assert [row["batch"] for row in rows] == [1, 2]
    assert list(rows[0]["tokens_per_s"]) == ["stock", "norms", "query_key", "rotated", "removed"]
    figure = min(row["over_norms"]["rotated"] for row in rows)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rotation in the launch"))
    assert f"{figure:.4f}x; aim 1.08x" in line


def test_no_round_begins_after_its_time(trial: ModuleType) -> None:
    rows = trial.main(["--shape", "tiny", "--tokens", "1", "--rounds", "50", "--batch", "1", "--seconds", "0"])
    assert rows[0]["rounds"] == 1


def test_wrong_bits_are_not_timed(trial: ModuleType) -> None:
    models = trial.variants(trial.build("tiny", "cpu", 1), trial.model_own)

    def without_norm(query, key, query_norm, key_norm, cos, sin):
        return trial.model_own(query, key, torch.nn.Identity(), torch.nn.Identity(), cos, sin)

    with pytest.raises(SystemExit, match="elements differ at batch 1, length 1"):
        trial.check_rotation(without_norm, models["norms"])
    with pytest.raises(SystemExit, match="rotated gives other logits than norms"):
        trial.check_logits({**models, "rotated": models["removed"]})
