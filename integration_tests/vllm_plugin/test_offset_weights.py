"""Norms with fp32 `1 + w` weights, vLLM's GemmaRMSNorm, in a real engine on the CPU; weights that change under it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from answers import check_same_or_near

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

LAYERS, HIDDEN, HEAD = 2, 128, 32
CHANGES = ["written", "replaced", "loaded", "restored"]
LOGPROB_TOLERANCE = 0.05  # as in test_engine: where the compiler reorders a row's sum


@pytest.fixture(scope="module")
def engine(run_engine: Any, checkpoints: Any) -> Callable[[bool, str], dict[str, Any]]:
    """`engine(eager, route)`: a Gemma 3, whose weights change after the first answer."""

    def run(eager: bool, route: str) -> dict[str, Any]:
        changes = CHANGES
        answer: dict[str, Any] = run_engine(
            checkpoints("gemma3_text"), eager, route, op_form=route != "off", changes=changes
        )
        return answer

    return run


@pytest.mark.parametrize("eager", [True, False])
def test_every_norm_is_served(eager: bool, engine: Any) -> None:
    """Four norms a layer, two of them behind an add; eager, those over heads too, which the compiler keeps."""
    answer = engine(eager, "ir")
    forwards = answer["forwards"]
    calls = Counter((line["op"], line["shape"][-1]) for line in answer["trace"])
    heads = {("rms_norm", HEAD): 2 * LAYERS * forwards} if eager else {}
    fused = {("fused_add_rms_norm", HIDDEN): 2 * LAYERS * forwards}
    assert calls == {("rms_norm", HIDDEN): (1 + 2 * LAYERS) * forwards, **fused, **heads}
    assert {(line["sum"], line["round_before_weight"]) for line in answer["trace"]} == {("fp32", "none")}
    assert answer["norms"] == ["PatchedGemmaRMSNorm"]


@pytest.mark.parametrize("eager", [True, False])
def test_tokens_are_stocks_with_weights_as_loaded_written_and_replaced(eager: bool, engine: Any) -> None:
    """Eager, they and the logprobs are stock's to the bit. Each change shows: other logprobs than with the weights
    before, until those of the checkpoint are back."""
    stock, patched = engine(eager, "off"), engine(eager, "ir")
    assert (stock["trace"], stock["norms"]) == ([], ["GemmaRMSNorm"])
    pairs = [(stock, patched), *[(stock["after"][change], patched["after"][change]) for change in stock["after"]]]
    for theirs, ours in pairs:
        check_same_or_near(ours, theirs, eager, LOGPROB_TOLERANCE)
    shown = [str(ours["logprobs"]) for _, ours in pairs]
    assert list(stock["after"]) == CHANGES
    assert len(set(shown)) == 4
    assert shown[-1] == shown[0]


BITS = """
import torch
from rmsnorm_patch import vllm_plugin
vllm_plugin.register()
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from rmsnorm_patch.vllm_plugin import calls
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = VllmConfig()
config.compilation_config.mode = 0
with set_current_vllm_config(config), torch.no_grad():
    norm = GemmaRMSNorm(96, eps=1e-5)
assert type(norm).__name__ == "PatchedGemmaRMSNorm" and norm._provider == "rmsnorm_patch", norm._provider
assert type(norm).name == GemmaRMSNorm.name == "gemma_rms_norm"
for change in (lambda w: w.copy_(torch.randn(96)), lambda w: setattr(norm.weight, "data", torch.randn(96))):
    change(norm.weight.data)
    for shape in ((5, 96), (3, 4, 96)):
        x, residual = torch.randn(2, *shape)
        assert norm._is_served(x)
        assert torch.equal(norm(x), norm.forward_native(x))
        before = x.clone(), residual.clone()
        for got, want in zip(norm(x, residual), norm.forward_native(x, residual)):
            assert torch.equal(got, want) and got.dtype == want.dtype
        assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
wide = torch.randn(2, 96, dtype=torch.float32)
assert not norm._is_served(wide) and torch.equal(norm(wide), norm.forward_native(wide))
"""


@pytest.mark.parametrize("route", ["ir", "oot"])
def test_the_class_computes_vllms_own_bits(
    route: str, environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]
) -> None:
    """Of the weight of the moment; it keeps its operands, as vLLM's does."""
    done = run_program(["-c", BITS], environment(RMSNORM_PATCH_VLLM=route))
    assert done.returncode == 0, done.stderr[-3000:]


FOREIGN = """
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
class Foreign(GemmaRMSNorm): pass
CustomOp.register_oot(Foreign, name="GemmaRMSNorm")
from rmsnorm_patch import vllm_plugin
vllm_plugin.register()
assert op_registry_oot["GemmaRMSNorm"] is Foreign
"""


def test_a_foreign_class_keeps_its_norms(
    environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]
) -> None:
    done = run_program(["-c", FOREIGN], environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Foreign is registered for GemmaRMSNorm already, and serves those norms" in done.stderr + done.stdout
    assert "the vLLM plugin is off" not in done.stderr + done.stdout
