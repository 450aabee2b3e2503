"""The path of a GPU's default mode, taken on the CPU: vLLM's own lowering pass puts our op into Inductor's graph."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

LOWERED = """
import torch
from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.vllm_plugin import arithmetic
vllm_plugin.register()
from torch._inductor import config as inductor
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass
from vllm.config.utils import Range

seen = []
class Watched(VllmIRLoweringPass):
    def __call__(self, graph):
        super().__call__(graph)
        seen.append([str(node.target) for node in graph.nodes if node.op == "call_function"])

def layer(x, residual, weight, heads):
    normed, total = ir.ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    q = ir.ops.rms_norm(normed.view(-1, 4, 32)[:, :3], heads, 1e-6)
    return ir.ops.rms_norm(total, None, 1e-6, 64), q, ir.ops.rms_norm(normed, weight.float(), 1e-6)

torch.manual_seed(0)
x, residual = torch.randn(2, 7, 128).bfloat16()
weight, heads = torch.randn(128).bfloat16(), torch.randn(32).bfloat16()
vllm_config = VllmConfig()
with set_current_vllm_config(vllm_config), torch.no_grad(), pass_context(Range(1, 64)):
    def compiled(priority):
        torch._dynamo.reset()
        watched = Watched(vllm_config)
        with ir.ops.rms_norm.set_priority(priority), ir.ops.fused_add_rms_norm.set_priority(priority):
            with inductor.patch(post_grad_custom_post_pass=watched, force_disable_caches=True):
                return torch.compile(layer, dynamic=True, fullgraph=True)(x, residual, weight, heads), watched
    stock, _ = compiled(["native"])
    assert not any("rmsnorm_patch" in name for name in seen[0]), seen[0]
    for number, longest_head in enumerate([256, 0], start=1):
        arithmetic.COMPILER_HEAD = longest_head
        ours, watched = compiled(["rmsnorm_patch", "native"])
        plain = 1 if longest_head else 2
        used = sorted(name for name in seen[number] if "rmsnorm_patch" in name)
        wanted = ["rmsnorm_patch.fused_add_rms_norm_.default"] + plain * ["rmsnorm_patch.rms_norm.default"]
        assert used == wanted, seen[number]
        chosen = [provider for nodes in watched.selected_impls.values() for provider in nodes.values()]
        assert sorted(chosen) == (3 - plain) * ["native"] + (1 + plain) * ["rmsnorm_patch"], chosen
        for got, want in zip(ours, stock):
            assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)
"""


def test_the_lowering_pass_selects_and_inserts_our_ops(environment: Callable[..., dict[str, str]]) -> None:
    """Fused add, weightless with variance_size: ours; an fp32 weight: vLLM's; a strided 3-D head norm: the compiler's,
    and ours with a right, contiguous result where that rule is taken away."""
    done = subprocess.run(
        [sys.executable, "-c", LOWERED],
        env=environment(RMSNORM_PATCH_COMPILE="op"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
