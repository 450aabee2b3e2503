"""`rmsnorm-patch bench-kernels` on a GPU: document, rows and plot within a minute, and whom it does not time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytestmark = pytest.mark.gpu

SECONDS = 60.0
LENGTHS = (256, 512)
PROVIDERS = """
from torch.nn.functional import rms_norm

def right(x, weight, eps):
    return rms_norm(x, x.shape[-1:], weight, eps)

def wrong(x, weight, eps):
    return 1.05 * right(x, weight, eps)
"""


def bench(repository: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder of its own, whose modules can be named as providers."""
    paths = [str(repository), str(cwd), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "rmsnorm_patch", "bench-kernels", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.alone
def test_kernels_are_timed_beside_peers_and_drawn(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text(PROVIDERS)
    plot, rows = tmp_path / "times.svg", tmp_path / "rows.json"
    shapes = ["--op", "rms_norm", "--m", "64", *(word for n in LENGTHS for word in ("--n", str(n))), "--replays", "5"]
    others = ["--provider", "mine=others:right", "--provider", "bad=others:wrong"]
    begun = time.monotonic()
    ended = bench(repository, tmp_path, *shapes, *others, "--json", "--plot", str(plot), "--rows", str(rows))
    taken = time.monotonic() - begun
    assert ended.returncode == 0, ended.stderr[-3000:]
    document = json.loads(ended.stdout)
    assert document["device"]["name"] == torch.cuda.get_device_name(0)
    assert document["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert json.loads(rows.read_text()) == document["rows"]
    assert [(row["m"], row["n"]) for row in document["rows"]] == [(64, n) for n in LENGTHS]
    for row in document["rows"]:
        assert {"ours", "ours_triton", "eager", "F.rms_norm", "inductor", "mine"} <= row["us"].keys()
        for name, us in row["us"].items():
            low, high = row["spread"][name]
            assert 0 < low <= us <= high, name
        assert "relative error" in row["failed"]["bad"]
        assert "bad" not in row["us"]
        assert row["roofline_us"] > 0
    assert document["summary"]
    drawn = ElementTree.parse(plot).getroot()
    assert drawn.tag.endswith("svg")
    assert {"ours", "mine"} <= {text.strip() for text in drawn.itertext()}
    assert taken < SECONDS


def test_the_table_and_the_refusals(repository: Path, tmp_path: Path) -> None:
    shapes = ["--op", "rms_norm", "--m", "1", "--n", "256", "--replays", "5"]
    ended = bench(repository, tmp_path, *shapes, "--only", "ours", "--only", "F.rms_norm")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "1 x 256" in ended.stdout
    assert "F.rms_norm" in ended.stdout
    refused = bench(repository, tmp_path, "--op", "layer_norm", "--json")
    assert refused.returncode == 2
    assert "not one of fused_add_rms_norm" in json.loads(refused.stdout)["error"]["got"]
