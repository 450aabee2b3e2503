"""Every input that the ops refuse, and the words they use: what came, what is supported, what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics.operands import share_memory
from rmsnorm_patch.numerics.spec import LLAMA

BACKENDS = ["auto", "triton"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


@pytest.fixture
def norm(backend: str) -> ops.Bound:
    return ops.bind_rms_norm(LLAMA, backend)  # type: ignore[arg-type]


@pytest.fixture
def fused(backend: str) -> ops.Bound:
    return ops.bind_fused_add_rms_norm(LLAMA, backend)  # type: ignore[arg-type]


@pytest.fixture
def in_place(backend: str) -> ops.Bound:
    return ops.bind_fused_add_rms_norm_(LLAMA, backend)  # type: ignore[arg-type]


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(UnsupportedInput) as caught:
        call()
    for word in (*words, "; supported: ", "; next: "):
        assert word in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), ()])
def test_no_columns(norm: ops.Bound, fused: ops.Bound, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    refused(lambda: norm(x, None, 1e-6), "rms_norm: ", f"x of shape {shape}", "at least one column")
    refused(lambda: fused(x, x, None, 1e-6), "fused_add_rms_norm: ", f"x of shape {shape}")


def test_shapes_are_both_named(norm: ops.Bound, fused: ops.Bound, in_place: ops.Bound) -> None:
    x, weight = torch.randn(3, 64), torch.ones(64)
    refused(lambda: norm(x, torch.ones(63), 1e-6), "weight of shape (63,)", "x of shape (3, 64)", "(64,)")
    refused(lambda: norm(x, torch.ones(1, 64), 1e-6), "weight of shape (1, 64)")
    for residual in (torch.randn(64), torch.randn(3, 1), torch.randn(64, 3), torch.randn(1, 3, 64)):
        for op in (fused, in_place):
            named = f"residual of shape {tuple(residual.shape)}"
            refused(lambda op=op, r=residual: op(x, r, weight, 1e-6), named, "x of shape (3, 64)", "no broadcasting")


def test_a_length_that_was_served_does_not_excuse_another_weight(norm: ops.Bound, fused: ops.Bound) -> None:
    x, weight = torch.randn(3, 64), torch.ones(64)
    norm(x, weight, 1e-6)
    fused(x, x, weight, 1e-6)
    refused(lambda: norm(x, torch.ones(128), 1e-6), "weight of shape (128,)")
    refused(lambda: fused(x, torch.randn(2, 64), weight, 1e-6), "residual of shape (2, 64)")
    refused(lambda: fused(x, torch.randn(3, 64).double(), weight, 1e-6), "residual of dtype torch.float64")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_are_listed(norm: ops.Bound, fused: ops.Bound, dtype: torch.dtype) -> None:
    x, good = torch.ones(3, 64).to(dtype), torch.ones(3, 64)
    refused(lambda: norm(x, None, 1e-6), f"x of dtype {dtype}", "float32, bfloat16, float16")
    refused(lambda: fused(x, x, None, 1e-6), f"x of dtype {dtype}", "float32, bfloat16, float16")
    refused(lambda: norm(good, x[0], 1e-6), f"weight of dtype {dtype}", "float32, bfloat16, float16")


def test_devices_are_both_named(norm: ops.Bound, fused: ops.Bound) -> None:
    x, meta = torch.ones(3, 64), torch.ones(3, 64, device="meta")
    refused(lambda: norm(x, meta[0], 1e-6), "weight on meta and x on cpu")
    refused(lambda: fused(x, meta, None, 1e-6), "residual on meta and x on cpu")


def test_expanded_tensors_are_read_but_not_written(fused: ops.Bound, in_place: ops.Bound) -> None:
    wide, x = torch.randn(1, 64).expand(3, 64), torch.randn(3, 64)
    fused(x, wide, None, 1e-6)
    refused(lambda: in_place(x, wide, None, 1e-6), "residual of shape (3, 64) expanded", "(0, 1)", "contiguous()")
    refused(lambda: in_place(wide, x, None, 1e-6), "x of shape (3, 64) expanded")


def test_written_tensors_share_no_memory(in_place: ops.Bound) -> None:
    x, weight, store = torch.randn(3, 64), torch.ones(64), torch.randn(300)
    refused(lambda: in_place(x, x, weight, 1e-6), "residual (written) overlapping x")
    refused(lambda: in_place(x, torch.randn(3, 64), x[1], 1e-6), "x (written) overlapping weight")
    refused(lambda: in_place(torch.randn(3, 64), x, x[0], 1e-6), "residual (written) overlapping weight")
    shifted = store[:192].view(3, 64), store[64:256].view(3, 64)
    refused(lambda: in_place(*shifted, weight, 1e-6), "residual (written) overlapping x")


def test_neighbouring_columns_of_one_buffer_may_both_be_written(in_place: ops.Bound) -> None:
    qkv = torch.randn(3, 200)
    left, right = qkv[:, :64], qkv[:, 64:128]
    total = left + right
    in_place(left, right, None, 1e-6)
    assert torch.equal(right, total)


def test_results_that_do_not_fit_in_place(in_place: ops.Bound) -> None:
    x = torch.randn(3, 64).bfloat16()
    words = "x of dtype torch.bfloat16 where the result has dtype torch.float32", "call fused_add_rms_norm"
    refused(lambda: in_place(x, x.clone(), torch.ones(64), 1e-6), *words)


def test_widths_and_groups(backend: str) -> None:
    x = torch.randn(3, 64)
    wide, odd = replace(LLAMA, width=65), replace(LLAMA, group=48)
    refused(lambda: ops.bind_rms_norm(wide, backend)(x, None, 1e-6), "width=65 for x with 64 columns")  # type: ignore[arg-type]
    refused(lambda: ops.bind_rms_norm(odd, backend)(x, None, 1e-6), "group=48 for x with 64 columns")  # type: ignore[arg-type]


def test_the_registered_ops_refuse_the_same(backend: str) -> None:
    x = torch.randn(3, 64)
    call = torch.ops.rmsnorm_patch.fused_add_rms_norm
    refused(lambda: call(x, torch.randn(2, 64), None, 1e-6, backend=backend), "residual of shape (2, 64)")
    refused(lambda: call(x.to("meta"), torch.randn(2, 64, device="meta"), None, 1e-6), "residual of shape (2, 64)")
    with pytest.raises(ValueError, match=r"NormSpec.weight_offset: got 'one'; allowed: 'none', 'fp32', 'weight_dtype'"):
        torch.ops.rmsnorm_patch.rms_norm(x, None, 1e-6, weight_offset="one")


def test_share_memory_is_exact_for_slices_of_equal_strides() -> None:
    store = torch.zeros(10, 100)
    for left, right, expected in (
        (store[:, :40], store[:, 40:80], False),
        (store[:, :40], store[:, 39:79], True),
        (store[:5], store[5:], False),
        (store[:5], store[4:9], True),
        (store[:, 60:100], store[1:, :40], False),
        (store[:4, :40], store[2:6, 20:60], True),
        (store[:, :40], store[:, 50], False),
        (store[:0], store, False),
    ):
        for a, b in ((left, right), (right, left)):
            truth = bool(set(_addresses(a)) & set(_addresses(b)))
            assert truth is expected
            assert share_memory(a, b) >= truth
            if a.stride() == b.stride():
                assert share_memory(a, b) is truth


def _addresses(x: torch.Tensor) -> list[int]:
    index = torch.zeros(1000, dtype=torch.long).copy_(torch.arange(1000))
    return index.as_strided(x.shape, x.stride(), x.storage_offset()).flatten().tolist()
