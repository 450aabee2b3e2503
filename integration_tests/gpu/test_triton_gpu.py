"""The Triton kernels on a CUDA device, against the reference arithmetic on the same device and against fp64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from made_rows import rand

from rmsnorm_patch import ops
from rmsnorm_patch.backends.triton import backend as triton_backend
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec
from rmsnorm_patch.numerics.tolerances import SITE
from rmsnorm_patch.proof.difference import compare

pytestmark = pytest.mark.gpu

EPS = 1e-6
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
SPECS = {
    "llama": LLAMA,
    "one_rounding": FP32_WEIGHT_MULTIPLY,
    "gemma": GEMMA,
    "t5": T5,
    "offset_in_weight_dtype": replace(LLAMA, weight_offset="weight_dtype"),
    "output_input": replace(LLAMA, output="input"),
    "fp32_sum": replace(LLAMA, sum="fp32"),
    "inductor": replace(FP32_WEIGHT_MULTIPLY, sum="fp32"),
    "weightless": replace(LLAMA, has_weight=False),
    "width": replace(LLAMA, width=100),
    "grouped": replace(LLAMA, group=128),
}


def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """dtype: of x; where it is a half type and the result fp32, a flipped rounding is one unit of the half type."""
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    if dtype is not None:
        actual, expected = actual.to(dtype), expected.to(dtype)
    assert compare(actual, expected).violations(SITE[expected.dtype], expected.dtype) == ()


def check_all_ops(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, eps: float = EPS
) -> None:
    check(ops.bind_rms_norm(spec, "triton")(x, weight, eps), reference.rms_norm(x, weight, spec, eps), x.dtype)
    normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, eps)
    fused_normed, fused_total = ops.bind_fused_add_rms_norm(spec, "triton")(x, residual, weight, eps)
    check(fused_normed, normed, x.dtype)
    assert torch.equal(fused_total, total)
    if normed.dtype == x.dtype:
        in_x, in_residual = x.clone(), residual.clone()
        ops.bind_fused_add_rms_norm_(spec, "triton")(in_x, in_residual, weight, eps)
        assert torch.equal(in_x, fused_normed)
        assert torch.equal(in_residual, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_axis(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    for weight_dtype in {dtype, torch.float32}:
        weight = rand(768, dtype=weight_dtype, seed=3) if spec.has_weight else None
        check_all_ops(rand(37, 768, dtype=dtype, seed=1), rand(37, 768, dtype=dtype, seed=2), weight, spec)


@pytest.mark.parametrize(
    "n", [1, 7, 64, 111, 128, 256, 513, 769, 2880, 3584, 5120, 5125, 7168, 16384, 24449, 65536, 262144]
)
def test_lengths(n: int) -> None:
    check_all_ops(rand(9, n, seed=1), rand(9, n, seed=2), rand(n, seed=3), LLAMA)


@pytest.mark.parametrize("n", [4096, 65536])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_error_against_fp64_is_no_larger_than_the_originals(n: int, dtype: torch.dtype) -> None:
    x, residual, weight = rand(64, n, dtype=dtype), rand(64, n, dtype=dtype, seed=1), rand(n, dtype=dtype, seed=2)
    normed, _ = ops.bind_fused_add_rms_norm(LLAMA, "triton")(x, residual, weight, EPS)
    original, total = reference.fused_add_rms_norm(x, residual, weight, LLAMA, EPS)
    exact = reference.rms_norm_fp64(total, weight, LLAMA, EPS)
    error, own = ((y.double() - exact).square().mean().sqrt().item() for y in (normed, original))
    assert error <= own * 1.02


@pytest.mark.parametrize("n", [128, 1024, 4096, 5125, 16384, 40000, 131072])
def test_a_row_does_not_depend_on_its_batch_or_the_run(n: int) -> None:
    x, residual, weight = rand(1100, n), rand(1100, n, seed=1), rand(n, seed=2)  # from 1024 rows on they are prefetched
    fused, norm = ops.bind_fused_add_rms_norm(LLAMA, "triton"), ops.bind_rms_norm(LLAMA, "triton")
    normed, alone = fused(x, residual, weight, EPS)[0], norm(x, weight, EPS)
    for _ in range(100):
        assert torch.equal(fused(x, residual, weight, EPS)[0], normed)
    for rows in (slice(3, 4), slice(17, 60)):
        assert torch.equal(fused(x[rows], residual[rows], weight, EPS)[0], normed[rows])
        assert torch.equal(norm(x[rows], weight, EPS), alone[rows])


@pytest.mark.parametrize("n", [768, 5125])
def test_a_row_does_not_depend_on_its_address(n: int) -> None:
    """Storage offsets and strides change the vector width that loads may use, and must not change the result."""
    expected = ops.bind_rms_norm(LLAMA, "triton")(rand(16, n), rand(n, seed=2), EPS)
    for offset in (1, 3, 4):
        store = torch.empty(16 * n + 8, dtype=torch.bfloat16, device="cuda")
        x = store[offset : offset + 16 * n].view(16, n).copy_(rand(16, n))
        assert torch.equal(ops.bind_rms_norm(LLAMA, "triton")(x, rand(n, seed=2), EPS), expected)
    for padding in (1, 8):
        x = torch.empty(16, n + padding, dtype=torch.bfloat16, device="cuda")[:, :n].copy_(rand(16, n))
        assert torch.equal(ops.bind_rms_norm(LLAMA, "triton")(x, rand(n, seed=2), EPS), expected)


def test_views() -> None:
    weight = rand(128, seed=2)
    qkv = rand(6, 5, 24 * 128)
    heads = qkv[..., 4 * 128 : 20 * 128].unflatten(-1, (16, 128))  # [6, 5, 16, 128], two strides
    check_all_ops(heads, rand(6, 5, 16, 128, seed=4), weight, LLAMA)
    check_all_ops(rand(6, 5, 16, 128, seed=4), heads, weight, LLAMA)
    check_all_ops(heads.transpose(1, 2), rand(6, 16, 5, 128, seed=4), weight, LLAMA)
    check_all_ops(rand(8, 256)[:, ::2], rand(8, 128, seed=4), weight, LLAMA)
    check_all_ops(rand(1, 128).expand(8, 128), rand(8, 128, seed=4), weight, LLAMA)
    x = rand(8, 128)
    check_all_ops(x, x, weight, LLAMA)


def test_in_place_on_strided_views_leaves_the_gaps_alone() -> None:
    x, residual, weight = rand(6, 300), rand(6, 400, seed=1), rand(128, seed=2)
    before = x.clone(), residual.clone()
    normed, total = reference.fused_add_rms_norm(x[:, 8:136], residual[:, 200:328], weight, LLAMA, EPS)
    ops.bind_fused_add_rms_norm_(LLAMA, "triton")(x[:, 8:136], residual[:, 200:328], weight, EPS)
    check(x[:, 8:136].contiguous(), normed)
    assert torch.equal(residual[:, 200:328], total)
    for now, then, start in ((x, before[0], 8), (residual, before[1], 200)):
        assert torch.equal(now[:, :start], then[:, :start])
        assert torch.equal(now[:, start + 128 :], then[:, start + 128 :])


@pytest.mark.parametrize("n", [7, 128, 5125, 40000])
def test_nothing_is_written_outside_and_nothing_is_left_out(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs poisoned with NaN, each between two canaries."""
    stores = []

    def poisoned(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        store = torch.full((x.numel() + 64,), float("nan"), dtype=dtype, device=x.device)
        store[:32], store[-32:] = 7.0, 7.0
        stores.append(store)
        return store[32:-32].view(x.shape)

    x, residual, weight = rand(5, n), rand(5, n, seed=1), rand(n, seed=2)
    monkeypatch.setattr(triton_backend, "new_result", poisoned)
    normed, total = ops.bind_fused_add_rms_norm(LLAMA, "triton")(x, residual, weight, EPS)
    alone = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    assert len(stores) == 3
    for y in (normed, total, alone):
        assert not y.isnan().any()
    for store in stores:
        assert (store[:32] == 7).all()
        assert (store[-32:] == 7).all()


@pytest.mark.parametrize("n", [128, 4096, 40000])
def test_nan_and_inf_stay_in_their_row(n: int) -> None:
    x, weight = rand(9, n), rand(n, seed=2)
    clean = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    x[2, n // 2], x[5, n - 1] = float("nan"), float("inf")
    y = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    assert torch.equal(y.isnan(), reference.rms_norm(x, weight, LLAMA, EPS).isnan())
    others = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(y[others], clean[others])


def test_extreme_values() -> None:
    weight = rand(4096, dtype=torch.float16, seed=2)
    large = torch.full((3, 4096), 6e4, dtype=torch.float16, device="cuda")
    check(ops.bind_rms_norm(LLAMA, "triton")(large, weight, EPS), reference.rms_norm(large, weight, LLAMA, EPS))
    tail = torch.zeros(3, 4096, dtype=torch.bfloat16, device="cuda")
    tail[:, -2:] = 5.0
    check_all_ops(tail, rand(3, 4096, seed=1, scale=1e-3), weight.bfloat16(), LLAMA)
    check_all_ops(rand(3, 4096, scale=1e-3), rand(3, 4096, seed=1, scale=1e-3), weight.bfloat16(), LLAMA)
    zero = torch.zeros(3, 4096, dtype=torch.bfloat16, device="cuda")
    y = ops.bind_rms_norm(LLAMA, "triton")(zero, weight.bfloat16(), 0.0)
    assert torch.equal(y.isnan(), reference.rms_norm(zero, weight.bfloat16(), LLAMA, 0.0).isnan())
    tiny = rand(3, 4096, dtype=torch.float32, scale=1e-20)  # squares are subnormal in fp32
    y = ops.bind_rms_norm(LLAMA, "triton")(tiny, None, 0.0)
    expected = reference.rms_norm_fp64(tiny, None, LLAMA, 0.0)
    assert ((y - expected).abs() <= 1e-3 * expected.abs() + 1e-6).all()


@pytest.mark.usefixtures("large_memory")
def test_more_than_2_to_the_31_elements() -> None:
    n = 16384
    x = torch.empty(2**31 // n + 3, n, dtype=torch.bfloat16, device="cuda")
    x[:2], x[2:-2], x[-2:] = rand(2, n), 0, rand(2, n, seed=1)
    weight = rand(n, seed=2)
    y = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    check(y[-2:], reference.rms_norm(x[-2:], weight, LLAMA, EPS))
    check(y[:2], reference.rms_norm(x[:2], weight, LLAMA, EPS))
    del y
    far = x.view(-1).as_strided((3, 128), (2**30 + 8, 1))
    check(ops.bind_rms_norm(LLAMA, "triton")(far, weight[:128], EPS), reference.rms_norm(far, weight[:128], LLAMA, EPS))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (70001, 64), (2, 33333, 8)])
def test_row_counts(shape: tuple[int, ...]) -> None:
    check_all_ops(rand(*shape), rand(*shape, seed=1), rand(shape[-1], seed=2), LLAMA)


def test_graph_capture_and_replay_with_new_data() -> None:
    x, residual, weight = rand(8, 4096), rand(8, 4096, seed=1), rand(4096, seed=2)
    fused = ops.bind_fused_add_rms_norm(LLAMA, "triton")
    fused(x, residual, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normed, total = fused(x, residual, weight, EPS)
    x.copy_(rand(8, 4096, seed=5))
    graph.replay()
    expected = fused(x, residual, weight, EPS)
    assert torch.equal(normed, expected[0])
    assert torch.equal(total, expected[1])


def test_side_stream_with_a_delayed_producer() -> None:
    weight, fresh = rand(4096, seed=2), rand(64, 4096)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = torch.zeros(64, 4096, dtype=torch.bfloat16, device="cuda")
        torch.cuda._sleep(50_000_000)
        x.copy_(fresh)
        y = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    stream.synchronize()
    assert torch.equal(y, ops.bind_rms_norm(LLAMA, "triton")(fresh, weight, EPS))


@pytest.mark.parametrize("parameter", [True, False], ids=["parameter", "computed_weight"])
@pytest.mark.parametrize("n", [128, 1024, 4096, 8192, 131072])
def test_a_launch_that_starts_early_sees_what_the_one_before_wrote(n: int, parameter: bool) -> None:
    """Chains without a pause, and replayed from a graph, against chains with one after every call. The most rows are
    more than one wave and more than the number from which on they are prefetched."""
    fused, norm = ops.bind_fused_add_rms_norm(LLAMA, "triton"), ops.bind_rms_norm(LLAMA, "triton")
    in_place = ops.bind_fused_add_rms_norm_(LLAMA, "triton")
    rows = 1100 if n <= 8192 else 40
    start, residual = rand(rows, n), rand(rows, n, seed=1)
    base = torch.nn.Parameter(rand(n, seed=2), requires_grad=False)

    def chain(after_each: Callable[[], object]) -> list[torch.Tensor]:
        x, total, seen = start, residual, []
        for step in range(12):
            weight = base if parameter else base * (1 + step / 8)
            x, total = fused(x, total, weight, EPS)
            after_each()
            x, total = norm(x, weight, EPS).clone(), total.clone()
            after_each()
            in_place(x, total, weight, EPS)
            after_each()
            seen.append(x.clone())
        return [*seen, total]

    expected = chain(torch.cuda.synchronize)
    for _ in range(3):
        assert all(map(torch.equal, chain(lambda: None), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


def test_first_call_from_a_new_thread() -> None:
    x, weight, found = rand(4, 1536), rand(1536, seed=2), []
    spec = replace(GEMMA, width=1535)
    thread = threading.Thread(target=lambda: found.append(ops.bind_rms_norm(spec, "triton")(x, weight, EPS)))
    thread.start()
    thread.join()
    check(found[0], reference.rms_norm(x, weight, spec, EPS))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one() -> None:
    x, weight = rand(4, 768).to("cuda:1"), rand(768, seed=2).to("cuda:1")
    y = ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS)
    assert y.device == x.device
    check(y, reference.rms_norm(x, weight, LLAMA, EPS))


@pytest.mark.parametrize("form", ["op", "decomposed"])
def test_compiled_with_dynamic_rows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.COMPILE_VARIABLE, form)
    torch._dynamo.reset()
    fused, counter = ops.bind_fused_add_rms_norm(LLAMA, "triton"), torch._dynamo.testing.CompileCounter()

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = fused(x * 2, residual, weight, EPS)
        return normed + 1, total

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    counted = torch.compile(layer, fullgraph=True, backend=counter)
    weight = rand(4096, seed=2)
    for rows in (1, 2, 5, 64):
        x, residual = rand(rows, 4096), rand(rows, 4096, seed=1)
        expected = layer(x, residual, weight)
        found = compiled(x, residual, weight)
        counted(x, residual, weight)
        assert torch.equal(found[1], expected[1])
        if form == "op":
            assert torch.equal(found[0], expected[0])
    assert counter.frame_count <= 3
