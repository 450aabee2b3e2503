"""Engines and servers of the tests, on the CPU and on a GPU: child processes of the interpreter that runs the tests."""

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

import torch

HERE = Path(__file__).resolve().parent
PROMPT = "The licence"
START_SECONDS = 300

COMMON = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ON_THE_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
ON_A_GPU = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
REMOVED = ("RMSNORM_PATCH_VLLM", "RMSNORM_PATCH_BACKEND", "RMSNORM_PATCH_COMPILE", "VLLM_PLUGINS")


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child: ours without the variables that choose a route, with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED)}
    return {**kept, **COMMON, **(ON_A_GPU if torch.cuda.is_available() else ON_THE_CPU), **variables}


def run_engine(request: dict[str, Any], folder: Path, cache: Path, **variables: str) -> dict[str, Any]:
    """The answer of engine.py to `request`, with its log; folder: new, for what the engine writes."""
    folder.mkdir()
    own = {
        "RMSNORM_PATCH_VLLM_TRACE": str(folder / "trace"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(cache),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "engine.py"), json.dumps(request), str(folder / "answer.json")],
        env=environment(**{**own, **variables}),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {**json.loads((folder / "answer.json").read_text()), "log": done.stdout + done.stderr}


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

    def texts(self) -> tuple[str, str, list[float]]:
        """The completion in one piece and as streamed, and its logprobs."""
        from openai import OpenAI

        client = OpenAI(base_url=f"{self.url}/v1", api_key="none")
        request: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        whole = client.completions.create(**request, logprobs=1).choices[0]
        parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
        assert len(parts) > 1
        return whole.text, "".join(parts), whole.logprobs.token_logprobs

    def is_gone(self) -> bool:
        """Whether no process of the server is left, within ten seconds."""
        for _ in range(50):
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.2)
        return False


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
def serve(model: Path, folder: Path, env: dict[str, str], *more: str) -> Iterator[Server]:
    """A real `vllm serve` of `model` on loopback, ended by a signal; folder: new, for its log and trace."""
    folder.mkdir()
    port = _port()
    arguments = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    arguments += ["--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "128"]
    arguments += ["--dtype", "bfloat16", "--kv-cache-memory-bytes", str(8 << 20), *more]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "serve.py"), *arguments],
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
