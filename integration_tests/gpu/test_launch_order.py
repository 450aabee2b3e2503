"""Where and when a CUDA kernel is launched: devices, streams, graphs, threads, dependent launches, first use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launches import BF16, EPS, check, check_fused, check_norm, parameter, rand, second_device

from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import cache, jit, launcher
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_cache")]


@second_device
def test_tensors_of_a_device_that_is_not_current(launcher_kind):
    with torch.cuda.device(0):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            x, residual = rand(8, 2048, device=device), rand(8, 2048, seed=1, device=device)
            weight = parameter(2048, device=device)
            check_fused(x, residual, weight)
            assert cuda_backend.bind("rms_norm", LLAMA)(x, weight, EPS).device == torch.device(device)
            assert torch.cuda.current_device() == 0
    with pytest.raises(UnsupportedInput, match=r"weight on cuda:0 and x on cuda:1"):
        cuda_backend.bind("rms_norm", LLAMA)(x, parameter(2048), EPS)
    with torch.cuda.device(1):
        check_fused(x, residual, weight)


@second_device
def test_side_stream_of_another_device():
    stream = torch.cuda.Stream("cuda:1")
    x, weight = rand(8, 2048, device="cuda:1"), parameter(2048, device="cuda:1")
    expected = reference.rms_norm(2 * x, weight, LLAMA, EPS)
    norm = cuda_backend.bind("rms_norm", LLAMA)
    norm(x, weight, EPS)
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = 2 * x
    with torch.cuda.device(0), torch.cuda.stream(stream):
        actual = norm(doubled, weight, EPS)
    stream.synchronize()
    check(actual, expected)


def test_side_stream_with_a_delayed_producer(launcher_kind):
    x, weight = rand(64, 4096), parameter(4096)
    norm = cuda_backend.bind("rms_norm", LLAMA)
    expected = norm(3 * x, weight, EPS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            actual = norm(x * 3, weight, EPS)
        stream.synchronize()
        assert torch.equal(actual, expected)


def test_chain_of_dependent_launches():
    """Each call starts while the previous one runs: what it reads must be complete."""
    layers, weight = 200, parameter(4096)
    fused = cuda_backend.bind("fused_add_rms_norm", LLAMA)
    for m in (1, 16, 300):
        start = rand(m, 4096), rand(m, 4096, seed=1)
        x, residual = start
        for _ in range(layers):
            x, residual = fused(x, residual, weight, EPS)
        slow_x, slow_residual = start
        for _ in range(layers):
            slow_x, slow_residual = fused(slow_x, slow_residual, weight, EPS)
            torch.cuda.synchronize()
        assert torch.equal(x, slow_x)
        assert torch.equal(residual, slow_residual)


def test_weight_computed_just_before():
    """A weight that another of our kernels writes is not read early."""
    x, ones = rand(1, 4096), parameter(4096)
    norm = cuda_backend.bind("rms_norm", LLAMA)
    seeds = [rand(1, 4096, seed=seed) for seed in range(50)]
    weights = [norm(seed, ones, EPS)[0] for seed in seeds]
    torch.cuda.synchronize()
    expected = [norm(x, weight, EPS) for weight in weights]
    torch.cuda.synchronize()
    actual = [norm(x, norm(seed, ones, EPS)[0], EPS) for seed in seeds]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_parameter_changed_between_calls():
    x, weight = rand(8, 2048), parameter(2048)
    norm = cuda_backend.bind("rms_norm", LLAMA)
    for step in range(20):
        weight.data.copy_(rand(2048, seed=step))
        check(norm(x, weight, EPS), reference.rms_norm(x, weight, LLAMA, EPS))
    weight.data = weight.data.float()
    check(norm(x, weight, EPS), reference.rms_norm(x, weight, LLAMA, EPS))


def capture(call, *operands):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*operands)
    return graph, results


@pytest.mark.parametrize("n", [2048, 5125])
def test_graph_replays_with_new_data(launcher_kind, n):
    x, residual, weight = rand(8, n), rand(8, n, seed=1), parameter(n)
    fused = cuda_backend.bind("fused_add_rms_norm", LLAMA)
    fused(x, residual, weight, EPS)
    graph, (normed, total) = capture(lambda: fused(*fused(x, residual, weight, EPS), weight, EPS))
    for seed in range(3):
        x.copy_(rand(8, n, seed=seed))
        residual.copy_(rand(8, n, seed=seed + 10))
        graph.replay()
        once = fused(x, residual, weight, EPS)
        expected = fused(*once, weight, EPS)
        assert torch.equal(normed, expected[0])
        assert torch.equal(total, expected[1])


def test_capture_with_a_cold_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "cold"))
    n = 3080  # not used elsewhere in this file
    x, weight = rand(8, n), parameter(n)
    norm = cuda_backend.bind("rms_norm", GEMMA)
    graph, result = capture(norm, x, weight, EPS)
    x.copy_(rand(8, n, seed=4))
    graph.replay()
    check(result, reference.rms_norm(x, weight, GEMMA, EPS))
    assert list((tmp_path / "cold").glob("*.artefact"))


def test_warmup_leaves_nothing_to_compile(monkeypatch):
    cuda_backend.warmup("fused_add_rms_norm", LLAMA, 1544, BF16, BF16)
    monkeypatch.setattr(jit, "machine_code", lambda build: pytest.fail("compiled after warmup"))
    check_fused(rand(8, 1544), rand(8, 1544, seed=1), parameter(1544))
    check_fused(rand(3000, 1544), rand(3000, 1544, seed=1), parameter(1544))


def test_first_call_from_a_new_thread(launcher_kind):
    x, weight = rand(8, 1032), parameter(1032)
    results = []
    thread = threading.Thread(target=lambda: results.append(cuda_backend.bind("rms_norm", LLAMA)(x, weight, EPS)))
    thread.start()
    thread.join()
    check(results[0], reference.rms_norm(x, weight, LLAMA, EPS))


def test_eight_threads_on_streams_of_their_own(launcher_kind):
    weight = parameter(2048)
    fused = cuda_backend.bind("fused_add_rms_norm", LLAMA)

    def work(seed: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            x, residual = rand(16, 2048, seed=seed), rand(16, 2048, seed=seed + 100)
            expected = reference.fused_add_rms_norm(x, residual, weight, LLAMA, EPS)[1]
            return all(torch.equal(fused(x, residual, weight, EPS)[1], expected) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_launch_errors_name_the_call(monkeypatch):
    functions = replace(launcher.functions(), launch=lambda *args: 1)
    bound = cuda_backend.BoundOp("rms_norm", LLAMA, True, functions)
    monkeypatch.setattr(cuda_backend, "add_row_kind", lambda *args: None)  # such a launcher serves no later call
    with pytest.raises(KernelBuildError, match=r"launch on cuda:0.*CUDA_ERROR_INVALID_VALUE"):
        bound(rand(4, 512), parameter(512), EPS)


def test_ptx_for_a_newer_device_runs_here(monkeypatch, tmp_path):
    """What a device newer than the compiler gets: PTX that its driver translates."""
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "ptx"))
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    older = tuple(known for known in cuda_backend.nvrtc.supported_architectures() if known < arch)
    monkeypatch.setattr(cuda_backend.nvrtc, "supported_architectures", lambda: older)
    spec, x, weight = replace(LLAMA, width=1999), rand(8, 2048), parameter(2048)
    check_norm(x, weight, spec)
    built = [cache.read(path)[1] for path in (tmp_path / "ptx").glob("*.artefact")]
    assert any(f".target sm_{max(older)}".encode() in code for code in built)


@pytest.mark.alone
def test_disk_cache_serves_a_new_process(tmp_path):
    script = """
import json, sys, time, torch
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import nvrtc
from rmsnorm_patch.numerics.spec import LLAMA
x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
weight = torch.nn.Parameter(torch.ones(2048, device="cuda", dtype=torch.bfloat16))
torch.cuda.synchronize()
cuda_backend.launcher.functions()
start = time.perf_counter()
cuda_backend.bind("rms_norm", LLAMA)(x, weight, 1e-6)
torch.cuda.synchronize()
print(json.dumps([time.perf_counter() - start, nvrtc._library.cache_info().currsize]))
"""
    environment = {**os.environ, cache.DIRECTORY_VARIABLE: str(tmp_path / "cache")}
    root = Path(cuda_backend.__file__).parents[3]
    runs = []
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (cold, compiled), *later = runs
    warm = min(taken for taken, _ in later)
    print(f"first call: cold {cold * 1e3:.0f} ms, from disk {warm * 1e3:.1f} ms")
    assert compiled == 1
    assert not any(loaded for _, loaded in later)
    assert cold < 1.0  # several schedules of one shape
    assert warm < 0.030
