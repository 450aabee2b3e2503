"""`vllm serve` on loopback, driven by the openai client: with the plugin and without, from one warm compile cache."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

MODEL = Path(__file__).resolve().parent.parent / "data" / "tiny-llama"
PROMPT = "The licence"
START_SECONDS = 300


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    log: Path
    trace: Path

    def lines(self) -> dict[int, list[dict[str, Any]]]:
        """Process id -> the calls of our ops that it made."""
        return {
            int(path.stem): [json.loads(line) for line in path.read_text().splitlines()]
            for path in self.trace.glob("*.jsonl")
        }


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError("no answer from the server: " + server.log.read_text()[-4000:])


@contextmanager
def _serve(folder: Path, env: dict[str, str]) -> Iterator[Server]:
    folder.mkdir()
    port = _port()
    arguments = ["serve", str(MODEL), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    arguments += ["--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "128"]
    arguments += ["--dtype", "bfloat16", "--kv-cache-memory-bytes", str(8 << 20)]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("serve.py")), *arguments],
        env={**env, "RMSNORM_PATCH_VLLM_TRACE": str(folder / "trace")},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    server = Server(f"http://127.0.0.1:{port}", process, folder / "log", folder / "trace")
    try:
        _wait(server)
        yield server
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, -signal.SIGINT, 130)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _texts(server: Server) -> tuple[str, str, list[float]]:
    """The completion in one piece and as streamed, and its logprobs."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    request: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**request, logprobs=1).choices[0]
    parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(parts) > 1
    return whole.text, "".join(parts), whole.logprobs.token_logprobs


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_serve_with_the_plugin_without_it_and_with_it_again(tmp_path: Path, environment: Any) -> None:
    """Three starts share one compile cache: each runs the graph of its own setting."""
    cache = tmp_path / "cache"
    answers = {}
    for number, route in enumerate(["auto", "off", "auto"]):
        env = environment(
            VLLM_CACHE_ROOT=str(cache),
            TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"),
            RMSNORM_PATCH_COMPILE="op",
            RMSNORM_PATCH_VLLM=route,
        )
        with _serve(tmp_path / f"start{number}", env) as server:
            answers[number] = _texts(server)
            calls = server.lines()
            log = server.log.read_text()
        if route == "off":
            assert calls == {}
        else:
            ((worker, lines),) = calls.items()
            assert worker != server.process.pid  # the engine's own process loaded the plugin
            ops = [line["op"] for line in lines]
            assert ops.count("fused_add_rms_norm") == 8 * ops.count("rms_norm") > 0
            assert log.count("rmsnorm_patch: worker") == 1
        for _ in range(50):
            if not _alive(server.process.pid):
                break
            time.sleep(0.2)
        assert not _alive(server.process.pid), "a process of the server outlived it"
    whole, streamed, logprobs = answers[0]
    assert whole == streamed
    assert whole.strip()
    assert answers[2] == answers[0]
    assert answers[1][:2] == (whole, streamed)
    assert answers[1][2] == pytest.approx(logprobs, abs=0.05)  # bf16 logits; Inductor reorders a row's sum
