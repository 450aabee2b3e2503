"""Bad and difficult shapes and addresses on a device, cases 1 to 16: right against fp64, or a named error.

Aliasing (28-31) and patching (43-58) need no GPU and are in `integration_tests/adversarial`. Tests marked `sanitized`
also run under compute-sanitizer (`scripts/gpu_record.py run --parts sanitizer`).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from bad_input import (
    BF16,
    EPS,
    case,
    check,
    fused,
    in_place,
    norm,
    parameter,
    plain_case,
    rand,
    same,
    sanitized,
    shifted,
)

from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.ops import dispatch

pytestmark = pytest.mark.gpu


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
