"""Engines of these tests: child processes on the CPU. What one test asked another finds answered, also where tests run
in several workers (`-n 2`): answers, checkpoints and compiled graphs lie in one folder of the session."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from filelock import FileLock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # test folders are not packages

pytest.register_assert_rewrite("answers", "lowered_layers")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the plugin's log says, each line once; no pass has told anything before."""
    from rmsnorm_patch.vllm_plugin import log
    from rmsnorm_patch.vllm_plugin.passes import norm_add, norm_quantised, silu_quantised

    for one in (norm_add, norm_quantised, silu_quantised):
        one._TOLD.clear()
    log.warn_once.cache_clear()
    logging.getLogger("vllm").propagate = True
    caplog.set_level(logging.INFO, logger=log.logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == log.logger.name]


@pytest.fixture(scope="session")
def work(shared_folder: Path) -> Path:
    folder = shared_folder / "vllm"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(work: Path) -> Path:
    """VLLM_CACHE_ROOT of the session. What vLLM finds out of its model classes, in a process of its own for each, it
    keeps by the hash of their files: that stays with the environment."""
    classes = Path(sys.prefix, "modelinfos")
    classes.mkdir(exist_ok=True)
    folder = work / "cache"
    folder.mkdir(exist_ok=True)
    with FileLock(work / "cache.lock"):
        if not (folder / "modelinfos").exists():
            (folder / "modelinfos").symlink_to(classes)
    return folder


@pytest.fixture(scope="session")
def environment(vllm_processes: Any, cache: Path) -> Callable[..., dict[str, str]]:
    """`environment(NAME="value")`: that of a child."""
    return lambda **variables: vllm_processes.environment(**{"VLLM_CACHE_ROOT": str(cache), **variables})


@pytest.fixture(scope="session")
def starter(vllm_processes: Any) -> Iterator[Any]:
    with vllm_processes.starter() as starter:
        yield starter


@pytest.fixture(scope="session")
def run_program(starter: Any) -> Callable[..., Any]:
    """`run_program(["-c", code], env, cwd)`: as `python -c code`, in a fork of a process that has imported vLLM.
    `vllm_processes.run_program` does it in a new interpreter, where that is what a test asks."""
    return starter.run


@pytest.fixture(scope="session")
def checkpoints(
    work: Path, random_checkpoint: Callable[..., Path], first_layers: Callable[..., Path], tiny_llama: Path
) -> Callable[[str], Path]:
    """`checkpoints("qwen3")`: a folder with a random two-layer model of that type, made once; "shallow-llama": with the
    first two layers of the trained one, for engines that compile."""

    def make(model_type: str) -> Path:
        folder = work / f"random-{model_type}"
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return folder
            if model_type == "shallow-llama":
                return first_layers(tiny_llama, folder, 2)
            std = 0.03 if model_type == "gemma3_text" else 0.2  # its embeddings are the head, and scaled
            return random_checkpoint(folder, model_type, std=std, head_dim=32)

    return make


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_engine(work: Path, cache: Path, vllm_processes: Any, run_program: Callable[..., Any]) -> Run:
    """`run_engine(model, enforce_eager=..., route="ir", op_form=False)` -> the answer of engine.py; cached."""

    def run(model: Path, enforce_eager: bool, route: str, op_form: bool = False, **request: Any) -> dict[str, Any]:
        op_form = op_form and not enforce_eager  # it has no meaning in eager mode: share the answer
        if not request.get("variables"):  # none: as if not given. A second engine would find vLLM's cache, and log less
            request.pop("variables", None)
        wanted = {
            "model": str(model),
            "enforce_eager": enforce_eager,
            "prompts": [[5, 70, 101, 108, 111], [40, 98, 105, 32, 97, 32, 110]],
            "max_tokens": 8,
            **request,
        }
        key = hashlib.sha256(json.dumps([wanted, route, op_form], sort_keys=True).encode()).hexdigest()[:16]
        kept = work / f"answer-{key}.json"
        with FileLock(f"{kept}.lock"):  # whoever asks meanwhile waits for this engine
            if not kept.exists():
                variables = {"RMSNORM_PATCH_VLLM": route, **({"RMSNORM_PATCH_COMPILE": "op"} if op_form else {})}
                folder = work / f"engine-{uuid4().hex}"
                answer = vllm_processes.run_engine(wanted, folder, cache, run_program, **variables)
                kept.write_text(json.dumps(answer))
        answered: dict[str, Any] = json.loads(kept.read_text())
        return answered

    return run
