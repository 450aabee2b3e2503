"""Starting: bad settings, vLLM releases that are not served, processes of all kinds, the compile-cache key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
Environment = Callable[..., dict[str, str]]
Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("variable", "allowed"),
    [("RMSNORM_PATCH_VLLM", "auto, ir, oot, off"), ("RMSNORM_PATCH_VLLM_LINEAR", "auto, reorder, off")],
)
def test_a_bad_value_stops_the_start_before_weights_load(
    variable: str, allowed: str, tmp_path: Path, environment: Environment, run_program: Run
) -> None:
    request = {"model": str(DATA / "tiny-llama"), "enforce_eager": True, "prompts": [[1]], "max_tokens": 1}
    done = run_program(
        [str(HERE / "engine.py"), json.dumps(request), str(tmp_path / "answer")],
        environment(**{variable: "fast"}, RMSNORM_PATCH_VLLM_TRACE=str(tmp_path / "trace")),
    )
    assert done.returncode != 0
    assert f"{variable}: got 'fast'; supported: {allowed}" in done.stderr
    assert "oading" not in (done.stdout + done.stderr).split("Traceback")[0].replace("Loading plugin", "")


def test_an_unsupported_release_serves_with_its_own_norms(run_engine: Any) -> None:
    answer = run_engine(DATA / "tiny-llama", True, "auto", vllm_version="0.34.0")
    assert (answer["trace"], answer["priority"], answer["norms"]) == ([], ["native"], ["RMSNorm"])
    warnings = [line for line in answer["log"].splitlines() if "outside the supported range 0.26 to 0.33" in line]
    assert len(warnings) == 1
    assert "; RMSNORM_PATCH_VLLM_RELEASE=0.34 tries it all the same; vLLM serves with its own norms" in warnings[0]
    assert answer["tokens"] == run_engine(DATA / "tiny-llama", True, "off")["tokens"]


WITHOUT_IR = """
import os
import vllm.kernels
from vllm.ir.op import IrOp
del IrOp.register_impl
from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.vllm_plugin import decision
vllm_plugin.register()
from vllm import ir
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import op_registry_oot
assert not any("rmsnorm_patch" in name for name in ir.ops.rms_norm.impls)
print("FOUND", decision.decision_for(VllmConfig()).route, sorted(op_registry_oot))
"""


@pytest.mark.parametrize(
    ("route", "told", "found"),
    [
        (
            "auto",
            "has no IR ops, and every release from 0.26 to 0.33 has them; RMSNORM_PATCH_VLLM=oot tries it",
            "none []",
        ),
        ("ir", "RMSNORM_PATCH_VLLM=ir cannot be served", "none []"),
        ("oot", "", "oot ['GemmaRMSNorm', 'RMSNorm']"),
    ],
)
def test_without_ir_only_the_route_that_was_asked_for(
    route: str, told: str, found: str, environment: Environment, run_program: Run
) -> None:
    done = run_program(["-c", WITHOUT_IR], environment(RMSNORM_PATCH_VLLM=route))
    assert done.returncode == 0, done.stderr[-3000:]
    assert told in done.stdout + done.stderr
    assert f"FOUND {found}" in done.stdout.splitlines()


PROCESSES = """
import multiprocessing, sys, torch
def boom(*args): raise AssertionError("CUDA was initialised")
def register_here(queue=None):
    torch.cuda._lazy_init = boom
    from vllm import ir
    from rmsnorm_patch import vllm_plugin
    vllm_plugin.register()
    first = {op: list(getattr(ir.ops, op).impls) for op in ("rms_norm", "fused_add_rms_norm")}
    from vllm.config import VllmConfig
    key = VllmConfig.compute_hash
    vllm_plugin.register()
    assert {op: list(getattr(ir.ops, op).impls) for op in first} == first
    assert VllmConfig.compute_hash is key
    assert first["rms_norm"].count("rmsnorm_patch") == 1
    queue and queue.put("ok")
if __name__ == "__main__":
    for method in sys.argv[1:]:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=register_here, args=(queue,))
        process.start()
        process.join(900)
        assert process.exitcode == 0 and queue.get(timeout=900) == "ok", method
    register_here()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=register_here)
    process.start()
    process.join(900)
    assert process.exitcode == 0
"""


@pytest.mark.parametrize(
    ("route", "methods"),
    [("ir", ["fork", "spawn"]), ("oot", ["fork"]), pytest.param("oot", ["fork", "spawn"], marks=pytest.mark.long)],
    ids=["ir", "oot", "oot, spawned too"],
)
def test_register_twice_forked_and_spawned(
    route: str, methods: list[str], tmp_path: Path, environment: Environment, run_program: Run, vllm_processes: Any
) -> None:
    """With route ir none of the processes has imported vLLM before; with oot all have but the spawned one."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    run = vllm_processes.run_program if route == "ir" else run_program
    done = run([str(script), *methods], environment(RMSNORM_PATCH_VLLM=route))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rmsnorm_patch: the vLLM plugin is off" not in done.stderr + done.stdout


KEYS = """
import importlib
from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.vllm_plugin import calls
vllm_plugin.register()
from vllm.config import VllmConfig
first = VllmConfig().compute_hash()
calls.VERSION += " changed"
print("KEYS", first, VllmConfig().compute_hash())
"""


def test_the_compile_cache_key_sees_the_route_and_our_version(environment: Environment, run_program: Run) -> None:
    keys = {}
    for route in ("off", "ir", "oot"):
        done = run_program(["-c", KEYS], environment(RMSNORM_PATCH_VLLM=route))
        assert done.returncode == 0, done.stderr[-3000:]
        keys[route] = next(line for line in done.stdout.splitlines() if line.startswith("KEYS")).split()[1:]
    assert keys["off"][0] == keys["off"][1]
    assert len({keys["off"][0], *keys["ir"], *keys["oot"]}) == 5


def test_a_foreign_out_of_tree_norm_is_left_in_place(environment: Environment, run_program: Run) -> None:
    code = (
        "from vllm.model_executor.custom_op import CustomOp, op_registry_oot\n"
        "from vllm.model_executor.layers.layernorm import RMSNorm\n"
        "class Foreign(RMSNorm): pass\n"
        "CustomOp.register_oot(Foreign, name='RMSNorm')\n"
        "from rmsnorm_patch import vllm_plugin\n"
        "vllm_plugin.register()\n"
        "from vllm.config import VllmConfig, set_current_vllm_config\n"
        "config = VllmConfig()\n"
        "with set_current_vllm_config(config):\n"
        "    config.kernel_config.ir_op_priority.set_default()\n"  # a worker starts
        "assert op_registry_oot['RMSNorm'] is Foreign\n"
    )
    done = run_program(["-c", code], environment(RMSNORM_PATCH_VLLM="oot"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is registered for RMSNorm already" in done.stderr + done.stdout


def test_the_op_keeps_its_name_for_custom_ops(environment: Environment, run_program: Run) -> None:
    code = (
        "from rmsnorm_patch import vllm_plugin\n"
        "vllm_plugin.register()\n"
        "from vllm.model_executor.custom_op import op_registry_oot\n"
        "assert op_registry_oot['RMSNorm'].name == 'rms_norm'\n"
    )
    done = run_program(["-c", code], environment(RMSNORM_PATCH_VLLM="oot"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_calls_of_other_kinds_are_served_or_declined(environment: Environment, run_program: Run) -> None:
    """variance_size and weightless calls are served bit for bit; an fp32 weight for bf16 rows is left to vLLM."""
    code = (
        "import torch\n"
        "from rmsnorm_patch import vllm_plugin\n"
        "vllm_plugin.register()\n"
        "from vllm import ir\n"
        "op = ir.ops.rms_norm\n"
        "ours, native = op.impls['rmsnorm_patch_native'], op.impls['native']\n"
        "x = torch.randn(5, 3, 64).bfloat16().transpose(0, 1)\n"
        "w = torch.randn(64).bfloat16()\n"
        "for args in [(x, w, 1e-6), (x, None, 1e-6), (x, w, 0.0), (x, w, 1e-6, 32), (x, None, 1e-6, 16)]:\n"
        "    assert ours.supports_args(*args)\n"
        "    got, want = ours.impl_fn(*args), native.impl_fn(*args)\n"
        "    assert torch.equal(got, want) and got.dtype == want.dtype and got.is_contiguous()\n"
        "assert not ours.supports_args(x, w.float(), 1e-6)\n"
        "op = ir.ops.fused_add_rms_norm\n"
        "ours, native = op.impls['rmsnorm_patch_native'], op.impls['native']\n"
        "x, r = torch.randn(2, 7, 64).bfloat16()\n"
        "for args in [(x, r, w, 1e-6), (x, r, None, 1e-6), (x, r, w, 1e-6, 32)]:\n"
        "    before = x.clone(), r.clone()\n"
        "    for got, want in zip(ours.impl_fn(*args), native.impl_fn(*args)):\n"
        "        assert torch.equal(got, want) and got.dtype == want.dtype\n"
        "    assert torch.equal(x, before[0]) and torch.equal(r, before[1])\n"
        "assert not ours.supports_args(x, r.float(), w, 1e-6)\n"
    )
    done = run_program(["-c", code], environment())
    assert done.returncode == 0, done.stderr[-3000:]


ANOTHER_ROUTE = """
import logging
import os
import torch
from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.vllm_plugin.log import logger
lines = []
logger.info = lambda text, *values: lines.append(text % values)
vllm_plugin.register()
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
for route in ("ir", "oot", "oot", "ir"):
    os.environ["RMSNORM_PATCH_VLLM"] = route
    config = VllmConfig()
    with set_current_vllm_config(config):
        config.kernel_config.ir_op_priority.set_default()  # as a worker's start does
        norm = RMSNorm(64, dtype=torch.bfloat16)
    print("FOUND", route, type(norm).__name__, getattr(norm, "_provider", ""))
print("SAID", [line.split("route ")[1].split(",")[0] for line in lines])
"""


def test_a_process_may_hold_engines_of_both_routes(environment: Environment, run_program: Run) -> None:
    """Each gets the route that was asked for when it starts, and the log says so."""
    done = run_program(["-c", ANOTHER_ROUTE], environment(RMSNORM_PATCH_VLLM="ir"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines() if line.startswith(("FOUND", "SAID"))]
    assert [line[1:3] for line in found[:4]] == [
        ["ir", "RMSNorm"],
        ["oot", "PatchedRMSNorm"],
        ["oot", "PatchedRMSNorm"],
        ["ir", "PatchedRMSNorm"],
    ]
    assert [len(line) for line in found[:4]] == [3, 4, 4, 3]  # the class stands by in an engine of route ir
    assert found[4] == ["SAID", "['ir',", "'oot']"]


def test_in_a_batch_invariant_engine_the_norm_calls_the_ir_ops(environment: Environment, run_program: Run) -> None:
    """vLLM's own passes by them, on CUDA and with VLLM_BATCH_INVARIANT; so it does where another provider is first."""
    code = (
        "import torch\n"
        "from rmsnorm_patch import vllm_plugin\n"
        "vllm_plugin.register()\n"
        "from vllm.config import VllmConfig, set_current_vllm_config\n"
        "from vllm.config.kernel import IrOpPriorityConfig\n"
        "from vllm.model_executor.layers import layernorm\n"
        "def own(*args, **kwargs): raise NotImplementedError\n"
        "layernorm.rms_norm_batch_invariant = own\n"
        "config = VllmConfig()\n"
        "with set_current_vllm_config(config):\n"
        "    config.kernel_config.ir_op_priority.set_default()\n"
        "    norm = layernorm.RMSNorm(64, dtype=torch.bfloat16)\n"
        "x, residual = torch.randn(2, 3, 64).bfloat16()\n"
        "expected = [norm.forward_native(x.clone()), *norm.forward_native(x.clone(), residual.clone())]\n"
        "got = [norm.forward_cuda(x.clone()), *norm.forward_cuda(x.clone(), residual.clone())]\n"
        "assert all(torch.equal(a, b) for a, b in zip(got, expected))\n"
        "with IrOpPriorityConfig(rms_norm=['native'], fused_add_rms_norm=['native']).set_priority():\n"
        "    try: norm.forward_cuda(x)\n"
        "    except NotImplementedError: pass\n"
        "    else: raise AssertionError('ours, though another was asked for')\n"
    )
    done = run_program(["-c", code], environment(VLLM_BATCH_INVARIANT="1"))
    assert done.returncode == 0, done.stderr[-3000:]
