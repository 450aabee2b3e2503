"""With tensor parallel vLLM fuses norms with the all-reduces in front of them, before it asks a provider. Where our
norms were asked for, that default gives way; where somebody turned the fusion on, the log says what it takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")

HERE = Path(__file__).resolve().parent
LAYERS = 2
BY_HAND = {"compilation_config": {"pass_config": {"fuse_allreduce_rms": True}}}
OFF, TAKES = "fuse_allreduce_rms is off for them", "fuse_allreduce_rms was turned on, and takes those behind"

CONFIGURED = """
import json, sys
sys.path.insert(0, sys.argv[3])
import allreduce_fusion
allreduce_fusion.turn_on()
from rmsnorm_patch import vllm_plugin
vllm_plugin.register()
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2])).create_engine_config()
from rmsnorm_patch.vllm_plugin.decision import decision_for
fuses = config.compilation_config.pass_config.fuse_allreduce_rms
print("CONFIGURED", json.dumps([fuses, config.kernel_config.ir_op_priority.rms_norm[0], decision_for(config).reason]))
"""


@pytest.mark.parametrize(
    ("route", "engine", "fuses", "first", "reason"),
    [
        ("ir", {"tensor_parallel_size": 2}, False, "rmsnorm_patch", OFF),
        ("ir", {"tensor_parallel_size": 2, **BY_HAND}, True, "rmsnorm_patch", TAKES),
        ("auto", {"tensor_parallel_size": 2}, True, "native", "behind an all-reduce our norms were not seen"),
        ("off", {"tensor_parallel_size": 2}, True, "native", "RMSNORM_PATCH_VLLM=off"),
        ("ir", {}, True, "rmsnorm_patch", "asked for; numerics of Inductor's fusion"),  # it does nothing there
    ],
)
def test_the_default_gives_way_to_norms_that_were_asked_for(
    route: str,
    engine: dict[str, Any],
    fuses: bool,
    first: str,
    reason: str,
    tiny_llama: Path,
    environment: Any,
    run_program: Any,
) -> None:
    words = ["-c", CONFIGURED, str(tiny_llama), json.dumps(engine), str(HERE)]
    done = run_program(words, environment(RMSNORM_PATCH_VLLM=route))
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("CONFIGURED"))
    configured = json.loads(line.removeprefix("CONFIGURED"))
    assert configured[:2] == [fuses, first]
    assert reason in configured[2]


@pytest.fixture
def parallel(run_engine: Any, checkpoints: Any) -> Callable[..., dict[str, Any]]:
    """Tensor parallel 2, compiled, with the fusion on by default. The workers are forks: they have the stand-in too."""
    fused = {"whole_compiler": True, "allreduce_fusion": True, "forked_workers": True}
    model = checkpoints("shallow-llama")

    def run(**engine: Any) -> dict[str, Any]:
        asked = {"engine": {"tensor_parallel_size": 2, **engine}}
        answer: dict[str, Any] = run_engine(model, False, "ir", op_form=True, **fused, **asked)
        return answer

    return run


@pytest.mark.slow
def test_every_worker_of_a_compiled_parallel_engine_runs_our_ops(parallel: Callable[..., dict[str, Any]]) -> None:
    answer = parallel()
    assert len(answer["workers"]) == 2, answer["log"]
    for lines in answer["workers"].values():
        calls = Counter(line["op"] for line in lines)
        assert calls["fused_add_rms_norm"] == 2 * LAYERS * calls["rms_norm"] > 0
    assert answer["log"].count(OFF) == 2


@pytest.mark.slow
@pytest.mark.long
def test_a_fusion_that_was_turned_on_takes_every_norm_and_the_log_says_so(
    parallel: Callable[..., dict[str, Any]],
) -> None:
    """Each norm of a Llama stands behind an all-reduce, the first behind that of the embedding."""
    answer = parallel(**BY_HAND)
    assert answer["workers"] == {}
    assert answer["log"].count(TAKES) == 2
    assert answer["tokens"] == parallel()["tokens"]
