"""vLLM's whole compile pipeline, its graph passes included, on the CPU: both routes, with vLLM's IR and without."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

LAYERS = 2


def test_without_ir_an_engine_runs_the_same_ops(run_engine: Any, checkpoints: Any) -> None:
    """Each product of a layer's output and down projections is joined with its norm; every op, those of torch that
    copy included, runs as often as on route ir."""
    model = checkpoints("shallow-llama")
    ir = run_engine(model, False, "ir", op_form=True, whole_compiler=True)
    oot = run_engine(model, False, "oot", op_form=True, whole_compiler=True, hide_ir=True)
    forwards = ir["forwards"]
    ours = {op: calls for op, calls in oot["kernels"].items() if op.startswith("rmsnorm_patch::")}
    joined = "rmsnorm_patch::linear_fused_add_rms_norm_"
    assert ours == {"rmsnorm_patch::rms_norm": forwards, joined: 2 * LAYERS * forwards}
    assert oot["kernels"] == ir["kernels"]
    assert (oot["tokens"], oot["logprobs"]) == (ir["tokens"], ir["logprobs"])
    assert (ir["norms"], oot["norms"]) == (["RMSNorm"], ["PatchedRMSNorm"])
    assert (ir["priority"], oot["priority"]) == (["rmsnorm_patch", "native"], ["native"])
    assert "norms add up the parts of split products" in oot["log"]
