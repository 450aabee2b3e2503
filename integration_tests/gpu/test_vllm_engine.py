"""Real vLLM engines on this GPU, stock and patched, eager and compiled with CUDA graphs: calls, tokens, logprobs.

The engines are child processes and start together; a test waits for those that it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import TOKENS, WIDE, Engines, Settings, check_same, started

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
pytest.importorskip("vllm", reason="vLLM is not installed here")

LAYERS = {"tiny-llama": 4, "tiny-mistral": 4, "qwen3": 2, "wide-llama": 1}
CASES = [
    *[("tiny-llama", route, eager) for route in ("off", "ir", "oot") for eager in (True, False)],
    *[("tiny-mistral", "off", False), ("tiny-mistral", "ir", False)],
    *[("qwen3", route, eager) for route in ("off", "ir") for eager in (True, False)],
    *[("tiny-llama-fp8", "off", False), ("tiny-llama-fp8", "auto", False)],
    ("tiny-llama-transformers", "ir", True),
    *[("wide-llama", "ir", False), ("wide-llama-apart", "ir", False), ("wide-llama-noir", "oot", False)],
    *[("gemma3", route, False) for route in ("off", "ir")],
]
SETTINGS = {
    "tiny-llama": Settings(request={"changes": ["written"]}),
    "tiny-llama-transformers": Settings(engine={"model_impl": "transformers"}),
    "tiny-llama-fp8": Settings(engine={"quantization": "fp8"}, variables={"RMSNORM_PATCH_VLLM_QUANTISED": "off"}),
    "wide-llama-apart": Settings(variables={"RMSNORM_PATCH_VLLM_LINEAR": "off"}),
    "wide-llama-noir": Settings(request={"hide_ir": True}),
}
JOINS = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
"""Whether compiled engines join products and norms here."""
GEMMA = {"num_hidden_layers": 2, "head_dim": 64}
"""Two layers with four norms each, and one behind them."""


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Callable[..., Path], vllm_processes: Any
) -> Iterator[Engines]:
    work = tmp_path_factory.mktemp("engines")
    # Its attention norms q and k.
    random_checkpoint(work / "qwen3", "qwen3", std=0.08, head_dim=64, num_hidden_layers=LAYERS["qwen3"])
    random_checkpoint(work / "gemma3", "gemma3_text", std=0.08, **GEMMA)
    random_checkpoint(work / "wide-llama", "llama", std=0.02, num_hidden_layers=LAYERS["wide-llama"], **WIDE)
    with started(work, CASES, SETTINGS, vllm_processes) as engines:
        yield engines


def _counts(lines: list[dict[str, Any]], width: int) -> Counter[str]:
    return Counter(line["op"] for line in lines if line["shape"][-1] == width)


def _width(answer: dict[str, Any]) -> int:
    return max(line["shape"][-1] for line in answer["trace"] + answer["trace_at_start"])


SERVED = [case for case in CASES if case[1] in ("ir", "oot") and case[0] in LAYERS]
COMPARED = [case for case in SERVED if (case[0], "off", case[2]) in CASES]


@pytest.mark.parametrize(("name", "route", "eager"), SERVED)
def test_one_plain_and_two_fused_calls_a_layer(name: str, route: str, eager: bool, engines: Engines) -> None:
    answer = engines(name, route, eager)
    layers, forwards = LAYERS[name], answer["forwards"]
    assert forwards >= TOKENS
    if eager:
        expected = {"rms_norm": forwards, "fused_add_rms_norm": 2 * layers * forwards}
        assert _counts(answer["trace"], _width(answer)) == expected
    else:  # what the graphs captured, and the prefill
        calls = _counts(answer["trace_at_start"] + answer["trace"], _width(answer))
        assert calls["fused_add_rms_norm"] == 2 * layers * calls["rms_norm"] > 0
        assert {(line["sum"], line["round_before_weight"]) for line in answer["trace_at_start"]} == {("fp32", "none")}
        joined = {"fused_add_rms_norm"} if JOINS else set()
        assert all(line["dependent"] for line in answer["trace_at_start"] if line["op"] not in joined)
    heads = sum(line["shape"][-1] == 64 for line in answer["trace"])
    assert heads == (2 * layers * forwards if name == "qwen3" and eager else 0)


@pytest.mark.parametrize(("name", "route", "eager"), SERVED)
def test_the_device_ran_our_kernels_in_every_forward(name: str, route: str, eager: bool, engines: Engines) -> None:
    """Replays of CUDA graphs included: they run no Python, and leave no line in the trace."""
    answer = engines(name, route, eager)
    heads = 2 * LAYERS[name] if name == "qwen3" and eager else 0
    assert sum(answer["kernels"].values()) == (1 + 2 * LAYERS[name] + heads) * answer["forwards"]


@pytest.mark.parametrize(("name", "route", "eager"), COMPARED)
def test_same_tokens_and_logprobs_as_stock(name: str, route: str, eager: bool, engines: Engines) -> None:
    stock, patched = engines(name, "off", eager), engines(name, route, eager)
    assert stock["trace"] == stock["trace_at_start"] == []
    assert stock["kernels"] == {}
    check_same(patched, stock, tokens=name != "qwen3")  # random weights have ties


@pytest.mark.parametrize(("route", "eager"), [("ir", True), ("ir", False), ("oot", True), ("oot", False)])
def test_the_next_step_reads_weights_that_were_written(route: str, eager: bool, engines: Engines) -> None:
    """In the graphs that were captured with the old values, too. (Halved, all of them, the norms change the logits.)"""
    stock, patched = engines("tiny-llama", "off", eager), engines("tiny-llama", route, eager)
    assert patched["after"]["written"]["logprobs"] != patched["logprobs"]
    check_same(patched["after"]["written"], stock["after"]["written"], tokens=False)


def test_norms_with_fp32_weights_are_served(engines: Engines) -> None:
    """Gemma 3's `1 + w`: in every forward the device ran a kernel for each norm but those over heads, one for the two
    around each residual-add."""
    stock, patched = engines("gemma3", "off", False), engines("gemma3", "ir", False)
    layers = GEMMA["num_hidden_layers"]
    forwards = patched["forwards"]
    assert patched["kernels"] == {"rms_norm_rows": forwards, "rms_norm_add": 2 * layers * forwards}
    assert stock["kernels"] == {}
    assert patched["norms"] == ["PatchedGemmaRMSNorm"]
    check_same(patched, stock, tokens=False)


@pytest.mark.skipif(not JOINS, reason="measured on sm_90, off elsewhere")
def test_without_ir_the_device_runs_the_same_kernels(engines: Engines) -> None:
    ir, oot = engines("wide-llama", "ir", False), engines("wide-llama-noir", "oot", False)
    assert oot["kernels"] == ir["kernels"]
    assert oot["kernels"]["rms_norm_partials"] >= LAYERS["wide-llama"] * (TOKENS - 1)
    assert (oot["tokens"], oot["logprobs"]) == (ir["tokens"], ir["logprobs"])


@pytest.mark.skipif(not JOINS, reason="measured on sm_90, off elsewhere")
def test_a_norm_that_adds_up_a_product_changes_no_bit(engines: Engines) -> None:
    joined, apart = engines("wide-llama", "ir", False), engines("wide-llama-apart", "ir", False)
    assert joined["tokens"] == apart["tokens"]
    assert joined["logprobs"] == apart["logprobs"]
    assert joined["kernels"]["rms_norm_partials"] >= LAYERS["wide-llama"] * (TOKENS - 1)
    assert "rms_norm_partials" not in apart["kernels"]
    assert "norms add up the parts of split products" in joined["log"]
    assert "behind a product with a 4096 x 14336 matrix the norm adds up" in joined["log"]
    assert "norms add up" not in apart["log"]
    assert "behind a product" not in apart["log"]
    assert {line.get("parts") for line in joined["trace_at_start"] if line["op"] == "rms_norm"} == {None}
    in_parts = [line for line in joined["trace_at_start"] if line.get("parts", 1) > 1]
    assert {line["shape"][0] for line in in_parts} == {1, 2, 4, 8}  # what is captured
    assert not any(line["dependent"] for line in in_parts)  # launched without overlap, which costs time there


def test_a_quantised_model_turned_off_keeps_the_compilers_norms(engines: Engines) -> None:
    stock, patched = engines("tiny-llama-fp8", "off", False), engines("tiny-llama-fp8", "auto", False)
    assert patched["trace_at_start"] == patched["trace"] == []
    assert patched["tokens"] == stock["tokens"]
    assert patched["logprobs"] == stock["logprobs"]
    assert "RMSNORM_PATCH_VLLM_QUANTISED=off leaves its norms to vLLM" in patched["log"]


def test_the_transformers_backend_is_reached(engines: Engines) -> None:
    answer = engines("tiny-llama-transformers", "ir", True)
    assert sum(_counts(answer["trace"], _width(answer)).values()) == 9 * answer["forwards"]


def test_each_log_names_the_route(engines: Engines) -> None:
    for route in ("ir", "oot"):
        lines = [line for line in engines("tiny-llama", route, False)["log"].splitlines() if "patch: worker" in line]
        assert len(lines) == 1
        assert f"route {route}, provider rmsnorm_patch: asked for" in lines[0]
