"""The operands of a CUDA launch on a device: addresses, strides, sizes, pairs; a row alone and among others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from launches import BF16, EPS, check, check_fused, check_norm, parameter, rand

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import launcher
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_cache")]


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
