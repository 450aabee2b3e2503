"""A cache directory of its own for each test, a small kernel to compile, and child processes by fork."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rmsnorm_patch.backends.cuda import cache, driver, jit, launcher
from rmsnorm_patch.backends.cuda.schedules import Config
from rmsnorm_patch.kernel_files import kernels_dir
from rmsnorm_patch.numerics.spec import LLAMA

sys.path.insert(0, str(Path(__file__).parent))  # `recording_driver`: test folders are not packages

from recording_driver import CONTEXT, PLAIN, STREAM, Driver

KERNEL = """#include "abi.cuh"
struct Args {
    const void* x;
    void* normed;
    float eps;
};
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) scale_rows(const __grid_constant__ Args args) {
    const float* x = (const float*)args.x;
    for (int i = threadIdx.x; i < N; i += THREADS) ((float*)args.normed)[i] = x[i] * args.eps;
}
"""


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory in force for this test; nothing is held in memory before or after it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(folder))
    cache.forget()
    cache._warned.clear()
    yield folder
    cache.forget()
    cache._warned.clear()


@pytest.fixture
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernels folder with the real abi.cuh and one small source, `scale_rows.cu`."""
    folder = tmp_path / "kernels"
    (folder / "cuda").mkdir(parents=True)
    shutil.copy(kernels_dir() / "cuda" / "abi.cuh", folder / "cuda")
    (folder / "cuda" / "scale_rows.cu").write_text(KERNEL)
    monkeypatch.setattr(jit, "kernels_dir", lambda: folder)
    jit.source_of.cache_clear()
    yield folder
    jit.source_of.cache_clear()


def small_config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "kernel": "scale_rows",
        "source": "scale_rows.cu",
        "entry": "scale_rows",
        "tree": "none",
        "vec": 4,
        "threads_per_row": 128,
        "rows_per_cta": 1,
        "rows_per_thread": 1,
        "cluster": 1,
        "min_ctas": 1,
        "arch_suffix": "",
        "defines": (),
        "m": (1, 2**63 - 1),
        "reason": "",
    }
    return Config(**{**values, **changes})


def small_build(n: int = 512, arch: int = 90, config: Config | None = None) -> jit.Build:
    return jit.Build(
        config=config or small_config(),
        spec=LLAMA,
        fused_add=False,
        n=n,
        weight_rows=1,
        x_dtype=torch.float32,
        weight_dtype=torch.float32,
        align=16,
        weight_align=16,
        two_level=False,
        arch=arch,
    )


@pytest.fixture
def build() -> Callable[..., jit.Build]:
    """`build(n=..., arch=...)`: a request for `scale_rows`."""
    return small_build


@pytest.fixture
def config() -> Callable[..., Config]:
    """`config(**changes)`: the schedule of `scale_rows`."""
    return small_config


@pytest.fixture
def compiles(kernel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the real compilations of this process and of its children."""
    log = tmp_path / "compiles"
    log.touch()
    compile_source = jit.nvrtc.compile_source

    def counted(*args: Any) -> bytes:
        with open(log, "a") as file:
            file.write("x")
        return compile_source(*args)

    monkeypatch.setattr(jit.nvrtc, "compile_source", counted)
    return lambda: log.stat().st_size


@pytest.fixture
def fork() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """`fork(function, *args)`: start a child process that runs it; all children are gone after the test."""
    context = multiprocessing.get_context("fork")
    children: list[multiprocessing.process.BaseProcess] = []

    def start(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
        child = context.Process(target=function, args=args)
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()


@pytest.fixture(scope="session")
def driver_path(shared_library: Callable[..., Path]) -> Path:
    return shared_library(Path(__file__).with_name("recording_driver.c"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests: the launcher is compiled once."""
    return tmp_path_factory.mktemp("compiled") / "cache"


@pytest.fixture
def recorded(driver_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(compiled))
    monkeypatch.setattr(driver, "LIBRARY", str(driver_path))
    monkeypatch.delenv(launcher.VARIABLE, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    driver.library.cache_clear()
    launcher.functions.cache_clear()
    found = Driver(driver_path)
    found.library.set_result(0)
    found.library.set_context(CONTEXT)
    found.expect(PLAIN)
    yield found
    driver.library.cache_clear()
    launcher.functions.cache_clear()


@pytest.fixture(params=["c", "python"])
def functions(request: pytest.FixtureRequest, recorded: Driver) -> launcher.Functions:
    return launcher.functions() if request.param == "c" else launcher.python_functions("asked for")
