"""--record and --compare: what cannot be written or read is known before the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_patch import api
from rmsnorm_patch.cli.output import USAGE


@pytest.fixture(autouse=True)
def _no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the proof was begun")

    monkeypatch.setattr(api, "verify", never)


def refused(ended: Any, *words: str) -> None:
    assert (ended.status, ended.document["error"]["type"]) == (USAGE, "UnsupportedInput")
    for word in words:
        assert word in ended.stderr.splitlines()[-1]


def test_a_place_that_cannot_be_written(command, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below, long = tmp_path / "file" / "logits", tmp_path / ("x" * 300)
    for target in (tmp_path, below, long, Path("/proc/nowhere/logits"), Path("/dev/full")):
        refused(command("verify", tiny_llama, "--record", target, "--json"), "--record", "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_can_be_written_is_left_as_it_was(
    command, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look beforehand leaves no empty file or folder, and no change in a file that is there."""
    (tmp_path / "old").write_text("kept")
    monkeypatch.setattr(api, "plan", lambda *_, **__: None)
    for target in (tmp_path / "old", tmp_path / "new", tmp_path / "a" / "b" / "new"):
        ended = command("verify", tiny_llama, "--record", target, "--json")
        assert "the proof was begun" in ended.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    assert (tmp_path / "old").read_text() == "kept"


def test_recordings_that_are_none(command, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    cases = {"nowhere": "no such file", "y" * 300: "File name too long", ".": "a folder"}
    cases |= {"text": "cannot be read", "weights": "without logits"}
    for name, word in cases.items():
        refused(command("verify", tiny_llama, "--compare", tmp_path / name, "--json"), "--compare", word)


def test_a_file_is_not_compared_with_itself(command, tiny_llama: Path, tmp_path: Path) -> None:
    """--record would write it first, and the comparison would always hold."""
    (tmp_path / "link").symlink_to(tmp_path / "logits")
    ended = command("verify", tiny_llama, "--record", tmp_path / "logits", "--compare", tmp_path / "link", "--json")
    refused(ended, "--record", "two files")
