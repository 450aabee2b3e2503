"""RMSNORM_PATCH_VLLM_NUMERICS=huggingface: on an engine's own operands its norms have the bits of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
PROMPTS = [[5, 70, 101, 108, 111], [40, 98, 105, 32, 97, 32, 110]]
NORMS = {"llama": 5, "qwen3": 9, "mistral": 5, "gemma3_text": 13, "olmo2": 9}
"""Of two layers, q and k norms included."""
Case = tuple[str, str, bool]
EAGER = (
    *[(kind, "huggingface", True) for kind in NORMS],
    *[(kind, "engine", True) for kind in ("gemma3_text", "olmo2")],
)
"""Type of the model, numerics, enforce_eager."""
BY_CLASS = tuple((kind, "huggingface", True) for kind in ("qwen3", "gemma3_text", "olmo2"))
COMPILED = (("qwen3", "huggingface", False), ("gemma3_text", "huggingface", False))

Calls = list[tuple[str, dict[str, torch.Tensor]]]


def _calls(file: Path) -> Calls:
    """(path, tensors) of each call of a norm, in the order of the calls."""
    calls: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in load_file(file).items():
        number, _, rest = key.partition(".")
        path, _, name = rest.rpartition(".")
        calls.setdefault(number, (path, {}))[1][name] = tensor
    return [calls[number] for number in sorted(calls)]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Callable[[str], Path],
    environment: Callable[..., dict[str, str]],
    run_program: Callable[..., Any],
) -> Callable[[tuple[Case, ...], str], tuple[dict[Case, Calls], str]]:
    """The calls of each engine, which is a child, and the log of all."""

    @cache
    def run_all(wanted: tuple[Case, ...], route: str) -> tuple[dict[Case, Calls], str]:
        found, log = dict[Case, Calls](), ""
        for kind, numerics, eager in wanted:
            folder = tmp_path_factory.mktemp("operands")
            request = {
                "model": str(checkpoints(kind)),
                "numerics": numerics,
                "enforce_eager": eager,
                "prompts": PROMPTS,
                "max_tokens": 4,
                "file": str(folder / "calls.safetensors"),
            }
            done = run_program(
                [str(HERE / "norm_operands.py"), json.dumps(request)],
                environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", RMSNORM_PATCH_VLLM=route),
                folder,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            found[kind, numerics, eager] = _calls(folder / "calls.safetensors")
            log += done.stdout + done.stderr
        return found, log

    return run_all


@pytest.fixture(scope="module")
def differing(checkpoints: Callable[[str], Path]) -> Callable[[str, Calls], int]:
    """How many elements of the norms' results and sums are not those of transformers' modules on the same operands."""

    def count(kind: str, calls: Calls) -> int:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoints(kind), dtype=torch.bfloat16).eval()
        wrong = 0
        for path, tensors in calls:
            total = tensors["x"] + tensors["residual"] if "residual" in tensors else tensors["x"]
            with torch.no_grad():
                normed = model.get_submodule(path)(total)
            assert (normed.dtype, normed.shape) == (tensors["normed"].dtype, tensors["normed"].shape)
            wrong += int((normed != tensors["normed"]).sum())
            if "total" in tensors:
                wrong += int((total != tensors["total"]).sum())
        return wrong

    return count


def test_every_norm_of_an_engine_has_the_bits_of_transformers(run: Any, differing: Any) -> None:
    """One test, so that one process of the tests starts the engines."""
    engines, log = run(EAGER, "ir")
    found = {case: differing(case[0], calls) for case, calls in engines.items()}
    assert [case for case, count in found.items() if (count == 0) is not (case[1] == "huggingface")] == []
    for (kind, _, _), calls in engines.items():
        assert len({path for path, _ in calls}) == NORMS[kind]
        assert len(calls) >= 4 * NORMS[kind]
    for count in set(NORMS.values()):
        assert f"{count} of {count} norms compute what transformers' do" in log
    assert "is not served" not in log
    assert "keep other numerics" not in log


def test_by_the_classes_of_route_oot_too(run: Any, differing: Any) -> None:
    engines, log = run(BY_CLASS, "oot")
    for (kind, _, _), calls in engines.items():
        assert len(calls) >= 4 * NORMS[kind]
        assert differing(kind, calls) == 0
        assert f"{NORMS[kind]} of {NORMS[kind]} norms compute what transformers' do" in log


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_in_compiled_graphs_too(kind: str, run: Any, differing: Any) -> None:
    """The calls of the ops in the graph, which stand in the order of the modules' in eager mode."""
    paths = list(dict.fromkeys(path for path, _ in run(BY_CLASS, "oot")[0][kind, "huggingface", True]))
    calls = run(COMPILED, "ir")[0][kind, "huggingface", False]
    assert len(calls) >= 4 * NORMS[kind]
    named = [(paths[i % len(paths)], tensors) for i, (_, tensors) in enumerate(calls)]
    assert differing(kind, named) == 0


@pytest.mark.long
def test_the_share_of_equal_logprobs_is_reported(
    tmp_path: Path, tiny_llama: Path, environment: Any, vllm_processes: Any
) -> None:
    script = HERE.parents[1] / "scripts" / "compare_logprobs.py"
    words = [str(script), str(tiny_llama), "--tokens", "8", "--json", str(tmp_path / "rows.json")]
    done = vllm_processes.run_program(words, environment())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["numerics"], row["tokens"]) for row in rows] == [("engine", 16), ("huggingface", 16)]
    assert all(row["greedy_equal"] >= 14 and row["largest_difference"] < 0.1 for row in rows)
    assert ["9 of 9 norms compute" in " ".join(row["norms"]) for row in rows] == [False, True]


FUSES_BY_HAND = {"compilation_config": {"pass_config": {"fuse_allreduce_rms": True}}}
REFUSED = """
import json, sys
sys.path.insert(0, sys.argv[3])
import allreduce_fusion
allreduce_fusion.turn_on()
from rmsnorm_patch import vllm_plugin
vllm_plugin.register()
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2])).create_engine_config()
from rmsnorm_patch.vllm_plugin.decision import decision_for
decision = decision_for(config)
print("DECISION", json.dumps([decision.provider, decision.numerics, decision.refused]))
print("PRIORITY", config.kernel_config.ir_op_priority.rms_norm[0])
print("FUSES", config.compilation_config.pass_config.fuse_allreduce_rms)
"""


@pytest.mark.parametrize(
    ("architecture", "engine", "provider", "refused"),
    [
        (None, {}, "rmsnorm_patch_hf_llama", ""),
        (None, FUSES_BY_HAND, "rmsnorm_patch", "passes fuse_allreduce_rms take norms"),
        ("LLaMAForCausalLM", {}, "rmsnorm_patch", "has no model class"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_refused(
    architecture: str | None,
    engine: dict[str, Any],
    provider: str,
    refused: str,
    tmp_path: Path,
    tiny_llama: Path,
    environment: Any,
    run_program: Any,
) -> None:
    """The engine's numerics then, which the decision says; a fusion that is on by default is turned off."""
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if architecture is not None:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    parallel = {"tensor_parallel_size": 2, **engine}
    words = ["-c", REFUSED, str(tmp_path), json.dumps(parallel), str(HERE)]
    done = run_program(words, environment(RMSNORM_PATCH_VLLM_NUMERICS="huggingface", RMSNORM_PATCH_VLLM="ir"))
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:5] in ("DECIS", "PRIOR", "FUSES"))
    got = json.loads(said["DECISION"])
    assert (got[0], said["PRIORITY"]) == (provider, provider)
    assert refused in got[2]
    assert bool(got[1]) is not bool(got[2])
    assert said["FUSES"] == ("True" if "compilation_config" in engine else "False")


COUNTED = """
import sys
from dataclasses import replace
import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers import layernorm
class Foreign(layernorm.GemmaRMSNorm): pass
CustomOp.register_oot(Foreign, name="GemmaRMSNorm")
class OwnRMSNorm(torch.nn.Module): weight = torch.ones(64)
from rmsnorm_patch import vllm_plugin
vllm_plugin.register()
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from rmsnorm_patch.vllm_plugin import counterparts, huggingface
from rmsnorm_patch.vllm_plugin.decision import decision_for
config = EngineArgs(model=sys.argv[1], dtype="bfloat16").create_engine_config()
decision, known = decision_for(config), huggingface.numerics_of(config.model_config.hf_config)
n = config.model_config.get_hidden_size()
torch.set_default_dtype(torch.bfloat16)
with set_current_vllm_config(config):
    norms = {
        "served": layernorm.RMSNorm(n, eps=3e-3),
        "full": layernorm.RMSNorm(n, dtype=torch.float32),
        "other": layernorm.RMSNorm(n - 1),
        "gemma": layernorm.GemmaRMSNorm(n),
        "own": OwnRMSNorm(),
    }
model = torch.nn.ModuleDict(norms)
counterparts.align(model, known, decision, config)
print("EPS", norms["served"].variance_epsilon == known.norms[0][1].eps, norms["full"].variance_epsilon)
once = huggingface.ROUNDED_ONCE
gemma = replace(known, provider=once, norms=(("gemma", huggingface.Counterpart("G", n, 1e-6, True)),))
def again(known, decision, *paths):
    counterparts.align(torch.nn.ModuleDict({path: norms[path] for path in paths}), known, decision, config)
again(gemma, replace(decision, provider=once), "gemma")
again(gemma, decision, "served")
config.kernel_config.ir_op_priority.fused_add_rms_norm.insert(0, "native")
again(known, decision, "served")
"""


def test_only_what_is_served_is_counted(tiny_llama: Path, environment: Any, run_program: Any) -> None:
    """Norms of other dtypes, lengths, classes and priorities than the provider's, and a draft's of another model."""
    done = run_program(["-c", COUNTED, str(tiny_llama)], environment(RMSNORM_PATCH_VLLM_NUMERICS="huggingface"))
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "EPS True 1e-06" in log
    assert "1 of 5 norms compute what transformers' do, 1 of them with its eps in place of vLLM's" in log
    assert log.count("0 of 1 norms") == 3
    for why in (
        "full (RMSNorm: a weight of torch.float32 for rows of torch.bfloat16)",
        "other (RMSNorm: no norm of that path, or of that length, in transformers' model)",
        "gemma (Foreign: transformers' LlamaRMSNorm computes no 1 + w)",
        "own (OwnRMSNorm: a class with arithmetic of its own)",
        "gemma (Foreign: somebody else's class is registered)",
        "served (RMSNorm: the engine has rmsnorm_patch_hf_llama; ",
        "served (RMSNorm: the IR priority was set to begin with 'native')",
    ):
        assert why in log
