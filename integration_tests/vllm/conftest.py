"""Engines of these tests: child processes of the interpreter that runs the tests, on the CPU, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
REMOVED = ("RMSNORM_PATCH_", "VLLM_PLUGINS")


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child: ours without the variables that choose a route, with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED)}
    return {**kept, **ENVIRONMENT, **variables}


@pytest.fixture(scope="session", name="environment")
def environment_fixture() -> Callable[..., dict[str, str]]:
    return environment


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def checkpoints(work: Path, random_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """`checkpoints("qwen3")`: a folder with a random two-layer model of that type, made once."""

    @cache
    def make(model_type: str) -> Path:
        return random_checkpoint(work / f"random-{model_type}", model_type, std=0.2, head_dim=32)

    return make


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_engine(work: Path) -> Run:
    """`run_engine(model, enforce_eager=..., route="ir", op_form=False)` -> the answer of engine.py; cached."""
    answers: dict[str, dict[str, Any]] = {}

    def run(model: Path, enforce_eager: bool, route: str, op_form: bool = False, **request: Any) -> dict[str, Any]:
        op_form = op_form and not enforce_eager  # it has no meaning in eager mode: share the answer
        wanted = {
            "model": str(model),
            "enforce_eager": enforce_eager,
            "prompts": [[5, 70, 101, 108, 111], [40, 98, 105, 32, 97, 32, 110]],
            "max_tokens": 8,
            **request,
        }
        key = json.dumps([wanted, route, op_form], sort_keys=True)
        if key not in answers:
            trace = work / f"trace{len(answers)}"
            variables = {
                "RMSNORM_PATCH_VLLM": route,
                "RMSNORM_PATCH_VLLM_TRACE": str(trace),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CACHE_ROOT": str(work / "cache"),
            }
            if op_form:
                variables["RMSNORM_PATCH_COMPILE"] = "op"
            out = work / f"answer{len(answers)}.json"
            done = subprocess.run(
                [sys.executable, str(HERE / "engine.py"), json.dumps(wanted), str(out)],
                env=environment(**variables),
                capture_output=True,
                text=True,
                timeout=600,
                cwd=work,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            answers[key] = {**json.loads(out.read_text()), "log": done.stdout + done.stderr}
        return answers[key]

    return run
