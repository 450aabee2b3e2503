"""The kernels of each op, as their sets choose, fill and start them, for an sm_90 that is not here."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
import torch
from recording_driver import BF16, CONTEXT, FUNCTION, PAIR, PARTIALS, PROGRAMMATIC, ROTATED, STREAM, N

from rmsnorm_patch import ops
from rmsnorm_patch.backends import launch_mode
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import driver, jit, kernel_set, schedules
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.gated_norm import kernel as gated_norm_kernel
from rmsnorm_patch.fused.linear_norm import kernel as linear_norm_kernel
from rmsnorm_patch.fused.norm_add.op import NORM_ADD, NORM_ADD_NORM, BoundNormAdd
from rmsnorm_patch.fused.norm_quantised import kernel as norm_quantised_kernel
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.fused.query_key_norm import rotated as rotated_kernel
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.ops import listeners


@pytest.mark.parametrize("dependent", [True, False])
@pytest.mark.parametrize("arch", [89, 90])
def test_the_switch_reaches_the_kernels_of_every_op(functions, recorded, monkeypatch, arch, dependent):
    monkeypatch.setattr(kernel_set, "_function", lambda *_: FUNCTION)
    monkeypatch.setattr(kernel_set, "_capability", lambda *_: arch)
    monkeypatch.setattr(driver, "primary_context", lambda *_: CONTEXT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (arch // 10, arch % 10))
    single = cuda_backend.BoundOp("fused_add_rms_norm_", LLAMA, dependent, functions)
    x = torch.empty(2, 4096, dtype=BF16)
    for op in (single, linear_norm_kernel.BoundPartials(LLAMA, 2, dependent, functions)):
        configs = schedules.schedules(op.kernels.op, BF16, 4096, arch)
        for loaded in op.kernels._build(configs, x, BF16, 16, 16, False).kernels:
            recorded.expect(loaded.arguments)
            functions.launch(loaded.handle, STREAM, 2, bytes(loaded.arguments.size))
            last = recorded.last
            assert (PROGRAMMATIC in [last[f"id{i}"] for i in range(last["count"])]) == (dependent and arch >= 90)


def test_kernels_whose_launch_was_decided_with_their_op_read_no_variable(recorded, monkeypatch):
    """A value that is none tells who reads it: of an op that is called, nobody."""
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    ops.forget()
    monkeypatch.setenv(launch_mode.VARIABLE, "on")
    quant, gating = QuantSpec("fp8_token"), GateSpec("silu", "norm_first")
    for bind in (
        *(lambda decided, op=op: cuda_backend._bound(op, LLAMA, dependent=decided)[0] for op in PLAIN_OPS),
        lambda decided: linear_norm_kernel.bound(LLAMA, 2, decided),
        lambda decided: norm_quantised_kernel.bound(LLAMA, quant, True, False, False, decided),
        lambda decided: gated_norm_kernel.bound(LLAMA, gating, BF16, decided),
    ):
        assert [bind(decided).kernels.dependent for decided in (True, False)] == [True, False]
        with pytest.raises(UnsupportedInput, match="RMSNORM_PATCH_PDL: got 'on'"):
            bind(None)
    ops.forget()


def test_every_op_with_kernels_is_bound_anew_once_all_is_forgotten(recorded, monkeypatch):
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    ops.forget()
    held = [
        *(lambda op=op: cuda_backend.bind(op, LLAMA) for op in PLAIN_OPS),
        lambda: linear_norm_kernel.bound(LLAMA, 2),
        lambda: query_key_norm_kernel.bind_rms_norm_pair(LLAMA),
        lambda: rotated_kernel.bind_rms_norm_rotated(LLAMA),
        lambda: norm_quantised_kernel.bound(LLAMA, QuantSpec("fp8_token"), True, False, False),
    ]
    before = [bind() for bind in held]
    assert all(bind() is first for bind, first in zip(held, before, strict=True))
    ops.forget()
    assert all(bind() is not first for bind, first in zip(held, before, strict=True))
    ops.forget()


@pytest.fixture
def device_of_sm_90(recorded, monkeypatch):
    """Every kernel set builds for an sm_90 whose kernels the recording driver starts."""
    monkeypatch.setattr(kernel_set, "_function", lambda *_: FUNCTION)
    monkeypatch.setattr(kernel_set, "_capability", lambda *_: 90)
    monkeypatch.setattr(kernel_set, "configs_for", lambda op, dtype, n, _: schedules.schedules(op, dtype, n, 90))
    monkeypatch.setattr(query_key_norm_kernel, "configs_for", kernel_set.configs_for)
    monkeypatch.setattr(rotated_kernel, "configs_for", kernel_set.configs_for)
    monkeypatch.setattr(norm_quantised_kernel, "configs_for", kernel_set.configs_for)
    monkeypatch.setattr(driver, "primary_context", lambda *_: CONTEXT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return recorded


@pytest.mark.parametrize("op", PLAIN_OPS)
def test_a_set_starts_the_kernel_of_a_plain_op_and_says_once_that_its_calls_are_plain(device_of_sm_90, functions, op):
    row, plain = PLAIN_OPS[op], []
    bound = cuda_backend.BoundOp(op, LLAMA, True, replace(functions, add_row_kind=lambda *values: plain.append(values)))
    x, residual, weight, normed, total = (
        torch.randn(shape).bfloat16() for shape in ((3, N), (3, N), N, (3, N), (3, N))
    )
    places = (x, residual) if row.in_place else (normed, total if row.fused_add else None)
    for _ in range(2):
        bound._launch(x, residual if row.fused_add else None, weight, 1e-6, *places)
        last = device_of_sm_90.last
        assert (last["x"], last["weight"], last["m"]) == (x.data_ptr(), weight.data_ptr(), 3)
        assert last["residual"] == (residual.data_ptr() if row.fused_add else 0)
        assert (last["normed"], last["total"]) == tuple(0 if each is None else each.data_ptr() for each in places)
        assert [last[f"{name}_row_stride"] for name in ("x", "normed")] == [N, N]
    assert len(plain) == 1
    assert plain[0][0] is bound.table


def test_a_set_starts_the_kernel_for_parts(device_of_sm_90, functions):
    bound = linear_norm_kernel.BoundPartials(LLAMA, 2, True, functions)
    parts, residual, weight, normed = (torch.randn(shape) for shape in ((2, 3, 4096), (3, 4096), 4096, (3, 4096)))
    residual, weight, normed = residual.bfloat16(), weight.bfloat16(), normed.bfloat16()
    device_of_sm_90.expect(PARTIALS)
    for _ in range(2):
        bound(parts, residual, weight, 1e-6, normed)
        last = device_of_sm_90.last
        assert [last[name] for name in ("parts", "residual", "weight", "normed", "total")] == [
            each.data_ptr() for each in (parts, residual, weight, normed, residual)
        ]
        assert [last[f"{name}_row_stride"] for name in ("parts", "residual", "normed", "total")] == [4096] * 4
        assert (last["part_stride"], last["eps"]) == (3 * 4096, ctypes.c_float(1e-6).value)
        few, _ = schedules.schedules(bound.kernels.op, BF16, 4096, 90)
        assert (last["grid"], few.cluster > 1) == (3 * few.cluster, True)
    assert len(bound.kernels._chains) == 1
    heard: list[listeners.Call] = []
    end = listeners.listen(heard.append)
    bound(parts, residual, weight, 1e-6, normed)
    end()
    ((op, spec, dependent, x, own, result, more),) = heard
    assert (op, spec, dependent, dict(more)) == ("fused_add_rms_norm_", LLAMA, True, {"parts": 2})
    assert x is residual
    assert own is weight
    assert result is normed


def test_a_set_starts_the_kernel_for_queries_and_keys(device_of_sm_90, functions):
    bound = query_key_norm_kernel.BoundPair(LLAMA, True, functions)
    packed = torch.randn(3, 6, 128).bfloat16()
    q, k = packed[:, :4], packed[:, 4:5]
    q_weight, k_weight = torch.randn(128).bfloat16(), torch.randn(128).bfloat16()
    device_of_sm_90.expect(PAIR)
    normed = bound._launch_pair(q, k, q_weight, k_weight, 1e-6)
    last = device_of_sm_90.last
    assert [last[name] for name in ("x", "weight", "normed", "m", "x_row_stride", "inner_rows", "x_outer_stride")] == [
        *(each.data_ptr() for each in (q, q_weight, normed[0])),
        12,
        128,
        4,
        6 * 128,
    ]
    assert [last[name] for name in ("x2", "weight2", "normed2", "m2", "normed2_row_stride")] == [
        *(each.data_ptr() for each in (k, k_weight, normed[1])),
        3,
        128,
    ]
    (served,) = schedules.schedules("rms_norm_pair", BF16, 128, 90)
    assert last["grid"] == -(-12 // served.rows_per_cta) + -(-3 // served.rows_per_cta)


@pytest.mark.parametrize("head_axis", [1, 2])
def test_a_set_starts_the_kernel_for_a_rotation(device_of_sm_90, functions, head_axis):
    """Queries and keys of one product, so that their heads lie in two levels."""
    bound = rotated_kernel.BoundRotated(LLAMA, True, functions)
    packed, cos, sin = torch.randn(2, 3, 6, 128).bfloat16(), *torch.randn(2, 1, 3, 128).bfloat16()
    q, k = (each if head_axis == 2 else each.transpose(1, 2) for each in (packed[:, :, :4], packed[:, :, 4:5]))
    weights = torch.randn(128).bfloat16(), torch.randn(128).bfloat16()
    device_of_sm_90.expect(ROTATED)
    assert bound.why_apart(q, k, *weights, cos, sin, head_axis) == ""
    turned = bound._launch(q, k, *weights, 1e-6, cos, sin, head_axis)
    assert [(tuple(each.shape), each.stride()) for each in turned] == [
        ((2, 4, 3, 128), (3 * 4 * 128, 128, 4 * 128, 1)),
        ((2, 1, 3, 128), (3 * 128, 128, 128, 1)),
    ]
    last = device_of_sm_90.last
    names = ("x", "weight", "normed", "m", "x_row_stride", "inner_rows", "x_outer_stride")
    for suffix, x, weight, made, heads in zip(("", "2"), (q, k), weights, turned, (4, 1), strict=True):
        own = [last[name.replace("x_", f"x{suffix}_") if "x_" in name else name + suffix] for name in names]
        assert own == [*(each.data_ptr() for each in (x, weight, made)), 6 * heads, 128, heads, 6 * 128]
    assert (last["cos"], last["sin"], last["angles"]) == (cos.data_ptr(), sin.data_ptr(), 3)
    (served,) = schedules.schedules(rotated_kernel.OP, BF16, 128, 90)
    assert last["grid"] == -(-24 // served.rows_per_cta) + -(-6 // served.rows_per_cta)


ROWS = torch.empty(2, 3, 4, 128, dtype=BF16)
ANGLES = torch.empty(1, 3, 128, dtype=BF16)


@pytest.mark.parametrize(
    ("q", "k", "cos", "axis", "why"),
    [
        (ROWS, ROWS, ANGLES, 2, ""),
        (ROWS, ROWS, torch.empty(2, 3, 128, dtype=BF16), 2, "differ in shape"),
        (ROWS, ROWS, ANGLES.float(), 2, "cos is torch.float32"),
        (ROWS, ROWS, ANGLES[:, :1], 2, "at 2 x 3 tokens"),
        (ROWS, ROWS, ANGLES[0], 2, r"cos is torch.bfloat16 \(3, 128\)"),
        (ROWS, ROWS, ANGLES, 1, "at 2 x 4 tokens|token by token"),
        (ROWS[..., ::2], ROWS[..., ::2], ANGLES[..., ::2], 2, "token by token"),
        (ROWS.permute(1, 0, 2, 3), ROWS.permute(1, 0, 2, 3), ANGLES, 2, "token by token"),
        (ROWS, ROWS[:1], ANGLES, 2, "token by token"),
        (ROWS, ROWS.float(), ANGLES, 2, "q and k differ"),
        (ROWS[..., :96], ROWS[..., :96], ANGLES[..., :96], 2, "no kernel norms and rotates torch.bfloat16 rows of 96"),
    ],
)
def test_what_cannot_be_rotated_in_the_launch_is_named(device_of_sm_90, functions, q, k, cos, axis, why):
    bound = rotated_kernel.BoundRotated(LLAMA, True, functions)
    weight, sin = torch.empty(q.shape[-1], dtype=BF16), ANGLES[..., : q.shape[-1]]
    found = bound.why_apart(q, k, weight, weight, cos, sin, axis)
    assert re.search(why, found) if why else not found, found


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_token", "fp8_block"])
def test_a_set_starts_the_kernel_of_quantised_rows(device_of_sm_90, functions, scheme, both):
    """Rows of a wider tensor, two levels of them; the residual's lie one after another and are written in place."""
    quant = QuantSpec(scheme, layout="tma_aligned" if scheme == "fp8_block" else "row_major")
    given = torch.ones(1) if scheme == "fp8_static" else None
    bound = norm_quantised_kernel.BoundQuantised(LLAMA, quant, True, given is not None, both, True, functions)
    x = torch.randn(2, 7, 8192).bfloat16()[:, :6:2, :4096]
    residual, weight = torch.randn(2, 3, 4096).bfloat16(), torch.randn(4096).bfloat16()
    device_of_sm_90.expect(jit.source_of(norm_quantised_kernel.SOURCE).arguments)
    rows, scales, normed = bound(norm_quantised_kernel.Operands(x, residual, weight, given, 1e-6))
    last = device_of_sm_90.last
    assert [last[name] for name in ("x", "residual", "weight", "total", "quantised")] == [
        each.data_ptr() for each in (x, residual, weight, residual, rows)
    ]
    assert last["given"] == (0 if given is None else given.data_ptr())
    assert last["scales"] == (scales.data_ptr() if scales.numel() else 0)
    assert last["normed"] == (normed.data_ptr() if both else 0)
    assert [last[name] for name in ("m", "x_row_stride", "inner_rows", "x_outer_stride")] == [6, 16384, 3, 7 * 8192]
    assert [last[name] for name in ("total_row_stride", "total_outer_stride")] == [4096, 3 * 4096]
    strides = {"fp8_static": [0, 0], "fp8_token": [1, 1], "fp8_block": [1, 8]}[scheme]
    assert [last[f"scale_{name}_stride"] for name in ("row", "group")] == strides
    assert last["eps"] == ctypes.c_float(1e-6).value


def test_a_residual_that_no_kernel_can_write_is_written_through_a_copy(device_of_sm_90, functions):
    bound = norm_quantised_kernel.BoundQuantised(LLAMA, QuantSpec("fp8_token"), True, False, False, True, functions)
    x = torch.randn(2, 3, 4096).bfloat16()
    apart = torch.randn(2, 7, 4096).bfloat16()[:, :6:2]
    device_of_sm_90.expect(jit.source_of(norm_quantised_kernel.SOURCE).arguments)
    before = apart._version
    bound(norm_quantised_kernel.Operands(x, apart, None, None, 1e-6))
    assert device_of_sm_90.last["total"] not in (0, apart.data_ptr())
    assert device_of_sm_90.last["total_row_stride"] == 4096
    assert apart._version == before + 1


def test_a_launch_that_fails_names_op_shape_and_error(device_of_sm_90, functions):
    bound = linear_norm_kernel.BoundPartials(LLAMA, 2, True, functions)
    operands = torch.randn(2, 3, 4096), torch.randn(3, 4096).bfloat16(), None, 1e-6, torch.randn(3, 4096).bfloat16()
    device_of_sm_90.library.set_result(719)
    with pytest.raises(KernelBuildError, match=r"rms_norm_partials: launch on cpu, x \(3, 4096\) torch.bfloat16"):
        bound(*operands)


@pytest.mark.parametrize("op", [NORM_ADD, NORM_ADD_NORM])
def test_one_table_for_every_kind_of_row(recorded, monkeypatch, op):
    """launcher.c is told of one of a norm's class: rows of a width, dtype or device that comes later are in it too."""
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    monkeypatch.setattr(BoundNormAdd, "backend_for", lambda *_: "cuda")
    monkeypatch.setattr(BoundNormAdd, "why_apart", lambda *_: "")
    ops.forget()
    bound = BoundNormAdd(op, LLAMA, "auto", True)
    tables, calls = [], []
    for n, dtype in ((256, torch.float32), (256, BF16), (512, BF16)):
        calls.append(bound._route(torch.empty(2, n, dtype=dtype), torch.empty(n, dtype=dtype))[1])
        tables.append(bound.table)
    assert bound.table is not None
    assert all(table is bound.table for table in tables)
    assert all(call is calls[0] for call in calls)
    ops.forget()
