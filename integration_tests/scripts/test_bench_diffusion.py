"""bench_diffusion.py on the CPU, with few layers and tokens: it compares, times and reports; graphs are as asked."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

SIZES = {"layers": 1, "frames": 1, "height": 2, "width": 2, "rounds": 2, "repeats": 1}
WORDS = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("bench_diffusion")


def test_a_step_is_compared_and_timed(bench: ModuleType, script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.json"
    first = bench.main(["--model=ltx", "--modes=eager", *WORDS, f"--json={target}"])
    assert json.loads(target.read_text()) == first
    row = first["rows"][0]
    assert (row["model"], row["mode"], row["tokens"], row["layers"]) == ("ltx", "eager", 4, 1)
    assert row["sites"]["norm/fuse"] == 6
    assert row["difference"] == {"stock": 0.0, "patched": 0.0}  # on the CPU patched layers run the model's operations
    for variant, ms in row["ms"].items():
        least, most = row["spread"][variant]
        assert 0 < least <= ms <= most
        assert row["ratio_to_stock"][variant] == pytest.approx(row["ms"]["stock"] / ms, rel=1e-3)
    section = script("diffusion_matrix").speed(target.parent)
    assert f"| ltx | 4 | eager | {row['ms']['stock']:.2f} (" in section[-1]
    assert first["digest"][:16] in "".join(section)
    both = bench.main(["--model=wan", "--modes=eager", *WORDS, f"--json={target}"])
    assert [row["model"] for row in both["rows"]] == ["ltx", "wan"]
    target.write_text(json.dumps({**both, "digest": "of other code"}))
    assert [
        row["model"] for row in bench.main(["--model=wan", "--modes=eager", *WORDS, f"--json={target}"])["rows"]
    ] == ["wan"]


@pytest.mark.parametrize("mode", ["compiled", pytest.param("with ops", marks=pytest.mark.gpu)])
def test_graphs_have_our_ops_where_that_is_asked(bench: ModuleType, mode: str) -> None:
    graphs: list[bool] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(any("rmsnorm_patch" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, step = bench.ltx(2, bench.Video(1, 2, 2), device, torch.bfloat16)
    bench.cast(model.to(device), torch.bfloat16)
    with torch.no_grad():
        made, _ = bench.variants_of(model, mode, compiler)
        bench.check(made, mode, step, step(model).float())
        assert graphs[0] is False  # stock's
        assert all(graph == (mode == "with ops") for graph in graphs[1:])
        assert len(graphs) > 1
        count = len(graphs)
        bench.alternate(made, step, rounds=2, repeats=1)
    assert len(graphs) == count  # nothing is compiled while it is timed


def test_the_variable_is_as_it_was(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "decomposed"):
        monkeypatch.delenv("RMSNORM_PATCH_COMPILE", raising=False)
        if before is not None:
            monkeypatch.setenv("RMSNORM_PATCH_COMPILE", before)
        with bench.graphs_keep_ops(True):
            assert os.environ["RMSNORM_PATCH_COMPILE"] == "op"
        assert os.environ.get("RMSNORM_PATCH_COMPILE") == before


def test_a_wrong_result_ends_the_run(bench: ModuleType) -> None:
    model, step = bench.ltx(1, bench.Video(1, 2, 2), "cpu", torch.bfloat16)
    bench.cast(model, torch.bfloat16)
    with torch.no_grad():
        made, _ = bench.variants_of(model, "eager", "inductor")
        want = step(model).float()
        made["patched"].proj_out.weight.mul_(1.1)
        with pytest.raises(SystemExit, match="patched differs by"):
            bench.check(made, "eager", step, want)


def test_what_a_class_keeps_in_fp32_stays_so(bench: ModuleType) -> None:
    model, _ = bench.wan(1, bench.Video(1, 2, 2, patch=4), "cpu", torch.bfloat16)
    found = {name: p.dtype for name, p in bench.cast(model, torch.bfloat16).named_parameters()}
    assert found["blocks.0.attn1.norm_q.weight"] == torch.bfloat16
    assert found["blocks.0.scale_shift_table"] == torch.float32
    assert torch.get_default_dtype() == torch.float32
