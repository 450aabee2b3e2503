"""Markers of the GPU tests, and how several processes of them share the memory of one device."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import cache, launcher

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # test folders are not packages

pytest.register_assert_rewrite("answers", "bad_input", "launches", "vllm_engines")

KEPT = 1 << 28  # bytes that a process may hold between tests; the allocator would keep what the largest test took
LARGEST = 24 << 30  # bytes of the tests with more than 2**31 elements, their results and references included
PATIENCE = 240.0  # seconds that such a test waits for other processes to release theirs
ENGINES_OF_ITS_OWN = "test_vllm_quantised.py"  # each of its tests starts two; the tests of other files share theirs


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "case(*numbers): the bad-input cases that a test covers")
    config.addinivalue_line("markers", "sanitized: small and direct, so that compute-sanitizer can watch it")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """`--dist loadfile`: a worker takes a file whole, but for the tests that share no engine."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByEngines(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if ENGINES_OF_ITS_OWN in nodeid else super()._split_scope(nodeid)

    return ByEngines(config, log)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """One cold cache for this file; the kernels of earlier tests stay loaded."""
    before = os.environ.get(cache.DIRECTORY_VARIABLE)
    os.environ[cache.DIRECTORY_VARIABLE] = str(tmp_path_factory.mktemp("kernels") / "cache")
    yield
    os.environ.pop(cache.DIRECTORY_VARIABLE)
    if before is not None:
        os.environ[cache.DIRECTORY_VARIABLE] = before


@pytest.fixture(params=["c", "python"])
def launcher_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Both launchers, each with ops bound anew."""
    monkeypatch.setenv(launcher.VARIABLE, request.param)
    launcher.functions.cache_clear()
    ops.forget()
    yield request.param
    launcher.functions.cache_clear()
    ops.forget()


@pytest.fixture(autouse=True)
def released_memory() -> Iterator[None]:
    yield
    # After a sticky error every call fails: the test that met it says so, and not the release of its memory.
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
            torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def own_device() -> dict[str, str]:
    """Variables of a child process: the device of this worker's number, where pytest-xdist runs several workers."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": devices[int(worker) % len(devices)]} if worker else {}


@pytest.fixture
def large_memory() -> Iterator[None]:
    """One test of a device at a time takes tens of gigabytes, once they are free."""
    device = torch.cuda.get_device_properties(0).uuid
    with FileLock(Path(tempfile.gettempdir()) / f"rmsnorm_patch-large-memory-{device}", timeout=PATIENCE):
        end = time.monotonic() + PATIENCE
        while torch.cuda.mem_get_info()[0] < LARGEST and time.monotonic() < end:
            time.sleep(0.5)
        yield
        torch.cuda.empty_cache()
