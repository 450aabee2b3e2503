"""The CUDA launch path on a device: streams, graphs, threads, devices, addresses, dependent launches, first use."""

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
import torch.nn as nn

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import cache, jit, launcher
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec
from rmsnorm_patch.numerics.tolerances import SITE
from rmsnorm_patch.proof.difference import compare

pytestmark = pytest.mark.gpu

EPS = 1e-6
BF16 = torch.bfloat16
second_device = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module", autouse=True)
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


def rand(*shape: int, dtype: torch.dtype = BF16, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def parameter(n: int, dtype: torch.dtype = BF16, device: str = "cuda") -> nn.Parameter:
    return nn.Parameter(rand(n, dtype=dtype, seed=9, device=device), requires_grad=False)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    assert compare(actual, expected).violations(SITE[expected.dtype], expected.dtype) == ()


def check_norm(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec = LLAMA, calls: int = 3) -> None:
    norm = cuda_backend.bind("rms_norm", spec)
    expected = reference.rms_norm(x, weight, spec, EPS)
    for _ in range(calls):  # the first call builds and takes the slow path, later ones do not
        check(norm(x, weight, EPS), expected)


def check_fused(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec = LLAMA) -> None:
    fused = cuda_backend.bind("fused_add_rms_norm", spec)
    normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, EPS)
    kept = x.clone(), residual.clone()
    for _ in range(3):
        actual, actual_total = fused(x, residual, weight, EPS)
        check(actual, normed)
        assert torch.equal(actual_total, total)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("shape", [(1, 4096), (8, 4096), (300, 4096), (5, 7), (3, 1), (2, 3, 5125), (2, 65536)])
def test_both_launchers(launcher_kind, shape):
    assert launcher.functions().kind == launcher_kind
    x, residual, weight = rand(*shape), rand(*shape, seed=1), parameter(shape[-1])
    check_norm(x, weight)
    check_fused(x, residual, weight)
    check_fused(x, x, weight)
    fused = cuda_backend.bind("fused_add_rms_norm", LLAMA)(x, residual, weight, EPS)
    for _ in range(2):
        in_x, in_residual = x.clone(), residual.clone()
        versions = in_x._version, in_residual._version
        assert cuda_backend.bind("fused_add_rms_norm_", LLAMA)(in_x, in_residual, weight, EPS) is None
        assert torch.equal(in_x, fused[0])
        assert torch.equal(in_residual, fused[1])
        assert (in_x._version > versions[0], in_residual._version > versions[1]) == (True, True)


def test_in_place_under_inference_mode():
    with torch.inference_mode():
        x, residual, weight = rand(4, 512), rand(4, 512, seed=1), parameter(512)
        expected = cuda_backend.bind("fused_add_rms_norm", LLAMA)(x, residual, weight, EPS)
        for _ in range(2):
            in_x, in_residual = x.clone(), residual.clone()
            cuda_backend.bind("fused_add_rms_norm_", LLAMA)(in_x, in_residual, weight, EPS)
            assert torch.equal(in_x, expected[0])
            assert torch.equal(in_residual, expected[1])
        assert expected[0].is_inference()


@pytest.mark.parametrize("offset", [1, 2, 3, 8])
@pytest.mark.parametrize("which", ["x", "residual", "weight"])
def test_any_address_gives_the_same_bits(which, offset):
    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
        moved = storage[offset:].view(tensor.shape)
        return moved.copy_(tensor)

    x, residual, weight = rand(9, 1024), rand(9, 1024, seed=1), parameter(1024).data
    fused = cuda_backend.bind("fused_add_rms_norm", LLAMA)
    expected = fused(x, residual, weight, EPS)
    operands = {"x": x, "residual": residual, "weight": weight}
    operands[which] = shifted(operands[which])
    actual = fused(*operands.values(), EPS)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_strided_inputs():
    qkv = rand(50, 48 * 128)
    weight, wide = parameter(128), parameter(1024)
    check_norm(qkv[:, : 32 * 128].view(50, 32, 128), weight)  # q of a packed projection
    check_norm(qkv[:, 32 * 128 : 40 * 128].unflatten(-1, (8, 128)), weight)
    check_norm(qkv.view(5, 10, 48, 128)[:, ::2, :32], weight)  # three levels: copied
    check_norm(qkv[:, 128 : 128 + 1024], wide)
    check_norm(qkv[::3, 3 : 3 + 1024], wide)  # rows at odd addresses
    check_norm(rand(1024, 64).t(), wide)
    check_norm(rand(1, 1024).expand(6, 1024), wide)
    check_fused(qkv[:, :1024], rand(50, 1024, seed=2), wide)
    check_fused(rand(50, 32, 128, seed=2), qkv[:, : 32 * 128].view(50, 32, 128), weight)
    check_fused(qkv[:, : 32 * 128].view(50, 32, 128), qkv[:, 16 * 128 :].view(50, 32, 128), weight)


def test_grouped_and_width():
    x, weight = rand(6, 1024), parameter(1024)
    for spec in (replace(FP32_WEIGHT_MULTIPLY, group=256), replace(LLAMA, width=640)):
        check_norm(x, weight, spec)
        check_norm(rand(6, 2048)[:, 512:1536], weight, spec)
        check_fused(x, rand(6, 1024, seed=1), weight, spec)


def test_in_place_on_strided_rows():
    weight = parameter(512)
    for shape, view in (((8, 1024), lambda t: t[:, :512]), ((4, 6, 512), lambda t: t[:, :3])):
        x, residual = view(rand(*shape)), view(rand(*shape, seed=1))
        normed, total = cuda_backend.bind("fused_add_rms_norm", LLAMA)(x, residual, weight, EPS)
        around = x._base.clone()
        cuda_backend.bind("fused_add_rms_norm_", LLAMA)(x, residual, weight, EPS)
        assert torch.equal(x, normed)
        assert torch.equal(residual, total)
        view(around).copy_(x)
        assert torch.equal(around, x._base)


def test_no_rows_launches_nothing():
    for shape in ((0, 512), (3, 0, 512)):
        normed, total = cuda_backend.bind("fused_add_rms_norm", LLAMA)(rand(*shape), rand(*shape), parameter(512), EPS)
        assert normed.shape == total.shape == torch.Size(shape)


@pytest.mark.parametrize(("m", "n"), [(70_000, 64), (100_003, 128)])
def test_many_rows(m, n):
    check_norm(rand(m, n), parameter(n))


@pytest.mark.usefixtures("large_memory")
def test_more_than_two_to_the_31_elements():
    m, n = 270_000, 8192
    x = torch.full((m, n), 0.5, dtype=BF16, device="cuda")
    x[-1] = rand(n)
    residual, weight = torch.zeros_like(x), parameter(n)
    normed, total = cuda_backend.bind("fused_add_rms_norm", LLAMA)(x, residual, weight, EPS)
    assert torch.equal(total[-1], x[-1])
    check(normed[-1:], reference.rms_norm(x[-1:], weight, LLAMA, EPS))
    check(normed[:2], reference.rms_norm(x[:2], weight, LLAMA, EPS))
    far_apart = x.as_strided((5, n), (552_000_000, 1))
    assert far_apart.stride(0) * 4 > 2**31
    check_norm(far_apart, weight)


@pytest.mark.parametrize("n", [64, 100, 128, 264, 512, 520, 768, 1024, 2880, 4096, 5125, 8192, 16384, 40960])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_batch_invariant_and_repeatable(n, dtype):
    """Every schedule for few rows against the one for many, row by row, to the bit."""
    x, weight = rand(3000, n, dtype=dtype), parameter(n, dtype)
    norm, fused = (cuda_backend.bind(op, LLAMA) for op in ("rms_norm", "fused_add_rms_norm"))
    together, both = norm(x, weight, EPS), fused(x, x, weight, EPS)[0]
    for first, rows in ((0, 1), (17, 2), (100, 130), (300, 600), (1000, 1100)):
        part = x[first : first + rows]
        of = f"{rows} rows from {first}"
        same_rows(norm(part, weight, EPS), together[first : first + rows], f"norm of {of}")
        same_rows(fused(part, part, weight, EPS)[0], both[first : first + rows], f"fused norm of {of}")
    for repeat in range(20):
        same_rows(norm(x, weight, EPS), together, f"norm of all rows, repeat {repeat}")


def same_rows(actual, expected, what):
    """Equal to the bit, or a failure that says where not: which rows and columns, and how the first one looks."""
    if torch.equal(actual, expected):
        return
    wrong = actual != expected  # NaN is unequal to itself, and must not be here
    rows, columns = wrong.any(-1).nonzero().flatten().tolist(), wrong.any(0).nonzero().flatten().tolist()
    at = rows[0], columns[0]
    pytest.fail(
        f"{what}: {len(rows)} of {len(wrong)} rows differ, in {len(columns)} columns; rows {rows[:40]}, "
        f"columns {columns[0]} to {columns[-1]}; at {at} {actual[at].item()} and {expected[at].item()}; "
        f"NaN {int(actual.isnan().sum())} and {int(expected.isnan().sum())}"
    )


@pytest.mark.parametrize("spec", [LLAMA, GEMMA, replace(LLAMA, has_weight=False)])
def test_pair_has_the_bits_of_two_norms(spec):
    norm, pair = cuda_backend.bind("rms_norm", spec), query_key_norm_kernel.bind_rms_norm_pair(spec)
    for tokens in (1, 7, 4096):
        for n in (64, 128, 256, 512, 2048):  # the last one takes a launch each
            qkv = rand(tokens, 48 * n)
            q, k = qkv[:, : 32 * n].view(tokens, 32, n), qkv[:, 32 * n : 40 * n].view(tokens, 8, n)
            q_weight, k_weight = parameter(n), nn.Parameter(rand(n, seed=5), requires_grad=False)
            for operands in ((q, k), (q.contiguous(), k), (q.contiguous(), k.contiguous()), (q[:, ::2], k[:1])):
                actual = pair(*operands, q_weight, k_weight, EPS)
                assert torch.equal(actual[0], norm(operands[0], q_weight, EPS))
                assert torch.equal(actual[1], norm(operands[1], k_weight, EPS))


def test_pair_of_unlike_operands():
    pair = query_key_norm_kernel.bind_rms_norm_pair(LLAMA)
    for q, k in ((rand(4, 128), rand(4, 64)), (rand(4, 128), rand(4, 128).float()), (rand(0, 128), rand(4, 128))):
        weights = parameter(q.shape[-1], q.dtype), parameter(k.shape[-1], k.dtype)
        for actual, x, weight in zip(pair(q, k, *weights, EPS), (q, k), weights, strict=True):
            check(actual, reference.rms_norm(x, weight, LLAMA, EPS))


def test_cpu_tensors():
    x, weight = torch.randn(4, 64), torch.ones(64)
    assert torch.equal(ops.bind_rms_norm(LLAMA)(x, weight, EPS), reference.rms_norm(x, weight, LLAMA, EPS))
    with pytest.raises(UnsupportedInput, match="cpu"):
        cuda_backend.bind("rms_norm", LLAMA)(x, weight, EPS)


def test_weight_on_another_device_is_named():
    for weight in (torch.ones(512, dtype=BF16), nn.Parameter(torch.ones(512, dtype=BF16))):
        with pytest.raises(UnsupportedInput, match=r"weight on cpu and x on cuda:0"):
            cuda_backend.bind("rms_norm", LLAMA)(rand(4, 512), weight, EPS)
    with pytest.raises(UnsupportedInput, match=r"residual on cpu"):
        cuda_backend.bind("fused_add_rms_norm", LLAMA)(rand(4, 512), torch.zeros(4, 512, dtype=BF16), None, EPS)


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
    monkeypatch.setattr(bound, "_register", lambda *args: None)
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


@pytest.mark.timed
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
