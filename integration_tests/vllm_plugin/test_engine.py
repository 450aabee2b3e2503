"""A real vLLM engine on the CPU: the plugin's ops run in it, as often as they should, and change no token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parent.parent / "data"
LAYERS = {"tiny-llama": 4, "tiny-mistral": 4, "shallow-llama": 2, "qwen3": 2}
HEAD_DIM = 32
LOGPROB_TOLERANCE = 0.05
"""Logprobs of a bf16 model whose norms differ by one rounding: its logits are of the order 10, where bf16 steps by
0.06, and the final matrix product averages the differences. Used only where vLLM's compiler reorders the sums."""


def _folder(name: str, checkpoints: Callable[[str], Path]) -> Path:
    return DATA / name if (DATA / name).exists() else checkpoints(name)


def _calls(trace: list[dict[str, Any]], width: int) -> Counter[str]:
    return Counter(line["op"] for line in trace if line["shape"][-1] == width)


COUNTED = [
    *[("tiny-llama", "ir", True), ("shallow-llama", "ir", False), ("tiny-llama", "oot", True)],
    *[("qwen3", "ir", True), ("tiny-mistral", "oot", True)],
    pytest.param("qwen3", "ir", False, marks=pytest.mark.long),
    pytest.param("tiny-llama", "oot", False, marks=pytest.mark.long),
    pytest.param("qwen3", "oot", False, marks=pytest.mark.long),
    pytest.param("tiny-mistral", "ir", False, marks=pytest.mark.long),
]
"""The routes share their calls, and mistral its decoder with llama: what takes time is a compiled engine's graph.
test_whole_compiler.py counts the calls of a compiled engine on route oot. test_explain.py asks both routes of qwen3 who
computes its norms over heads, and test_lowering.py sees it in a graph."""


@pytest.mark.parametrize(("name", "route", "eager"), COUNTED)
def test_calls_per_forward(name: str, route: str, eager: bool, run_engine: Any, checkpoints: Any) -> None:
    answer = run_engine(_folder(name, checkpoints), eager, route, op_form=True)
    forwards, layers = answer["forwards"], LAYERS[name]
    assert forwards >= 8
    width = answer["trace"][0]["shape"][-1]
    assert _calls(answer["trace"], width) == {"rms_norm": forwards, "fused_add_rms_norm": 2 * layers * forwards}
    assert answer["norms"] == (["PatchedRMSNorm"] if route == "oot" else ["RMSNorm"])
    assert not answer["cuda_initialised"]
    heads = [line for line in answer["trace"] if line["shape"][-1] != width]
    if name != "qwen3" or not eager:  # compiled, the norms over heads are the compiler's
        assert heads == []
        return
    assert len(heads) == 2 * layers * forwards
    assert {(line["op"], len(line["shape"]), line["result_contiguous"]) for line in heads} == {("rms_norm", 3, True)}
    assert not any(line["contiguous"] for line in heads if line["shape"][0] > 1)


COMPARED = [
    *[("tiny-llama", "ir", True), ("tiny-llama", "oot", True), ("shallow-llama", "auto", False), ("qwen3", "ir", True)],
    pytest.param("tiny-llama", "oot", False, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "route", "eager"), COMPARED)
def test_same_tokens_and_logprobs(name: str, route: str, eager: bool, run_engine: Any, checkpoints: Any) -> None:
    """On the CPU the plugin computes what vLLM computes, operation for operation: the logprobs are equal."""
    folder = _folder(name, checkpoints)
    stock = run_engine(folder, eager, "off")
    assert stock["trace"] == []
    patched = run_engine(folder, eager, route)
    assert patched["tokens"] == stock["tokens"]
    assert patched["logprobs"] == stock["logprobs"]


@pytest.mark.parametrize("name", ["shallow-llama", pytest.param("tiny-mistral", marks=pytest.mark.long)])
def test_opaque_ops_in_the_compiled_graph_keep_the_tokens(name: str, run_engine: Any, checkpoints: Any) -> None:
    """With our op in the compiled graph, as on a GPU, only the order of a row's sum differs from Inductor's."""
    stock = run_engine(_folder(name, checkpoints), False, "off")
    patched = run_engine(_folder(name, checkpoints), False, "ir", op_form=True)
    assert patched["tokens"] == stock["tokens"]
    for ours, theirs in zip(patched["logprobs"], stock["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=LOGPROB_TOLERANCE)
    assert {(line["sum"], line["round_before_weight"]) for line in patched["trace"]} == {("fp32", "none")}


PARALLEL = {"engine": {"tensor_parallel_size": 2}}
FORKED = {"forked_workers": True}


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.long)], ids=["forks", "interpreters"])
def test_every_worker_of_a_parallel_engine_loads_the_plugin(forked: bool, run_engine: Any) -> None:
    """Tensor parallel 2: two processes, each with one line in the log and its own calls; the tokens are those of one
    process. vLLM starts interpreters; the server's engine is one too, and finds the plugin by its entry point."""
    patched = run_engine(DATA / "tiny-llama", True, "auto", **(FORKED if forked else {}), **PARALLEL)
    assert len(patched["workers"]) == 2
    for lines in patched["workers"].values():
        calls = Counter(line["op"] for line in lines)
        assert calls["fused_add_rms_norm"] == 2 * LAYERS["tiny-llama"] * calls["rms_norm"] > 0
    assert patched["log"].count("rmsnorm_patch: worker") == 2
    assert patched["tokens"] == run_engine(DATA / "tiny-llama", True, "off")["tokens"]


@pytest.mark.long
def test_a_parallel_engine_has_the_logprobs_of_stocks(run_engine: Any) -> None:
    stock = run_engine(DATA / "tiny-llama", True, "off", **FORKED, **PARALLEL)
    patched = run_engine(DATA / "tiny-llama", True, "auto", **PARALLEL)
    assert stock["workers"] == {}
    assert (patched["tokens"], patched["logprobs"]) == (stock["tokens"], stock["logprobs"])


def test_an_engine_with_breakable_graphs_gets_the_eager_norms(run_engine: Any) -> None:
    """Nothing is compiled there, whatever was asked for: what vLLM's eager norm computes is what is replaced."""
    breakable = {"variables": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}}
    answer = run_engine(DATA / "tiny-llama", False, "ir", **breakable)
    forwards = answer["forwards"]
    width = answer["trace"][0]["shape"][-1]
    assert _calls(answer["trace"], width) == {"rms_norm": forwards, "fused_add_rms_norm": 8 * forwards}
    assert "route ir, provider rmsnorm_patch_native: asked for" in answer["log"]
    stock = run_engine(DATA / "tiny-llama", True, "off")
    assert (answer["tokens"], answer["logprobs"]) == (stock["tokens"], stock["logprobs"])


def test_one_log_line_says_what_was_selected(run_engine: Any) -> None:
    log = run_engine(DATA / "tiny-llama", True, "ir", op_form=True)["log"]
    lines = [line for line in log.splitlines() if "rmsnorm_patch: worker" in line]
    assert len(lines) == 1
    assert "route ir, provider rmsnorm_patch_native: asked for" in lines[0]
    assert "rmsnorm_patch: " not in run_engine(DATA / "tiny-llama", True, "off")["log"]


def test_an_explicit_priority_comes_first(run_engine: Any) -> None:
    answer = run_engine(
        DATA / "tiny-llama",
        True,
        "auto",
        engine={"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}},
    )
    assert answer["priority"] == ["native", "rmsnorm_patch_native"]
    assert answer["trace"] == []
    assert "which comes first" in answer["log"]


@pytest.mark.parametrize("route", ["ir", "oot"])
def test_the_transformers_backend_is_reached(route: str, run_engine: Any) -> None:
    """Its norms are of a class that is derived from vLLM's."""
    answer = run_engine(DATA / "tiny-llama", True, route, engine={"model_impl": "transformers"})
    assert sum(_calls(answer["trace"], answer["trace"][0]["shape"][-1]).values()) == 9 * answer["forwards"]
