"""What a graph reads stays where it is, while others are captured in its neighbours' place and memory goes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import WIDE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROGRAM = Path(__file__).with_name("captured_anew.py")


@pytest.fixture
def last_line(vllm_processes: Any, own_device: dict[str, str]) -> Callable[..., str]:
    def ran(*words: str, **variables: str) -> str:
        done = vllm_processes.run_program([str(PROGRAM), *words], vllm_processes.environment(**own_device, **variables))
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
        return str(done.stdout.splitlines()[-1])

    return ran


# Graphs of one stream share a cuBLAS workspace, which ends with the first of them (torch 2.14). So nothing is said
# of products whose neighbours end on their stream.
@pytest.mark.parametrize(
    ("what", "how"),
    [
        *[("norms", how) for how in ("keep", "elsewhere", "drop")],
        *[(what, how) for what in ("joined", "products") for how in ("keep", "elsewhere")],
    ],
)
def test_a_graph_reads_nothing_that_is_given_back(what: str, how: str, last_line: Callable[..., str]) -> None:
    assert last_line(what, how) == "same"


@pytest.mark.slow
@pytest.mark.parametrize("route", ["off", "ir"])
def test_an_engine_whose_full_graphs_are_captured_anew(
    route: str, tmp_path: Path, random_checkpoint: Callable[..., Path], last_line: Callable[..., str]
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    folder = random_checkpoint(tmp_path / "model", "llama", std=0.02, num_hidden_layers=1, **WIDE)
    variables = {"RMSNORM_PATCH_VLLM": route, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    assert last_line("engine", "keep", str(folder), **variables) == "same"
