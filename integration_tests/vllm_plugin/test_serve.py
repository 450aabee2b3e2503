"""`vllm serve` on loopback, driven by the openai client: with the plugin and without, from one warm compile cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

LAYERS = 2


def test_serve_with_the_plugin_without_it_and_with_it_again(
    tmp_path: Path, vllm_processes: Any, starter: Any, checkpoints: Any
) -> None:
    """Three starts share one compile cache: each runs the graph of its own setting. The first server and its engine are
    interpreters, as from a shell."""
    cache = tmp_path / "cache"
    answers = {}
    for number, route in enumerate(["auto", "off", "auto"]):
        env = vllm_processes.environment(
            VLLM_CACHE_ROOT=str(cache),
            TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"),
            RMSNORM_PATCH_COMPILE="op",
            RMSNORM_PATCH_VLLM=route,
        )
        forked = {"starter": starter} if number else {}
        with vllm_processes.serve(checkpoints("shallow-llama"), tmp_path / f"start{number}", env, **forked) as server:
            answers[number] = server.texts()
            calls = server.lines()
            log = server.log.read_text()
        if route == "off":
            assert calls == {}
        else:
            ((worker, lines),) = calls.items()
            assert worker != server.process.pid  # the engine's own process loaded the plugin
            ops = [line["op"] for line in lines]
            assert ops.count("fused_add_rms_norm") == 2 * LAYERS * ops.count("rms_norm") > 0
            assert log.count("rmsnorm_patch: worker") == 1
        assert server.is_gone(), "a process of the server outlived it"
    whole, streamed, logprobs = answers[0]
    assert whole == streamed
    assert whole.strip()
    assert answers[2] == answers[0]
    assert answers[1][:2] == (whole, streamed)
    assert answers[1][2] == pytest.approx(logprobs, abs=0.05)  # bf16 logits; Inductor reorders a row's sum
