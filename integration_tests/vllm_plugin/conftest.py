"""Engines of these tests: child processes of the interpreter that runs the tests, on the CPU, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def environment(vllm_processes: Any) -> Callable[..., dict[str, str]]:
    """`environment(NAME="value")`: that of a child."""
    made: Callable[..., dict[str, str]] = vllm_processes.environment
    return made


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
def run_engine(work: Path, vllm_processes: Any) -> Run:
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
            variables = {"RMSNORM_PATCH_VLLM": route, **({"RMSNORM_PATCH_COMPILE": "op"} if op_form else {})}
            folder = work / f"engine{len(answers)}"
            answers[key] = vllm_processes.run_engine(wanted, folder, work / "cache", **variables)
        return answers[key]

    return run
