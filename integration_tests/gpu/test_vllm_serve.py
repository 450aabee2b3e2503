"""`vllm serve` on this GPU and loopback, driven by the openai client: with the plugin and without it, compiled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
pytest.importorskip("vllm", reason="vLLM is not installed here")

MODEL = Path(__file__).resolve().parent.parent / "data" / "tiny-llama"
ROUTES = ("auto", "off")


def test_serve_with_the_plugin_and_without_it(tmp_path: Path, vllm_processes: Any) -> None:
    """Two servers at once: the same text in one piece, streamed, and from the other; nothing is left of either."""

    def run(route: str) -> tuple[Any, Any]:
        env = vllm_processes.environment(RMSNORM_PATCH_VLLM=route, VLLM_CACHE_ROOT=str(tmp_path / f"cache-{route}"))
        folder = tmp_path / route
        with vllm_processes.serve(MODEL, folder, env, "--gpu-memory-utilization", "0.05") as server:
            return server.texts(), server

    with ThreadPoolExecutor(len(ROUTES)) as pool:
        (patched, server), (stock, plain) = pool.map(run, ROUTES)
    whole, streamed, logprobs = patched
    assert whole == streamed
    assert whole.strip()
    assert stock[:2] == (whole, streamed)
    assert stock[2] == pytest.approx(logprobs, abs=0.05)  # bf16 logits; another order of a row's sum
    ((worker, lines),) = server.lines().items()
    assert worker != server.process.pid  # the engine's own process loaded the plugin
    ops = [line["op"] for line in lines]
    assert ops.count("fused_add_rms_norm") == 8 * ops.count("rms_norm") > 0
    assert {line["device"] for line in lines} == {"cuda"}
    assert server.log.read_text().count("rmsnorm_patch: worker") == 1
    assert plain.lines() == {}
    for started in (server, plain):
        assert started.is_gone(), "a process of the server outlived it"
