"""Runs tests against faults of Python sources: one forked child for each, whose import of that file gives the fault.

The parent has imported what tests need and nothing of `rmsnorm_patch`, so that a child costs the tests and no more. A
child dies of the first red test. Triton reads a kernel's source through `linecache`, which is told of the fault too.
No child sees another: the tree stays as it is, and temporary files and caches lie in a folder of the child's own.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import linecache
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .faults import Fault

HEAVY = ("torch", "torch._dynamo", "transformers.models.llama.modeling_llama", "triton", "triton.language", "pytest")
HEAVY += ("hypothesis", "transformers.models.qwen3.modeling_qwen3", "transformers.models.gemma2.modeling_gemma2")
NOTHING_RAN = 5
"""Pytest's exit status where every file was skipped."""


def import_heavy() -> None:
    import importlib

    for name in HEAVY:
        with contextlib.suppress(ModuleNotFoundError):  # then what needs it skips, or is red without a fault
            importlib.import_module(name)
    assert "rmsnorm_patch" not in sys.modules


@dataclass(frozen=True)
class Asked:
    """One child's work. tests: files, the likeliest to go red first. left_out: tests that are not run. to_the_end: go
    on behind a red test. first: ids of tests that are asked before any file is collected; unknown ids ask nothing."""

    fault: Fault | None
    tests: Sequence[str]
    left_out: Sequence[str] = ()
    to_the_end: bool = False
    first: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """end: "survived", "killed" or "hung". red: ids of red tests, or of files that cannot be collected."""

    end: str
    seconds: float
    red: list[str] = field(default_factory=list)
    passed: int = 0
    skipped: int = 0


def ends(
    root: Path, work: Iterable[Asked], workers: int, seconds: float, stop: float = float("inf")
) -> Iterator[tuple[Asked, Answer]]:
    """Each piece of work and how it ended, `workers` at a time. seconds: of one child. stop: monotonic time at which
    what still runs is killed and gets no answer, as it is by SIGTERM."""
    waiting, running = iter(work), [_Child() for _ in range(workers)]
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        exhausted = False
        while time.monotonic() < stop:
            for child in running:
                if child.asked is None and not exhausted:
                    piece = next(waiting, None)
                    exhausted = piece is None
                    if piece is not None:
                        child.start(root, piece, Path(tempfile.mkdtemp(dir=folder)))
                answer = child.answer(seconds)
                if answer is not None and child.asked is not None:
                    asked, child.asked = child.asked, None
                    yield asked, answer
            if exhausted and all(child.asked is None for child in running):
                return
            time.sleep(0.02)
    finally:
        for child in running:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


class _Child:
    """A place for one forked process after another. Its process group is its own: what it starts ends with it."""

    def __init__(self) -> None:
        self.asked: Asked | None = None
        self.pid, self.began, self.folder = 0, 0.0, Path()

    def start(self, root: Path, asked: Asked, folder: Path) -> None:
        self.asked, self.began, self.folder = asked, time.monotonic(), folder
        self.pid = os.fork()
        if not self.pid:
            _become(root, asked, folder)

    def answer(self, seconds: float) -> Answer | None:
        """None while it runs."""
        if self.asked is None:
            return None
        took = time.monotonic() - self.began
        done, _ = os.waitpid(self.pid, os.WNOHANG)
        if not done and took < seconds:
            return None
        report = self.folder / "report.json"
        told = json.loads(report.read_text()) if done and report.exists() else {}
        self.kill(waited=bool(done))
        if not done:
            return Answer("hung", took)
        survived = told.get("status") in (0, NOTHING_RAN)
        counts = {name: told[name] for name in ("red", "passed", "skipped")} if told else {}
        return Answer("survived" if survived else "killed", took, **counts)

    def kill(self, waited: bool = False) -> None:
        """End the process and what it started, and remove its folder."""
        if self.asked is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if not waited:
            os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


class _Report:
    """A plugin of pytest that keeps what went red, and counts."""

    def __init__(self) -> None:
        self.red: list[str] = []
        self.passed = self.skipped = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.red.append(report.nodeid)
        self.passed += report.passed and report.when == "call"
        self.skipped += report.skipped

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.red.append(report.nodeid)


def _become(root: Path, asked: Asked, folder: Path) -> None:
    """Of the child: never returns."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(root)
    log = os.open(os.environ.get("MUTANTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.path.insert(0, str(root))
    os.environ |= {"TMPDIR": str(folder), "RMSNORM_PATCH_CACHE_DIR": str(folder / "kernels")}
    os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    tempfile.tempdir = None
    if asked.fault is not None:
        put(root / asked.fault.file, asked.fault.applied((root / asked.fault.file).read_text()))
    report = folder / "report.json"
    apart = os.fork() if asked.first else 0  # what a test leaves behind in its process is seen by no other run
    if apart:
        _, how = os.waitpid(apart, 0)
        if how or not report.exists() or json.loads(report.read_text())["red"]:
            os._exit(0)
        report.unlink()
    tests = asked.first if asked.first and not apart else asked.tests
    with contextlib.suppress(BaseException):
        report.write_text(json.dumps(_asked(tests, asked)))
    os._exit(0)


def _asked(tests: Sequence[str], asked: Asked) -> dict[str, Any]:
    """Run tests in this process: what they came to."""
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu and not long"]
    options += [f"--deselect={name}" for name in asked.left_out] + ([] if asked.to_the_end else ["-x"])
    report = _Report()
    status = int(pytest.main([*options, *tests], plugins=[report]))
    return {"status": status, **vars(report)}


def put(path: Path, text: str) -> None:
    """Every later import of `path` in this process reads `text`."""
    inherited = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader: importlib.machinery.SourceFileLoader, name: str):  # type: ignore[no-untyped-def]
        if Path(loader.path).resolve() != path.resolve():
            return inherited(loader, name)
        linecache.cache[loader.path] = (len(text), None, text.splitlines(keepends=True), loader.path)
        return compile(text, loader.path, "exec", dont_inherit=True)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
