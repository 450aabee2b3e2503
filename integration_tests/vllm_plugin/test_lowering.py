"""The path of a GPU's default mode, taken on the CPU: vLLM's own passes put our ops into Inductor's graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
IMPORTS = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import compiled_cpp
import torch
from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.vllm_plugin import calls
compiled_cpp.install()
vllm_plugin.register()
from torch._inductor import config as inductor
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass
from vllm.config.utils import Range
"""


@pytest.fixture
def run(environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]) -> Callable[[str], None]:
    """In a process of its own: vLLM keeps global state."""

    def run(script: str) -> None:
        done = run_program(["-c", IMPORTS + script], environment(RMSNORM_PATCH_COMPILE="op"))
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]

    return run


LOWERED = """
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
        calls.COMPILER_HEAD = longest_head
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


def test_the_lowering_pass_selects_and_inserts_our_ops(run: Callable[[str], None]) -> None:
    """Fused add, weightless with variance_size: ours; an fp32 weight: vLLM's; a strided 3-D head norm: the compiler's,
    and ours with a right, contiguous result where that rule is taken away."""
    run(LOWERED)


JOINED = """
import os
from collections import Counter
from dataclasses import replace
import torch.nn.functional as F
from rmsnorm_patch.vllm_plugin import decision, hooks, settings
from vllm.compilation.passes.pass_manager import PostGradPassManager
from whole_compiler import FUSIONS, _name_missing_ops

_name_missing_ops()

def config(linear):
    os.environ[settings.LINEAR_VARIABLE] = linear
    return VllmConfig()

assert config("auto").compute_hash() == config("off").compute_hash(), "on the CPU nothing is joined"
of_this_engine = hooks.facts_of
elsewhere = dict(device_type="cuda", capability=90, captures=True)
hooks.facts_of = decision.facts_of = lambda *args: replace(of_this_engine(*args), **elsewhere)
assert config("auto").compute_hash() != config("off").compute_hash()

class Watched(PostGradPassManager):
    def __init__(self, vllm_config):
        super().__init__()
        for fusion in FUSIONS:
            setattr(vllm_config.compilation_config.pass_config, fusion, False)
        self.configure(vllm_config)

    def __call__(self, graph):
        super().__call__(graph)
        graph.lint()
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.targets = Counter(str(node.target).removesuffix(".default") for node in nodes)
        op = torch.ops.rmsnorm_patch.linear_fused_add_rms_norm_.default
        self.joined = [(*node.args[1].meta["val"].shape,) for node in nodes if node.target is op]

def layers(x, residual, weight, o, gate_up, down, bias):
    def norm(x, residual):
        return ir.ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    normed, total = norm(F.linear(x, o), residual)
    normed, total = norm(F.linear(F.silu(F.linear(normed, gate_up)[:, :256]) * 2, down), total)
    shown = F.linear(normed, o)
    normed, total = norm(shown, total)
    normed, total = norm(F.linear(normed, o, bias), total)
    normed, total = norm(F.linear(normed, o + 1), total)
    return normed, total, shown

torch.manual_seed(0)
weight, bias = torch.randn(128).bfloat16(), torch.randn(128).bfloat16()
matrices = [torch.randn(shape).bfloat16() / 12 for shape in ((128, 128), (512, 128), (128, 256))]
inputs = [torch.randn(2, rows, 128).bfloat16() for rows in (7, 3)]

def compiled(linear):
    torch._dynamo.reset()
    vllm_config, results = config(linear), []
    with set_current_vllm_config(vllm_config), torch.no_grad(), pass_context(Range(1, 64)):
        vllm_config.kernel_config.ir_op_priority.set_default()  # as a worker's start does
        watched = Watched(vllm_config)
        with inductor.patch(post_grad_custom_post_pass=watched, force_disable_caches=True):
            call = torch.compile(layers, dynamic=True, fullgraph=True)
            for x, residual in inputs:
                given = x.clone(), residual.clone()
                results += call(*given, weight, *matrices, bias)
                assert torch.equal(given[0], x) and torch.equal(given[1], residual)
            return results, watched, watched.uuid()

apart, off, key_off = compiled("off")
together, on, key_on = compiled("auto")
separate, joined = "rmsnorm_patch.fused_add_rms_norm_", "rmsnorm_patch.linear_fused_add_rms_norm_"
assert (off.rmsnorm_patch_linear, on.rmsnorm_patch_linear) == (False, True)
assert [off.targets[name] for name in ("aten.mm", "aten.addmm", separate, joined)] == [5, 1, 5, 0], off.targets
assert [on.targets[name] for name in ("aten.mm", "aten.addmm", separate, joined)] == [3, 1, 3, 2], on.targets
assert on.joined == [(128, 128), (128, 256)], on.joined
assert len(together) == 6 and all(map(torch.equal, together, apart))
assert key_on != key_off
"""


def test_vllms_passes_are_followed_by_ours_which_joins_products_and_norms(run: Callable[[str], None]) -> None:
    """Those of o and down; not one that is read elsewhere, has a bias, or has a computed matrix. The GPU is pretended,
    in the facts of the decision and nowhere else: the variable, the decision, the passes and the keys are real."""
    run(JOINED)
