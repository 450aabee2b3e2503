"""Real vLLM engines of quantised checkpoints on this GPU, stock and patched: which norms the device ran, logprobs.

The engines are child processes and start together; a test waits for those that it reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
pytest.importorskip("vllm", reason="vLLM is not installed here")

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "integration_tests" / "data"
sys.path.insert(0, str(ROOT / "scripts"))
from benchlib.quantised import quantise_checkpoint  # noqa: E402
from benchlib.vllm_engine import ENVIRONMENT  # noqa: E402

LAYERS = {"tiny-llama": 4, "wide": 2}
WIDTHS = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_attention_heads": 4}
"""Of a random model whose matrices are made of whole blocks of 128 x 128."""
SCHEMES: dict[str, tuple[str, str, str]] = {
    "static": ("tiny-llama", "fp8_static", "fp32"),
    "token": ("tiny-llama", "fp8_token", "fp32"),
    "fp8": ("tiny-llama", "fp8_token", "fp32"),
    "int8": ("tiny-llama", "int8_token", "rounded"),
    "block-cutlass": ("wide", "fp8_block", "rounded"),
    "block-deepgemm": ("wide", "fp8_block", "rounded"),
    "block": ("wide", "", ""),
    "w4a16": ("wide", "", ""),
}
"""Scheme -> the model, and what its norms write: the scheme of their rows, and of which value; "" for plain rows."""
WRITES = [scheme for scheme, (_, rows, _) in SCHEMES.items() if rows]
TOKENS = 16
LOGPROB_TOLERANCE = 0.3
"""A last bit of a norm, in the order of its sum, moves an fp8 number here and there by a sixteenth of itself."""
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89"
)
Case = tuple[str, str]


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Callable[..., Path], vllm_processes: Any
) -> Iterator[Callable[[str, str], dict[str, Any]]]:
    """`engines("token", "off")`: the answer of integration_tests/vllm_plugin/engine.py."""
    from transformers import AutoTokenizer

    work = tmp_path_factory.mktemp("quantised")
    sources = {"tiny-llama": DATA / "tiny-llama"}
    sources["wide"] = random_checkpoint(work / "wide", "llama", std=0.03, **WIDTHS)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-llama")
    prompts = [tokenizer(prompt).input_ids for prompt in ("You may", "This program is", "Error: ")]

    def run(scheme: str, route: str, folder: Path) -> dict[str, Any]:
        at_load = {"quantization": "fp8"} if scheme == "fp8" else {}
        request = {
            "model": str(folder),
            "enforce_eager": False,
            "prompts": prompts,
            "max_tokens": TOKENS,
            "engine": {"gpu_memory_utilization": 0.04, **at_load},
        }
        place = work / f"{scheme}-{route}"
        variables = {"RMSNORM_PATCH_VLLM": route, **ENVIRONMENT.get(f"llama-8b-{scheme}", {})}
        answer: dict[str, Any] = vllm_processes.run_engine(request, place, place / "cache", **variables)
        return answer

    futures: dict[Case, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(max_workers=2 * len(SCHEMES)) as pool:
        for scheme, (model, _, _) in SCHEMES.items():
            folder = sources[model]
            if scheme != "fp8":
                folder = quantise_checkpoint(folder, work / f"checkpoint-{scheme}", scheme.partition("-")[0])
            for route in ("off", "ir"):
                futures[scheme, route] = pool.submit(run, scheme, route, folder)
        yield lambda scheme, route: futures[scheme, route].result()


@needs_fp8
@pytest.mark.parametrize("scheme", WRITES)
def test_the_device_ran_the_kernel_that_writes_quantised_rows(scheme: str, engines: Any) -> None:
    """Replays of CUDA graphs included: for every norm but the last, which the head of the model reads."""
    answer = engines(scheme, "ir")
    model, rows, value = SCHEMES[scheme]
    forwards = answer["forwards"]
    assert forwards >= TOKENS
    assert answer["kernels"].get("rms_norm_quantised", 0) == 2 * LAYERS[model] * forwards, answer["log"][-4000:]
    assert sum(answer["kernels"].values()) == (1 + 2 * LAYERS[model]) * forwards
    lines = [line for line in answer["trace_at_start"] if "scheme" in line]
    assert {(line["scheme"], line["value"], line["both"]) for line in lines} == {(rows, value, False)}
    assert f"writes {rows} rows" in answer["log"]
    assert "is left to vLLM" not in answer["log"]


@needs_fp8
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in WRITES])
def test_norms_in_front_of_opaque_products_are_plain_ones(scheme: str, engines: Any) -> None:
    """W4A16, and blocks where the product quantises for itself; where it does not, they write quantised rows."""
    answer = engines(scheme, "ir")
    layers = LAYERS[SCHEMES[scheme][0]]
    assert sum(answer["kernels"].values()) == (1 + 2 * layers) * answer["forwards"]
    opaque = scheme != "block" or "dynamic_flashinfer_deepgemm_blockscale_gemm" in answer["log"]
    assert ("rms_norm_quantised" not in answer["kernels"]) is opaque


@needs_fp8
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logprobs_are_those_of_stock(scheme: str, engines: Any) -> None:
    """Up to the first token that differs, which in a model of random weights may be a tie: the best logprobs of both
    are then as near."""
    stock, patched = engines(scheme, "off"), engines(scheme, "ir")
    assert stock["kernels"] == {}
    assert stock["trace_at_start"] == stock["trace"] == []
    for ours, theirs, got, want in zip(
        patched["logprobs"], stock["logprobs"], patched["tokens"], stock["tokens"], strict=True
    ):
        last = next((i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), len(got))
        assert ours[: last + 1] == pytest.approx(theirs[: last + 1], abs=LOGPROB_TOLERANCE)
