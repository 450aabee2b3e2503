"""The CUDA kernels against PyTorch's arithmetic and fp64, over every schedule, dtype and numerics axis."""

from __future__ import annotations

import pytest
import torch

from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
SPECS = {
    "llama": LLAMA,
    "one rounding": FP32_WEIGHT_MULTIPLY,
    "gemma": GEMMA,
    "t5": T5,
    "weight-dtype offset": NormSpec(weight_offset="weight_dtype"),
    "weight-dtype offset, one rounding": NormSpec(
        round_before_weight="none", weight_offset="weight_dtype", output="input"
    ),
    "fp32 offset after rounding": NormSpec(weight_offset="fp32"),
    "rounded to the input, output in its dtype": NormSpec(output="input"),
    "no weight": NormSpec(has_weight=False),
    "no weight, fp32 result": NormSpec(has_weight=False, round_before_weight="none"),
    "fp32 sum": NormSpec(sum="fp32", round_before_weight="none", output="input"),
    "fp32 sum, rounded": NormSpec(sum="fp32"),
    "leading columns": NormSpec(width=100),
    "leading odd columns": NormSpec(width=77),
    "groups": NormSpec(group=64),
}
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32), (FP32, BF16), (FP32, FP16)]
# One length for every regime: sub-warp, warp, several warps, decode clusters, odd, 2-, 4- and 8-byte chunks, long.
LENGTHS = [1, 7, 64, 96, 111, 128, 256, 513, 768, 769, 1024, 2048, 2052, 2880, 3584, 4096, 4098, 5120, 5125, 7168, 8192,
           9216, 12288, 16384, 20480, 24449, 24576, 32768, 65536, 131072, 262144]  # fmt: skip
MANTISSA = {BF16: 8, FP16: 11, FP32: 24}


def rows(m, n, dtype, seed=0, scale=1.0):
    generator = torch.Generator(device="cuda").manual_seed(seed * 1_000_003 + n)
    return (torch.randn(m, n, generator=generator, device="cuda") * scale).to(dtype)


def weight_for(n, dtype, spec, seed=7):
    if not spec.has_weight:
        return None
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (torch.rand(n, generator=generator, device="cuda") + 0.5 - float(spec.weight_offset != "none")).to(dtype)


def ulps(got, want):
    """Distance in units of the last place of `got`'s dtype, 0 where equal (NaN equals NaN)."""
    got64, want64 = got.double(), want.double()
    same = (got64 == want64) | (got64.isnan() & want64.isnan())
    exponent = torch.frexp(want64).exponent.clamp_min(-20).double()
    distance = (got64 - want64).abs() / torch.exp2(exponent - MANTISSA[got.dtype])
    return torch.where(same, torch.zeros_like(distance), distance)


def assert_norm(got, x, weight, spec, want=None):
    want = reference.rms_norm(x, weight, spec, EPS) if want is None else want
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    distance = ulps(got, want)
    assert not distance.isnan().any()
    # Another order of summation moves rstd by a few fp32 ulps: rarely one rounding step of a 16-bit result,
    # two where a second rounding follows the first; directly visible in an fp32 result.
    limit = 8 if got.dtype == FP32 and x.dtype == FP32 else 2
    if got.dtype == FP32 and x.dtype != FP32:  # an fp32 product of a 16-bit rounded factor: one step of that factor
        distance = (got.double() - want.double()).abs() / want.double().abs().clamp_min(1e-30)
        rounded = spec.rounded_dtype(x.dtype, None if weight is None else weight.dtype)
        limit = 2.0 ** (1 - MANTISSA[rounded]) if rounded != FP32 else 2.0**-20
    assert distance.max() <= limit, distance.max()
    if got.dtype != FP32:
        assert (distance > 0).double().mean() <= 1e-3 + 2 / got.numel()


def fused(spec, x, residual, weight):
    normed, total = cuda_backend.bind("fused_add_rms_norm", spec)(x, residual, weight, EPS)
    return normed, total


def check_all_ops(m, n, spec, dtype, weight_dtype):
    x, residual, weight = rows(m, n, dtype, 1), rows(m, n, dtype, 2), weight_for(n, weight_dtype, spec)
    if spec.sum == "rounded":
        assert_norm(cuda_backend.bind("rms_norm", spec)(x, weight, EPS), x, weight, spec)
    want, want_total = reference.fused_add_rms_norm(x, residual, weight, spec, EPS)
    normed, total = fused(spec, x, residual, weight)
    assert torch.equal(total, want_total)
    assert_norm(normed, x + residual, weight, spec, want)
    if want.dtype == dtype:
        in_place_x, in_place_residual = x.clone(), residual.clone()
        cuda_backend.bind("fused_add_rms_norm_", spec)(in_place_x, in_place_residual, weight, EPS)
        assert torch.equal(in_place_residual, total)
        assert torch.equal(in_place_x, normed)


@pytest.mark.parametrize("n", LENGTHS)
def test_every_length(n):
    for m in (1, 3, 40) if n <= 32768 else (1, 5):
        check_all_ops(m, n, LLAMA, BF16, BF16)
    check_all_ops(2, n, LLAMA, FP32, FP32)


@pytest.mark.parametrize("n", [128, 1024, 4096, 8192, 16384])
def test_every_regime_of_row_counts(n):
    for m in (1, 16, 17, 600, 2100):
        check_all_ops(m, n, LLAMA, BF16, BF16)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_every_axis(name, dtype, weight_dtype):
    for n in (128, 4096) if name != "groups" else (1024,):
        check_all_ops(5, n, SPECS[name], dtype, weight_dtype)


@pytest.mark.parametrize("n", [64, 1024, 2880, 4096, 5125, 6144, 7168, 8192, 9216, 16384, 24576, 32768, 65536, 131072])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_row_does_not_depend_on_its_batch(n, dtype):
    m = 2100 if n <= 16384 else 600
    x, residual, weight = rows(m, n, dtype, 3), rows(m, n, dtype, 4), weight_for(n, dtype, LLAMA)
    normed, _ = fused(LLAMA, x, residual, weight)
    plain = cuda_backend.bind("rms_norm", LLAMA)
    whole = plain(x, weight, EPS)
    starts, ends = (0, 5, 7, 11, 3, 100, 0, m - 1), (1, 21, 37, 75, 130, 500, 700, m)  # a part for every schedule
    for part in map(slice, starts, ends):
        assert torch.equal(fused(LLAMA, x[part], residual[part], weight)[0], normed[part]), part
        assert torch.equal(plain(x[part], weight, EPS), whole[part]), part


def test_a_row_does_not_depend_on_its_address():
    n = 4096
    x, residual, weight = rows(9, n, BF16, 3), rows(9, n, BF16, 4), weight_for(n, BF16, LLAMA)
    normed, total = fused(LLAMA, x, residual, weight)
    for offset in (1, 2, 3, 4, 8):
        moved = [
            torch.empty(t.numel() + offset, dtype=BF16, device="cuda")[offset:].view(t.shape) for t in (x, residual)
        ]
        moved[0].copy_(x), moved[1].copy_(residual)
        moved_weight = torch.empty(n + offset, dtype=BF16, device="cuda")[offset:].copy_(weight)
        again, total_again = fused(LLAMA, *moved, moved_weight)
        assert torch.equal(again, normed)
        assert torch.equal(total_again, total)


@pytest.mark.parametrize("n", [128, 4096, 5125, 131072])
def test_a_hundred_repeats_are_bitwise_equal(n):
    x, residual, weight = rows(33, n, BF16, 5), rows(33, n, BF16, 6), weight_for(n, BF16, LLAMA)
    first = fused(LLAMA, x, residual, weight)
    for _ in range(99):
        again = fused(LLAMA, x, residual, weight)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("n", [1, 7, 111, 513, 769, 2880, 4096, 5125, 16384])
@pytest.mark.parametrize("m", [1, 37, 700])
def test_neighbours_stay_untouched(n, m):
    """In place on rows inside a larger allocation: what lies before, between and after them keeps its bits."""
    padding = 24
    buffers = [torch.full((m + 2, n + padding), 1234.0, dtype=BF16, device="cuda") for _ in range(2)]
    x, residual = (buffer[1:-1, :n] for buffer in buffers)
    x.copy_(rows(m, n, BF16, 8))
    residual.copy_(rows(m, n, BF16, 9))
    weight = weight_for(n, BF16, LLAMA)
    want, want_total = reference.fused_add_rms_norm(x.clone(), residual.clone(), weight, LLAMA, EPS)
    cuda_backend.bind("fused_add_rms_norm_", LLAMA)(x, residual, weight, EPS)
    assert torch.equal(residual, want_total)
    assert_norm(x.contiguous(), want_total, weight, LLAMA, want)
    for buffer in buffers:
        buffer[1:-1, :n] = 1234.0
        assert (buffer == 1234.0).all()


@pytest.mark.parametrize("n", [111, 4096, 5125, 65536])
def test_poisoned_outputs_are_written_everywhere(n, monkeypatch):
    m = 37
    x, residual, weight = rows(m, n, BF16, 1), rows(m, n, BF16, 2), weight_for(n, BF16, LLAMA)
    for tensor in [torch.full((m, n), float("nan"), dtype=BF16, device="cuda") for _ in range(4)]:
        del tensor  # the allocator hands these blocks to the outputs
    normed, total = fused(LLAMA, x, residual, weight)
    assert not normed.isnan().any()
    assert not total.isnan().any()


@pytest.mark.parametrize("n", [128, 4096, 16384, 5125])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_difficult_values(n, dtype):
    weight = weight_for(n, dtype, LLAMA)
    plain = cuda_backend.bind("rms_norm", LLAMA)
    large = torch.full((2, n), 6e4, device="cuda").to(dtype)
    got = plain(large, weight, EPS)
    assert got.isfinite().all()
    assert torch.allclose(
        got.double(), reference.rms_norm_fp64(large, weight, LLAMA, EPS), rtol=2.0 ** (2 - MANTISSA[dtype])
    )
    for scale in (1e-3, 1e-6):
        x = rows(4, n, dtype, 3, scale)
        assert_norm(plain(x, weight, EPS), x, weight, LLAMA)
    tail = torch.zeros(4, n, device="cuda", dtype=dtype)
    tail[:, -3:] = 5.0
    assert_norm(plain(tail, weight, EPS), tail, weight, LLAMA)
    zeros = torch.zeros(3, n, device="cuda", dtype=dtype)
    for eps in (0.0, 1e-6):
        want = reference.rms_norm(zeros, weight, LLAMA, eps)
        assert torch.equal(plain(zeros, weight, eps).isnan(), want.isnan())
    spoiled = rows(9, n, dtype, 4)
    clean = plain(spoiled, weight, EPS)
    spoiled[3, n // 2], spoiled[6, 0] = float("nan"), float("inf")
    got = plain(spoiled, weight, EPS)
    keep = [0, 1, 2, 4, 5, 7, 8]
    assert torch.equal(got[keep], clean[keep])
    assert got[3].isnan().all()
    assert got[6, 0].isnan()


def test_eps_is_a_run_time_value():
    x, weight = rows(4, 4096, BF16, 1, 1e-3), weight_for(4096, BF16, LLAMA)
    plain = cuda_backend.bind("rms_norm", LLAMA)
    for eps in (0.0, 1e-8, 1e-6, 1e-5, 1.0):
        got, want = plain(x, weight, eps), reference.rms_norm(x, weight, LLAMA, eps)
        assert ulps(got, want).max() <= 2


def test_strided_rows():
    n, tokens = 128, 50
    qkv = rows(tokens, 48 * n, BF16, 1)
    weight = weight_for(n, BF16, LLAMA)
    query = qkv[:, : 32 * n].view(tokens, 32, n)
    assert_norm(cuda_backend.bind("rms_norm", LLAMA)(query, weight, EPS), query.contiguous(), weight, LLAMA)
    batched = rows(6 * 5, 3 * 256, BF16, 2).view(6, 5, 3, 256)[:, 1:4, 1]
    got = cuda_backend.bind("rms_norm", LLAMA)(batched, weight_for(256, BF16, LLAMA), EPS)
    assert_norm(got, batched.contiguous(), weight_for(256, BF16, LLAMA), LLAMA)
    x, residual = rows(33, 2 * 4096, BF16, 3)[:, :4096], rows(33, 4096 + 8, BF16, 4)[:, 8:]
    weight = weight_for(4096, BF16, LLAMA)
    normed, total = fused(LLAMA, x, residual, weight)
    assert torch.equal(total, x + residual)
    assert_norm(normed, total, weight, LLAMA)


def test_residual_is_the_input():
    x, weight = rows(20, 4096, BF16, 1), weight_for(4096, BF16, LLAMA)
    normed, total = fused(LLAMA, x, x, weight)
    assert torch.equal(total, x + x)
    assert_norm(normed, total, weight, LLAMA)


def test_more_than_two_to_the_31_elements():
    n = 8192
    m = 2**31 // n + 5
    x, weight = torch.empty(m, n, dtype=BF16, device="cuda"), weight_for(n, BF16, LLAMA)
    x.normal_()
    got = cuda_backend.bind("rms_norm", LLAMA)(x, weight, EPS)
    for part in (slice(0, 4), slice(m - 4, m)):
        assert_norm(got[part], x[part], weight, LLAMA)


def test_many_short_rows():
    for m, n in ((65537 * 3, 64), (70001, 128), (100_003, 7)):
        x, weight = rows(m, n, BF16, 1), weight_for(n, BF16, LLAMA)
        assert_norm(cuda_backend.bind("rms_norm", LLAMA)(x, weight, EPS), x, weight, LLAMA)


def test_a_chain_of_dependent_launches():
    """Each launch starts early and must still see what the one before it wrote."""
    for n in (128, 2048, 4096, 8192, 16384, 65536):
        x, residual, weight = rows(16, n, BF16, 1), rows(16, n, BF16, 2), weight_for(n, BF16, LLAMA)
        in_place = cuda_backend.bind("fused_add_rms_norm_", LLAMA)
        want_x, want_residual = x.clone(), residual.clone()
        for _ in range(50):
            want_x, want_residual = fused(LLAMA, want_x, want_residual, weight)
            torch.cuda.synchronize()
        for _ in range(50):
            in_place(x, residual, weight, EPS)
        assert torch.equal(x, want_x)
        assert torch.equal(residual, want_residual)


def test_no_rows_and_no_columns():
    weight = weight_for(64, BF16, LLAMA)
    assert cuda_backend.bind("rms_norm", LLAMA)(torch.empty(0, 64, dtype=BF16, device="cuda"), weight, EPS).shape == (
        0,
        64,
    )
    with pytest.raises(UnsupportedInput):
        cuda_backend.bind("rms_norm", LLAMA)(torch.empty(4, 0, dtype=BF16, device="cuda"), weight[:0], EPS)
