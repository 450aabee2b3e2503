"""Bad and difficult input on a device, one numbered case after the other: right against fp64, or a named error.

    1-16  shape and address    17-27  numerics    32-42  device, stream, graph, compile

Aliasing (28-31) and patching (43-58) need no GPU and are in `integration_tests/adversarial`. Tests marked `sanitized`
also run under compute-sanitizer (`scripts/gpu_record.py run --parts sanitizer`).
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import cache
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec
from rmsnorm_patch.numerics.tolerances import SITE
from rmsnorm_patch.ops import dispatch
from rmsnorm_patch.proof.difference import compare

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
WEIGHTLESS = NormSpec(has_weight=False)
case = pytest.mark.case
sanitized = pytest.mark.sanitized


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def rand(*shape: int, dtype: torch.dtype = BF16, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def parameter(n: int, dtype: torch.dtype = BF16) -> nn.Parameter:
    return nn.Parameter((1 + rand(n, dtype=FP32, seed=9, scale=0.2)).to(dtype), requires_grad=False)


def norm(spec: NormSpec, backend: str):
    return ops.bind_rms_norm(spec, backend)  # type: ignore[arg-type]


def fused(spec: NormSpec, backend: str):
    return ops.bind_fused_add_rms_norm(spec, backend)  # type: ignore[arg-type]


def in_place(spec: NormSpec, backend: str):
    return ops.bind_fused_add_rms_norm_(spec, backend)  # type: ignore[arg-type]


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the proof's own tolerance of the original arithmetic."""
    assert actual.dtype == expected.dtype
    assert compare(actual, expected).violations(SITE[expected.dtype], expected.dtype) == ()


def check(x, residual, weight, backend: str, spec: NormSpec = LLAMA, eps: float = EPS) -> None:
    """Both ops against the original arithmetic, and its error against fp64 against the original's own."""
    normed = norm(spec, backend)(x, weight, eps)
    same(normed, reference.rms_norm(x, weight, spec, eps))
    both, total = fused(spec, backend)(x, residual, weight, eps)
    want, want_total = reference.fused_add_rms_norm(x, residual, weight, spec, eps)
    assert torch.equal(total, want_total)
    same(both, want)
    if x.dtype != FP32:  # there a row moves as one with its rstd, and `same` has held it to 8 ulp
        exact = reference.rms_norm_fp64(want_total, weight, spec, eps)
        error, own = ((y.double() - exact).square().mean().sqrt().item() for y in (both, want))
        assert error <= 1.05 * own + 1e-30


def plain_case(m: int, n: int, backend: str, spec: NormSpec = LLAMA, dtype: torch.dtype = BF16) -> None:
    check(rand(m, n, dtype=dtype), rand(m, n, dtype=dtype, seed=1), parameter(n, dtype), backend, spec)


def shifted(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins `offset` elements into its storage."""
    return torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)[offset:].view(x.shape).copy_(x)


# Shape and address


@case(1)
@pytest.mark.parametrize("shape", [(0, 512), (3, 0, 512)])
def test_no_rows_launch_nothing(shape, backend):
    x, residual, weight = rand(*shape), rand(*shape, seed=1), parameter(512)
    fused(LLAMA, backend)(rand(2, 512), rand(2, 512), weight, EPS)  # compiled, so that only launches could be seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        normed, total = fused(LLAMA, backend)(x, residual, weight, EPS)
        alone = norm(LLAMA, backend)(x, weight, EPS)
        torch.cuda.synchronize()
    assert normed.shape == total.shape == alone.shape == torch.Size(shape)
    assert not [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@case(2)
def test_no_columns(backend):
    with pytest.raises(UnsupportedInput, match=r"x of shape \(4, 0\).*at least one column"):
        norm(LLAMA, backend)(rand(4, 0), rand(0), EPS)


@sanitized
@case(3)
@pytest.mark.parametrize("n", [1, 7, 111, 513, 769, 2880, 5125])
def test_odd_lengths_leave_the_next_row_alone(n, backend):
    """In place on rows inside a larger allocation: what lies before, between and after them keeps its bits."""
    x, residual = (torch.full((7, n + 5), 1234.0, dtype=BF16, device="cuda") for _ in range(2))
    rows, sums = x[1:-1, :n], residual[1:-1, :n]
    rows.copy_(rand(5, n)), sums.copy_(rand(5, n, seed=1))
    want, want_total = reference.fused_add_rms_norm(rows.clone(), sums.clone(), parameter(n), LLAMA, EPS)
    in_place(LLAMA, backend)(rows, sums, parameter(n), EPS)
    same(rows.contiguous(), want)
    assert torch.equal(sums, want_total)
    for buffer in (x, residual):
        buffer[1:-1, :n] = 1234.0
        assert (buffer == 1234.0).all()


@sanitized
@case(4)
@pytest.mark.parametrize("n", [3584, 16384, 24449, 65536, 131072, 262144])
def test_long_rows(n, backend):
    plain_case(3, n, backend)


@case(5)
@pytest.mark.parametrize("n", [262145, 300_000])
def test_longer_than_any_kernel(n):
    choice = dispatch.choose("fused_add_rms_norm", LLAMA, BF16, BF16, 2, n, device=torch.device("cuda:0"))
    assert choice.backend == "triton"
    assert f"needs N <= 262144, x has N={n}" in choice.reason
    plain_case(2, n, "auto")


@case(6)
def test_more_than_two_to_the_31_elements(backend):
    n = 16384
    m = 2**31 // n + 3
    x = torch.empty(m, n, dtype=BF16, device="cuda").fill_(0.5)
    x[:2], x[-2:] = rand(2, n), rand(2, n, seed=1)
    normed = norm(LLAMA, backend)(x, parameter(n), EPS)
    for part in (slice(0, 2), slice(m - 2, m)):
        same(normed[part], reference.rms_norm(x[part], parameter(n), LLAMA, EPS))


@case(7)
def test_rows_further_apart_than_two_to_the_31_elements(backend):
    n = 128
    x = torch.empty(2**31 + 2**20, dtype=BF16, device="cuda").as_strided((3, n), (2**30 + 8, 1))
    x.copy_(rand(3, n))
    same(norm(LLAMA, backend)(x, parameter(n), EPS), reference.rms_norm(x, parameter(n), LLAMA, EPS))
    in_place(LLAMA, backend)(x, residual := rand(3, n, seed=1), parameter(n), EPS)
    assert torch.equal(residual, rand(3, n) + rand(3, n, seed=1))


@sanitized
@case(8)
@pytest.mark.parametrize(("m", "n"), [(65_537, 64), (70_001, 128), (65_543, 7)])
def test_more_rows_than_a_grid_axis_holds(m, n, backend):
    plain_case(m, n, backend)


@sanitized
@case(9)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "residual", "weight"])
@pytest.mark.parametrize("n", [1024, 769])
def test_storage_offsets(which, offset, n, backend):
    operands = [rand(9, n), rand(9, n, seed=1), parameter(n).data]
    want = fused(LLAMA, backend)(*operands, EPS)
    operands[which] = shifted(operands[which], offset)
    got = fused(LLAMA, backend)(*operands, EPS)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    check(*operands, backend)


@sanitized
@case(10)
def test_slices_of_a_packed_projection(backend):
    packed, weight = rand(33, 48 * 128), parameter(4096)
    check(packed[:, :4096], packed[:, 1024:5120], weight, backend)
    query, key = packed[:, :4096].view(33, 32, 128), packed[:, 4096:5120].view(33, 8, 128)
    for heads in (query, key):
        check(heads, rand(*heads.shape, seed=1), parameter(128), backend)


@sanitized
@case(10)
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_query_and_key_of_a_packed_projection_in_one_launch(tokens):
    heads = rand(tokens, 48 * 128).view(tokens, 48, 128)
    weights = parameter(128), nn.Parameter(1 - parameter(128).data, requires_grad=False)
    results = query_key_norm_kernel.bind_rms_norm_pair(LLAMA)(heads[:, :32], heads[:, 32:40], *weights, EPS)
    for got, x, weight in zip(results, (heads[:, :32], heads[:, 32:40]), weights, strict=True):
        assert torch.equal(got, norm(LLAMA, "cuda")(x, weight, EPS))
        same(got, reference.rms_norm(x, weight, LLAMA, EPS))


@sanitized
@case(11)
def test_columns_that_are_not_adjacent(backend):
    weight = parameter(512)
    check(rand(9, 1024)[:, ::2], rand(9, 512, seed=1), weight, backend)
    check(rand(512, 9).t(), rand(512, 9, seed=1).t(), weight, backend)


@sanitized
@case(12)
def test_x_and_residual_with_strides_of_their_own(backend):
    check(rand(33, 1032)[:, 8:], rand(33, 2048)[:, :1024], parameter(1024), backend)
    check(rand(33, 1025)[:, 1:], rand(33, 1024, seed=1), parameter(1024), backend)
    x, residual = rand(33, 1032)[:, 8:], rand(33, 2048)[:, :1024]
    want = fused(LLAMA, backend)(x, residual, parameter(1024), EPS)
    in_place(LLAMA, backend)(x, residual, parameter(1024), EPS)
    assert torch.equal(x, want[0])
    assert torch.equal(residual, want[1])


@sanitized
@case(13)
def test_views_that_cannot_be_flattened(backend):
    packed, weight = rand(4, 5, 24, 128), parameter(128)
    for view in (packed[:, :, 4:20], packed[:, ::2, 4:20], packed[:, :, 4:20].transpose(1, 2)):
        check(view, rand(*view.shape, seed=1), weight, backend)
        check(rand(*view.shape, seed=1), view, weight, backend)
    x, residual = packed.clone()[:, ::2, 4:20], rand(4, 3, 16, 128, seed=1)
    want = fused(LLAMA, backend)(x, residual, weight, EPS)
    in_place(LLAMA, backend)(x, residual, weight, EPS)
    assert torch.equal(x, want[0])


@case(14)
def test_an_expanded_tensor_is_read_but_not_written(backend):
    row, residual, weight = rand(1, 512), rand(6, 512, seed=1), parameter(512)
    check(row.expand(6, 512), residual, weight, backend)
    for operands in ((row.expand(6, 512), residual), (residual, row.expand(6, 512))):
        with pytest.raises(UnsupportedInput, match=r"\(6, 512\) expanded with strides \(0, 1\).*contiguous\(\)"):
            in_place(LLAMA, backend)(*operands, weight, EPS)


@case(15)
@pytest.mark.parametrize("shape", [(4, 256), (1, 512), (8, 512)])
def test_a_residual_of_another_shape(shape, backend):
    for op in (fused, in_place):
        with pytest.raises(UnsupportedInput, match=rf"residual of shape \({shape[0]}, {shape[1]}\).*\(4, 512\)"):
            op(LLAMA, backend)(rand(4, 512), rand(*shape), parameter(512), EPS)


@case(16)
@pytest.mark.parametrize("length", [1, 511, 513])
def test_a_weight_of_another_length(length, backend):
    with pytest.raises(UnsupportedInput, match=rf"weight of shape \({length},\) for x of shape \(4, 512\)"):
        norm(LLAMA, backend)(rand(4, 512), parameter(length), EPS)
    with pytest.raises(UnsupportedInput, match=rf"weight of shape \({length},\)"):
        fused(LLAMA, backend)(rand(4, 512), rand(4, 512), parameter(length), EPS)


# Numerics


@sanitized
@case(17)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("n", [128, 4096, 5125])
def test_an_fp32_weight(n, dtype, backend):
    """Once with the result in x's dtype, once promoted to fp32 as Llama's own norm does."""
    x, residual, weight = rand(9, n, dtype=dtype), rand(9, n, dtype=dtype, seed=1), parameter(n, FP32)
    check(x, residual, weight, backend, FP32_WEIGHT_MULTIPLY)
    promoted = norm(LLAMA, backend)(x, weight, EPS)
    assert promoted.dtype == FP32
    exact, step = reference.rms_norm_fp64(x, weight, LLAMA, EPS), torch.finfo(dtype)
    least = step.eps * step.smallest_normal  # between subnormals of x's dtype, in which x * rstd is rounded
    assert ((promoted.double() - exact).abs() <= step.eps * exact.abs() + least).all()


@case(18)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_a_kernel(dtype, backend):
    x = torch.ones(4, 512, device="cuda").to(dtype)
    with pytest.raises(UnsupportedInput, match=rf"{dtype}.*float32, bfloat16, float16"):
        norm(LLAMA, backend)(x, None, EPS)
    with pytest.raises(UnsupportedInput, match=rf"weight of dtype {dtype}"):
        norm(LLAMA, backend)(rand(4, 512), x[0], EPS)


@case(19)
@pytest.mark.parametrize("n", [128, 4096, 65536])
def test_large_fp16_values(n, backend):
    x = torch.full((3, n), 6e4, dtype=FP16, device="cuda")
    x[1, ::2] = -6e4
    weight = parameter(n, FP16)
    got = norm(LLAMA, backend)(x, weight, EPS)
    assert got.isfinite().all()
    exact = reference.rms_norm_fp64(x, weight, LLAMA, EPS)
    assert ((got.double() - exact).abs() <= 2**-10 * exact.abs()).all()


@case(20)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_row_of_zeros(dtype, backend):
    x, weight = torch.zeros(3, 1024, dtype=dtype, device="cuda"), parameter(1024, dtype)
    for eps in (0.0, EPS):
        got, want = norm(LLAMA, backend)(x, weight, eps), reference.rms_norm(x, weight, LLAMA, eps)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@case(21)
@pytest.mark.parametrize("n", [7, 128, 4096, 65536])
def test_nan_and_inf_stay_in_their_row(n, backend):
    x, weight = rand(9, n), parameter(n)
    clean = norm(LLAMA, backend)(x, weight, EPS)
    x[2, n // 2], x[5, n - 1] = float("nan"), float("inf")
    got, want = norm(LLAMA, backend)(x, weight, EPS), reference.rms_norm(x, weight, LLAMA, EPS)
    others = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(got[others], clean[others])
    assert torch.equal(got.isnan(), want.isnan())


@case(22)
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-39])
def test_tiny_values(scale, backend):
    for dtype in (BF16, FP32) if scale < 1e-7 else (BF16, FP16, FP32):
        x, residual = rand(5, 1024, dtype=dtype, scale=scale), rand(5, 1024, dtype=dtype, seed=1, scale=scale)
        check(x, residual, parameter(1024, dtype), backend)


@case(22)
def test_squares_that_are_subnormal(backend):
    x = rand(5, 1024, dtype=FP32, scale=1e-20)
    got, exact = norm(WEIGHTLESS, backend)(x, None, 0.0), reference.rms_norm_fp64(x, None, WEIGHTLESS, 0.0)
    assert ((got.double() - exact).abs() <= 1e-3 * exact.abs() + 1e-6).all()


@sanitized
@case(23)
@pytest.mark.parametrize("n", [513, 4096, 5125, 65536])
def test_energy_in_the_last_columns(n, backend):
    x = torch.zeros(3, n, dtype=BF16, device="cuda")
    x[:, -2:] = 5.0
    check(x, rand(3, n, scale=1e-3), parameter(n), backend)


@sanitized
@case(24)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    "spec", [GEMMA, NormSpec(weight_offset="weight_dtype"), WEIGHTLESS], ids=["1+w", "1+w in w", "no weight"]
)
def test_offset_weights_and_none(spec, dtype, backend):
    weight = (parameter(768, dtype) - 1).detach() if spec.has_weight else None
    check(rand(9, 768, dtype=dtype), rand(9, 768, dtype=dtype, seed=1), weight, backend, spec)


class Holder(nn.Module):
    """The norms of a model, one beside the other."""

    def __init__(self, **norms: nn.Module) -> None:
        super().__init__()
        for name, module in norms.items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [module(x) for module in self.children()]


@case(25)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 0.25])
def test_eps_under_every_name(eps, backend):
    """At an rms of 1e-3 each of these values gives another result, and `a or b` another one for 0.0."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    llama, gemma, torchs = LlamaRMSNorm(256, eps=eps), GemmaRMSNorm(256, eps=eps), nn.RMSNorm(256, eps=eps)
    model = Holder(llama=llama, gemma=gemma, torchs=torchs, default=nn.RMSNorm(256, eps=None)).cuda().to(BF16).eval()
    x = rand(6, 256, scale=1e-3)
    with torch.no_grad():
        want = model(x)
        report = rmsnorm_patch.apply(model, backend=backend)
        assert len(list(report.plan.fused_norms())) == 4, report.plan
        for got, expected in zip(model(x), want, strict=True):
            same(got, expected)
        for module, name in ((llama, "variance_epsilon"), (gemma, "eps"), (torchs, "eps")):
            setattr(module, name, 1.0)  # read at each call, as the original does
        changed = model(x)
        rmsnorm_patch.revert(model)
        for got, expected in zip(changed, model(x), strict=True):
            same(got, expected)


@case(26)
@pytest.mark.parametrize("n", [7, 128, 4096, 5125, 65536])
def test_poisoned_outputs_are_written_everywhere(n, backend):
    x, residual, weight = rand(5, n), rand(5, n, seed=1), parameter(n)
    torch.cuda.empty_cache()
    poison = [torch.full((5, n), float("nan"), dtype=BF16, device="cuda") for _ in range(3)]
    addresses = {tensor.data_ptr() for tensor in poison}
    del poison  # the allocator hands these blocks to the outputs
    normed, total = fused(LLAMA, backend)(x, residual, weight, EPS)
    alone = norm(LLAMA, backend)(x, weight, EPS)
    assert {normed.data_ptr(), total.data_ptr()} & addresses
    for result in (normed, total, alone):
        assert not result.isnan().any()


@case(27)
@pytest.mark.parametrize("n", [64, 4096, 5125, 16384, 131072])
def test_repeats_and_batches_are_bitwise_equal(n, backend):
    m = 700 if n <= 16384 else 40
    x, residual, weight = rand(m, n), rand(m, n, seed=1), parameter(n)
    normed, total = fused(LLAMA, backend)(x, residual, weight, EPS)
    alone = norm(LLAMA, backend)(x, weight, EPS)
    for _ in range(100):
        again = fused(LLAMA, backend)(x, residual, weight, EPS)
        assert torch.equal(again[0], normed)
        assert torch.equal(again[1], total)
    for rows in (slice(0, 1), slice(m - 1, m), slice(7, 30)):
        assert torch.equal(fused(LLAMA, backend)(x[rows], residual[rows], weight, EPS)[0], normed[rows])
        assert torch.equal(norm(LLAMA, backend)(x[rows], weight, EPS), alone[rows])


# Device, stream, graph, compile


@case(32)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_current(backend):
    x, weight = rand(8, 2048).to("cuda:1"), parameter(2048).to("cuda:1")
    with torch.cuda.device(0):
        got = norm(LLAMA, backend)(x, weight, EPS)
        assert torch.cuda.current_device() == 0
    assert got.device == x.device
    same(got, reference.rms_norm(x, weight, LLAMA, EPS))


@case(33)
def test_operands_on_different_devices_are_named(backend):
    for weight in (parameter(512).cpu(), nn.Parameter(parameter(512).cpu())):
        with pytest.raises(UnsupportedInput, match=r"weight on cpu and x on cuda:0.*\.to\(device\)"):
            norm(LLAMA, backend)(rand(4, 512), weight, EPS)
    with pytest.raises(UnsupportedInput, match=r"residual on cpu and x on cuda:0"):
        fused(LLAMA, backend)(rand(4, 512), rand(4, 512).cpu(), parameter(512), EPS)


@case(34)
def test_cpu_tensors_take_the_reference_path():
    x, residual, weight = rand(4, 512).cpu(), rand(4, 512, seed=1).cpu(), parameter(512).cpu()
    got = fused(LLAMA, "auto")(x, residual, weight, EPS)
    want = reference.fused_add_rms_norm(x, residual, weight, LLAMA, EPS)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    with pytest.raises(UnsupportedInput, match=r"x on cpu"):
        cuda_backend.bind("rms_norm", LLAMA)(x, weight, EPS)


@case(35)
def test_side_stream_with_a_delayed_producer(backend):
    fresh, weight = rand(64, 4096), parameter(4096)
    expected = norm(LLAMA, backend)(fresh, weight, EPS)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = torch.zeros_like(fresh)
        torch.cuda._sleep(50_000_000)
        x.copy_(fresh)
        got = norm(LLAMA, backend)(x, weight, EPS)
    stream.synchronize()
    assert torch.equal(got, expected)


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@case(36)
@pytest.mark.parametrize("n", [2048, 5125])
def test_a_captured_graph_replays_with_new_data(n, backend):
    x, residual, weight = rand(8, n), rand(8, n, seed=1), parameter(n)
    op = fused(LLAMA, backend)
    op(x, residual, weight, EPS)
    graph, (normed, total) = captured(lambda: op(*op(x, residual, weight, EPS), weight, EPS))
    for seed in (5, 6):
        x.copy_(rand(8, n, seed=seed))
        graph.replay()
        expected = op(*op(x, residual, weight, EPS), weight, EPS)
        assert torch.equal(normed, expected[0])
        assert torch.equal(total, expected[1])


@case(37)
def test_capture_with_a_cold_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "cold"))
    n = 3096  # in no other test, so that nothing of it is loaded
    x, weight, spec = rand(8, n), parameter(n), replace(GEMMA, width=n - 1)
    graph, result = captured(lambda: norm(spec, "cuda")(x, weight, EPS))
    assert list((tmp_path / "cold").glob("*.artefact")), "was compiled before"
    x.copy_(rand(8, n, seed=4))
    graph.replay()
    same(result, reference.rms_norm(x, weight, spec, EPS))


@case(38)
def test_fullgraph_with_any_number_of_rows(backend):
    torch._dynamo.reset()
    op, counter = fused(LLAMA, backend), torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def layer(x, residual, weight):
        normed, total = op(x * 2, residual, weight, EPS)
        return normed + 1, total

    compiled, weight = torch.compile(layer, fullgraph=True, backend=counter), parameter(4096)
    for m in (1, 2, 5, 64, 300):
        x, residual = rand(m, 4096), rand(m, 4096, seed=1)
        got, want = compiled(x, residual, weight), layer(x, residual, weight)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    assert counter.frame_count <= 3


@case(39)
def test_opcheck_fake_tensors_and_symbolic_sizes(backend):
    spec = dict(zip(("round_before_weight", "weight_offset", "output"), ops.spec_args(LLAMA)[:3], strict=True))
    x, residual, weight = rand(4, 256), rand(4, 256, seed=1), parameter(256).detach()
    named = {**spec, "backend": backend}
    tests = ("test_schema", "test_faketensor")
    library = torch.ops.rmsnorm_patch
    torch.library.opcheck(library.rms_norm.default, (x, weight, EPS), named, test_utils=tests)
    torch.library.opcheck(library.fused_add_rms_norm.default, (x, residual, weight, EPS), named, test_utils=tests)
    operands = (x.clone(), residual.clone(), weight, EPS)
    torch.library.opcheck(library.fused_add_rms_norm_.default, operands, named, test_utils=tests)
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x, residual, weight: library.fused_add_rms_norm(x, residual, weight, EPS, **named),
        tracing_mode="symbolic",
    )(x, residual, weight)
    for m in (1, 9):
        more = rand(m, 256), rand(m, 256, seed=1)
        got, want = graph(*more, weight), fused(LLAMA, backend)(*more, weight, EPS)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@case(40)
def test_patching_a_compiled_model_recompiles_it(small_model, backend, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("RMSNORM_PATCH_COMPILE", "op")  # by default a patched model's graphs keep its own arithmetic
    model, ids = small_model("llama", BF16).cuda(), torch.arange(14, device="cuda").view(2, 7)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    ours = lambda graphs: any("rmsnorm_patch" in str(n.target) for g in graphs for n in g.graph.nodes)  # noqa: E731
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        assert not ours(counter.graphs)
        rmsnorm_patch.apply(model, backend=backend)
        eager, after = model(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits
        assert ours(counter.graphs)
        assert (after - eager).norm() <= 0.02 * eager.norm()
        rmsnorm_patch.revert(model)
        assert torch.equal(compiled(ids, use_cache=False).logits, before)


@case(41)
def test_first_call_from_a_new_thread(backend):
    x, weight, spec, found = rand(4, 1544), parameter(1544), replace(GEMMA, width=1543), []
    thread = threading.Thread(target=lambda: found.append(norm(spec, backend)(x, weight, EPS)))
    thread.start()
    thread.join()
    same(found[0], reference.rms_norm(x, weight, spec, EPS))


@case(42)
def test_unknown_capabilities():
    choose = lambda sm: dispatch.choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, sm)  # noqa: E731
    newer = choose(130)
    assert newer.backend == "cuda"
    assert "sm_130 is not among the proved sm_80" in newer.reason
    older = choose(75)
    assert older.backend == "triton"
    assert "needs sm_80 or newer, device has sm_75" in older.reason
