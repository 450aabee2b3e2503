"""`scripts/demo.py`, what `make demo` runs: end to end on the shipped checkpoints, and red when a kernel is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def demo(root: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the demo of the checkout at `root`, on the CPU, in its own process."""
    words = [sys.executable, "scripts/demo.py", *options, "--device", "cpu", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    return subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """A copy of what the demo uses, to break."""
    for name in ("rmsnorm_patch", "kernels", "scripts", "integration_tests/data"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_demo_shows_the_whole_story(repository: Path) -> None:
    ended = demo(repository, "--max-new-tokens", "12")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in ("tiny-llama", "tiny-mistral"):
        assert f"PASSED {name}" in ended.stdout
    for part in ("[0-3]", "proved", "12 tokens equal; after revert equal", "tokens per second", "no speed-up"):
        assert ended.stdout.count(part) >= 2, part
    after = ended.stdout.split("This machine has no GPU")
    assert len(after) == 2 - torch.cuda.is_available()
    if not torch.cuda.is_available():
        told = " ".join(after[1].split())
        assert "backend triton: proved" in told
        assert "captured in bfloat16 by triton" in told
        assert re.search(r"kernels ran, and patched over stock was [\d.]+x \(decode 1\b.*\), .*\(prefill ", told)
        (file,) = re.findall(r"Llama-8B shapes, (records/\S*\.json)\.$", told)
        models = json.loads((repository / file).read_text())["hf"]
        (row,) = [
            row for row in models if (row["model"], row["mode"], row["work"]) == ("llama-8b", "eager", "decode 1")
        ]
        (low, high), (its_low, its_high) = (row["spread"][name] for name in ("patched", "stock"))
        assert ("(decode 1, rounds overlap)" in told) == (low <= its_high and its_low <= high)
    assert "torchao" not in ended.stderr


def test_demo_as_json(command, repository: Path) -> None:
    folders = [repository / "integration_tests" / "data" / name for name in ("tiny-llama", "tiny-mistral")]
    found = command("demo", *folders, "--json", "--max-new-tokens", 8, "--rounds", 1, "--device", "cpu").document
    assert found["passed"] is True
    assert [c["checkpoint"] for c in found["checkpoints"]] == ["tiny-llama", "tiny-mistral"]
    for story in found["checkpoints"]:
        assert story["same_text"]
        assert story["restored"]
        assert story["stock_text"] == story["patched_text"]
        assert story["proof"]["fired"]["fused"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("bits", [10, pytest.param(17, marks=pytest.mark.long)])
def test_triton_kernels_pass_and_a_wrong_one_fails(
    checkout: Path, bits: int, first_layers: Callable[..., Path], tiny_llama: Path
) -> None:
    """The Triton kernels in the interpreter prove themselves; with four times eps they turn the demo red. A probe of
    the short form has 2**10 elements, and the model one layer: the interpreter is slow with the 2**17 of a GPU."""
    model = first_layers(tiny_llama, checkout / "one-layer", 1) if bits < 17 else tiny_llama
    probes = checkout / "rmsnorm_patch" / "proof" / "probes.py"
    assert "_ELEMENTS = 1 << 17\n" in probes.read_text()
    probes.write_text(probes.read_text().replace("_ELEMENTS = 1 << 17\n", f"_ELEMENTS = 1 << {bits}\n"))
    options = (str(model), "--backend", "triton", "--max-new-tokens", "2", "--json")
    right = demo(checkout, *options, TRITON_INTERPRET="1")
    assert right.returncode == 0, right.stdout + right.stderr
    backends = {b for c in json.loads(right.stdout)["checkpoints"] for s in c["proof"]["sites"] for b in s["backends"]}
    assert backends == {"triton"}
    source = checkout / "kernels" / "triton" / "row_math.py"
    text = source.read_text()
    assert "/ WIDTH + eps\n" in text
    source.write_text(text.replace("/ WIDTH + eps\n", "/ WIDTH + eps * 4\n"))
    wrong = demo(checkout, *options, TRITON_INTERPRET="1")
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    (story,) = json.loads(wrong.stdout)["checkpoints"]
    assert (story["passed"], story["proof"]["passed"], story["restored"]) == (False, False, True)
