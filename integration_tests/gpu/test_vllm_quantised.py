"""Real vLLM engines of quantised checkpoints on this GPU, stock and patched: which norms the device ran, logprobs.

A test has the two engines of one scheme, in programs of their own, on models of two narrow layers. Where tests run in
several workers (`-n 4`), each takes the device of its number.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import first_other

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
pytest.importorskip("vllm", reason="vLLM is not installed here")

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "integration_tests" / "data"
sys.path.insert(0, str(ROOT / "scripts"))
from benchlib.quantised import quantise_checkpoint  # noqa: E402
from benchlib.vllm_shapes import ENVIRONMENT  # noqa: E402

LAYERS = 2
NORMS = 2 * LAYERS + 1
WIDTHS = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_attention_heads": 4}
"""Of random models whose matrices are made of whole blocks of 128 x 128."""
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Scheme:
    """rows, value: what norms in front of quantised products write; "" for plain rows. written: how many of a forward
    do so. model: the type of the random one. engine: arguments, also those that quantise at load. variables: of the
    environment. route: the one that is asked for. silu: whether silu_and_mul writes rows, by default."""

    rows: str = ""
    value: str = ""
    written: int = 2 * LAYERS
    model: str = "llama"
    engine: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    route: str = "ir"
    silu: bool = False


AT_LOAD = {"quantization": "fp8"}
SCHEMES = {
    "static": Scheme("fp8_static", "fp32"),
    "token": Scheme("fp8_token", "fp32", silu=True),
    "fp8": Scheme("fp8_token", "fp32", engine=AT_LOAD, silu=True),
    "int8": Scheme("int8_token", "rounded"),
    "block-cutlass": Scheme("fp8_block", "rounded"),
    "block-deepgemm": Scheme("fp8_block", "rounded"),
    "block": Scheme("fp8_block", "rounded", route="auto"),
    "block-whole": Scheme(variables={"RMSNORM_PATCH_VLLM_BLOCKS": "off"}),
    "w4a16": Scheme(),
    # The norm behind attention is read by a router and by experts, whose op quantises for itself: plain rows.
    "experts": Scheme("fp8_token", "fp32", LAYERS, "mixtral", {**AT_LOAD, "moe_backend": "triton"}),
}
"""All but those with `AT_LOAD` are quantised checkpoints."""
BLOCK_OP = "dynamic_flashinfer_deepgemm_blockscale_gemm"
TOKENS = 16
LOGPROB_TOLERANCE = 0.3
"""A last bit of a norm, in the order of its sum, moves an fp8 number here and there by a sixteenth of itself."""
BOUNDED = {
    "VLLM_DEEP_GEMM_WARMUP": "skip",  # it runs a thousand and more products, for minutes
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
SECONDS = 300
"""A guard against a hang of one engine, several times what an idle device needs."""
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89"
)


@pytest.fixture
def engines(
    tmp_path: Path, random_checkpoint: Callable[..., Path], vllm_processes: Any, own_device: dict[str, str]
) -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """`engines("token")`: answers of integration_tests/vllm_plugin/engine.py, stock and patched. Both start at once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-llama")
    prompts = [tokenizer(prompt).input_ids for prompt in ("You may", "This program is", "Error: ")]
    started = functools.partial(vllm_processes.run_program, timeout=SECONDS)

    def run(scheme: str, route: str, model: Path, more: dict[str, str]) -> dict[str, Any]:
        request = {
            "model": str(model),
            "enforce_eager": False,
            "prompts": prompts,
            "max_tokens": TOKENS,
            "engine": {"gpu_memory_utilization": 0.04, **SCHEMES[scheme].engine},
            "where_known": {"enable_flashinfer_autotune": False},
        }
        chosen = ENVIRONMENT.get(f"llama-8b-{scheme}", {})
        variables = {
            "RMSNORM_PATCH_VLLM": route,
            **BOUNDED,
            **own_device,
            **chosen,
            **SCHEMES[scheme].variables,
            **more,
        }
        place = tmp_path / route
        answer: dict[str, Any] = vllm_processes.run_engine(request, place, place / "cache", run=started, **variables)
        return answer

    def both(scheme: str, **more: str) -> tuple[dict[str, Any], dict[str, Any]]:
        wanted = SCHEMES[scheme]
        sizes = {**WIDTHS, "num_hidden_layers": LAYERS, **(EXPERTS if wanted.model == "mixtral" else {})}
        model = random_checkpoint(tmp_path / "model", wanted.model, std=0.03, **sizes)
        if not wanted.engine:
            model = quantise_checkpoint(model, tmp_path / "quantised", scheme.partition("-")[0])
        with ThreadPoolExecutor(max_workers=2) as pool:
            stock, patched = (pool.submit(run, scheme, route, model, more) for route in ("off", wanted.route))
            return stock.result(), patched.result()

    return both


@needs_fp8
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engine_of_a_scheme_runs_our_kernels_and_keeps_its_logprobs(scheme: str, engines: Any) -> None:
    stock, patched = engines(scheme)
    if scheme in ("block", "block-whole") and BLOCK_OP not in patched["log"]:
        pytest.skip("vLLM did not choose the product for FlashInfer and DeepGEMM here")
    assert stock["kernels"] == {}
    assert stock["trace_at_start"] == stock["trace"] == []
    _check_kernels(scheme, patched, SCHEMES[scheme].silu)
    _check_logprobs(stock, patched)


ROWS_OF_SILU = {"static": "fp8_static", "token": "fp8_token", "block-cutlass": "fp8_block"}


@needs_fp8
@pytest.mark.parametrize("scheme", ROWS_OF_SILU)
def test_silu_and_mul_writes_the_rows_of_the_product_behind_it(scheme: str, engines: Any) -> None:
    """Of a scheme that was measured by default, of the others where that is asked for."""
    stock, patched = engines(scheme, **({} if SCHEMES[scheme].silu else {"RMSNORM_PATCH_VLLM_SILU_QUANTISED": "on"}))
    assert stock["kernels"] == {}
    assert f"({WIDTHS['intermediate_size']} columns) writes {ROWS_OF_SILU[scheme]} rows of its" in patched["log"]
    _check_kernels(scheme, patched, silu=True)
    _check_logprobs(stock, patched)


@needs_fp8
def test_turned_off_silu_and_mul_is_vllms(engines: Any) -> None:
    _, patched = engines("token", RMSNORM_PATCH_VLLM_SILU_QUANTISED="off")
    _check_kernels("token", patched, silu=False)


def _check_kernels(scheme: str, answer: dict[str, Any], silu: bool) -> None:
    """Replays of CUDA graphs included: every norm ran as one of our kernels, and those in front of products that read
    quantised rows wrote such. The last norm is read by the head of the model. silu: whether each layer's silu_and_mul
    ran as ours too."""
    wanted, forwards = SCHEMES[scheme], answer["forwards"]
    assert forwards >= TOKENS
    assert answer["kernels"].pop("silu_and_mul_quantised", 0) == LAYERS * forwards * silu, answer["log"][-4000:]
    assert sum(answer["kernels"].values()) == NORMS * forwards, answer["log"][-4000:]
    written = answer["kernels"].get("rms_norm_quantised", 0)
    lines = {(line["scheme"], line["value"], line["both"]) for line in answer["trace_at_start"] if "both" in line}
    if wanted.rows:
        assert written == wanted.written * forwards, answer["log"][-4000:]
        assert lines == {(wanted.rows, wanted.value, False)}
        assert f"writes {wanted.rows} rows" in answer["log"]
        assert scheme != "block" or f"in place of vllm.{BLOCK_OP}" in answer["log"]
        assert "is left to vLLM" not in answer["log"]
    else:
        assert written == 0
        assert lines == set()


def _check_logprobs(stock: dict[str, Any], patched: dict[str, Any]) -> None:
    """Up to the first token that differs, which in a model of random weights may be a tie: the best logprobs of both
    are then as near."""
    for ours, theirs, got, want in zip(
        patched["logprobs"], stock["logprobs"], patched["tokens"], stock["tokens"], strict=True
    ):
        last = first_other(got, want)
        assert ours[: last + 1] == pytest.approx(theirs[: last + 1], abs=LOGPROB_TOLERANCE)
