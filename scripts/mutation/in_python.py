"""Runs tests against faults of Python sources: one forked child for each, whose import of that file gives the fault.

The parent has imported what tests need and nothing of `rmsnorm_patch`, so that a child costs the tests and no more. A
child dies of the first red test. Triton reads a kernel's source through `linecache`, which is told of the fault too.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import linecache
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .faults import Fault

HEAVY = ("torch", "torch._dynamo", "transformers.models.llama.modeling_llama", "triton", "triton.language", "pytest")
HEAVY += ("hypothesis", "transformers.models.qwen3.modeling_qwen3", "transformers.models.gemma2.modeling_gemma2")


def import_heavy() -> None:
    import importlib

    for name in HEAVY:
        importlib.import_module(name)
    assert "rmsnorm_patch" not in sys.modules


def ends(root: Path, fault: Fault | None, tests: Sequence[str], seconds: float) -> tuple[str, float]:
    """How the tests end with this fault ("survived", "killed", "hung"), and the seconds that took. None: no fault."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        _become(root, fault, tests)
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            survived = os.waitstatus_to_exitcode(status) == 0
            return ("survived" if survived else "killed"), time.monotonic() - began
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung", time.monotonic() - began


def _become(root: Path, fault: Fault | None, tests: Sequence[str]) -> None:
    """Of the child: never returns. Its process group is its own, so that what it starts ends with it."""
    os.setpgid(0, 0)
    os.chdir(root)
    log = os.open(os.environ.get("MUTANTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.path.insert(0, str(root))
    if fault is not None:
        put(root / fault.file, fault.applied((root / fault.file).read_text()))
    import pytest

    status = 1
    with contextlib.suppress(BaseException):
        options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu and not long")
        status = int(pytest.main([*options, *tests]))
    os._exit(status)


def put(path: Path, text: str) -> None:
    """Every later import of `path` in this process reads `text`."""
    inherited = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader: importlib.machinery.SourceFileLoader, name: str):  # type: ignore[no-untyped-def]
        if Path(loader.path).resolve() != path.resolve():
            return inherited(loader, name)
        linecache.cache[loader.path] = (len(text), None, text.splitlines(keepends=True), loader.path)
        return compile(text, loader.path, "exec", dont_inherit=True)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
