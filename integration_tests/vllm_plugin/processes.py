"""Engines and servers of the tests, on the CPU and on a GPU: child processes of the interpreter that runs the tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
PROMPT = "The licence"
START_SECONDS = 900
"""A guard against a hang, several times what busy cores have needed."""

COMMON = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compiling processes would import torch once more each
}
ON_THE_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
ON_A_GPU = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
REMOVED = ("RMSNORM_PATCH_VLLM", "RMSNORM_PATCH_BACKEND", "RMSNORM_PATCH_COMPILE", "VLLM_PLUGINS")


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child: ours without the variables that choose a route, with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED)}
    return {**kept, **COMMON, **(ON_A_GPU if torch.cuda.is_available() else ON_THE_CPU), **variables}


Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def run_program(words: list[str], env: dict[str, str], cwd: Path | None = None, timeout: float = 1500) -> Done:
    """`python *words` in an interpreter of its own."""
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout)


@dataclass
class Child:
    """A fork of the starter's, as a server asks for its process."""

    pid: int
    answer: Callable[[], int]
    """Waits for the exit status."""
    status: int | None = None

    def poll(self) -> int | None:
        return self.status if Path(f"/proc/{self.pid}").exists() else self.wait()

    def wait(self, timeout: float = 1500) -> int:
        """Killed behind the timeout."""
        if self.status is None:
            late = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
            late.start()
            try:
                self.status = self.answer()
            finally:
                late.cancel()
        return self.status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class Starter:
    """starter.py: runs what `run_program` runs, in forks of a process that has imported vLLM."""

    process: subprocess.Popen[str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def child(self, words: list[str], env: dict[str, str], cwd: Path, stdout: Path, stderr: Path) -> Iterator[Child]:
        """One at a time: a second thread waits."""
        request = {"words": words, "env": env, "cwd": str(cwd), "stdout": str(stdout), "stderr": str(stderr)}
        with self.lock:
            assert self.process.stdin is not None
            print(json.dumps(request), file=self.process.stdin, flush=True)
            child = Child(self._answer(), self._answer)
            yield child
            child.wait()

    def run(self, words: list[str], env: dict[str, str], cwd: Path | None = None, timeout: float = 1500) -> Done:
        with TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            with self.child(words, env, cwd or Path.cwd(), *files) as child:
                status = child.wait(timeout)
            told = [file.read_text() if file.exists() else "" for file in files]
        return subprocess.CompletedProcess(words, status, *told)

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@contextmanager
def starter() -> Iterator[Starter]:
    command = [sys.executable, str(HERE / "starter.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
        started = Starter(process)
        assert started._answer() == process.pid
        yield started
        assert process.stdin is not None
        process.stdin.close()  # it ends


def run_engine(
    request: dict[str, Any], folder: Path, cache: Path, run: Run = run_program, **variables: str
) -> dict[str, Any]:
    """The answer of engine.py to `request`, with its log; folder: new, for what the engine writes. run: what starts
    it, `run_program` or a starter's `run`."""
    folder.mkdir()
    own = {
        "RMSNORM_PATCH_VLLM_TRACE": str(folder / "trace"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(cache),
    }
    words = [str(HERE / "engine.py"), json.dumps(request), str(folder / "answer.json")]
    done = run(words, environment(**{**own, **variables}), folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {**json.loads((folder / "answer.json").read_text()), "log": done.stdout + done.stderr}


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str] | Child
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
        """Whether no process of the server is left, within five minutes: a guard against a hang."""
        for _ in range(1500):
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
def _started(words: list[str], env: dict[str, str], folder: Path, starter: Starter | None) -> Iterator[Any]:
    log = folder / "log"
    if starter is None:
        command = [sys.executable, *words]
        with log.open("w") as told:
            yield subprocess.Popen(command, env=env, stdout=told, stderr=told, cwd=folder, start_new_session=True)
    else:
        with starter.child(words, {**env, "FORKED": "1"}, folder, log, log) as child:
            yield child


@contextmanager
def serve(
    model: Path, folder: Path, env: dict[str, str], *more: str, starter: Starter | None = None
) -> Iterator[Server]:
    """A real `vllm serve` of `model` on loopback, ended by a signal; folder: new, for its log and trace. starter: the
    server is a fork of it, as is the engine of the server, and the worker of the engine."""
    folder.mkdir()
    port = _port()
    arguments = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    arguments += ["--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "128"]
    arguments += ["--dtype", "bfloat16", "--kv-cache-memory-bytes", str(8 << 20), *more]
    own = {**env, "RMSNORM_PATCH_VLLM_TRACE": str(folder / "trace")}
    with _started([str(HERE / "serve.py"), *arguments], own, folder, starter) as process:
        server = Server(f"http://127.0.0.1:{port}", process, folder / "log", folder / "trace")
        try:
            _wait(server)
            yield server
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) in (0, -signal.SIGINT, 130)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
