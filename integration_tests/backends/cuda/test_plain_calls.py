"""The hot path of an op, on CPU tensors with a driver that writes it down.

What is served without Python, with every field of the launch, what goes to the slow path, and that nothing leaks. What
the kernels make of it is tested on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording_driver import BF16, FUNCTION, PLAIN, N, Op, kernel, rows, weight

from rmsnorm_patch.backends.cuda import arguments, jit, launcher, schedules
from rmsnorm_patch.numerics.contract import PLAIN_OPS


def shuffled(*more: str, without: str = "") -> arguments.Arguments:
    """The plain ops' arguments with a gap of four bytes, in the opposite order; `more` i64 fields, `without` one."""
    types = {name: "float" if name == "eps" else "i64" for name in reversed(PLAIN.names) if name != without}
    return arguments.Arguments("shuffled.cu", types | dict.fromkeys(more, "i64"))


@pytest.mark.parametrize("without", ["", "inner_rows"])
def test_a_plain_call_fills_the_fields_wherever_the_kernel_has_them(functions, recorded, without):
    x, residual, w = rows(6), rows(6), weight()
    found = []
    for taken in (shuffled(without=without), PLAIN):
        recorded.expect(taken)
        op = Op(functions, "fused_add_rms_norm", kernel=kernel(functions, arguments=taken))
        normed, total = op.call(x, residual, w, 0.5)
        assert not op.slow_calls
        last = recorded.last
        assert [last["normed"], last["total"]] == [normed.data_ptr(), total.data_ptr()]
        found.append({name: last[name] for name in PLAIN.names if name not in ("normed", "total", without)})
    assert found[0] == found[1]
    assert found[0]["x"] == x.data_ptr()
    assert found[0]["m"] == 6


def test_a_field_that_a_plain_call_cannot_fill_is_left_to_python(functions, recorded):
    """Also in a kernel for more rows, and for rows of two levels."""
    other, plain = kernel(functions, arguments=shuffled("scale", without="inner_rows")), kernel(functions)
    before = recorded.last["launches"]
    for known in ({"kernel": other}, {"kernel": kernel(functions, m_max=8, next=other)}):
        op = Op(functions, "rms_norm", **known)
        assert op.call(rows(4), weight(), 1e-6) == "slow"
    if functions.kind == "c":
        op = Op(functions, "rms_norm", kernel=plain, two_level=other)
        assert op.call(rows(4), weight(), 1e-6) == "slow"
    assert recorded.last["launches"] == before


def test_every_kernel_of_a_plain_op_is_served_without_python(functions):
    sources = {each.source for each in schedules.registered_kernels() if set(each.ops) & set(PLAIN_OPS)}
    assert sources >= {"rms_norm_rows.cu", "rms_norm_stream.cu"}
    for source in sources:
        taken = kernel(functions, arguments=jit.source_of(source).arguments)
        op = Op(functions, "rms_norm", kernel=taken)
        assert op.call(rows(4), weight(), 1e-6) != "slow", source


@pytest.mark.parametrize("shape", [(8,), (2, 3), (1,), (), (2, 1, 3)])
def test_plain_fused_add(functions, recorded, shape):
    op = Op(functions, "fused_add_rms_norm")
    x, residual, w = rows(*shape), rows(*shape), weight()
    normed, total = op.call(x, residual, w, 1e-5)
    last = recorded.last
    pointers = [tensor.data_ptr() for tensor in (x, residual, w, normed, total)]
    assert [last[name] for name in ("x", "residual", "weight", "normed", "total")] == pointers
    assert last["m"] == x.numel() // N
    assert last["eps"] == ctypes.c_float(1e-5).value
    assert (normed.shape, total.shape, normed.dtype, normed.stride()) == (x.shape, x.shape, BF16, x.stride())
    assert not op.slow_calls


def test_plain_rms_norm_and_default_eps(functions, recorded):
    op = Op(functions, "rms_norm")
    x = rows(4)
    assert op.call(x, weight(), None).shape == x.shape
    assert recorded.last["eps"] == 2.5
    assert recorded.last["residual"] == recorded.last["total"] == 0
    assert op.call(x, weight(), 0.0).shape == x.shape
    assert recorded.last["eps"] == 0.0


def test_weightless(functions, recorded):
    op = Op(functions, "rms_norm", has_weight=False)
    assert op.call(rows(4), None, 1e-6).shape == (4, N)
    assert op.call(rows(4), weight(), 1e-6).shape == (4, N)
    assert recorded.last["weight"] == 0
    assert recorded.last["count"] == 1


@pytest.mark.parametrize("dependent", [1, 0])
def test_how_an_op_is_launched_is_its_kernels_alone(functions, recorded, dependent):
    op = Op(functions, "rms_norm", kernel=kernel(functions, dependent=dependent))
    for either in (weight(), weight().data):
        op.call(rows(4), either, 1e-6)
        assert recorded.last["count"] == dependent


def test_row_count_chooses_among_schedules(functions, recorded):
    many = kernel(functions, function=0x9000)
    few = kernel(functions, m_max=16, next=many)
    op = Op(functions, "rms_norm", kernel=few)
    op.call(rows(16), weight(), 1e-6)
    assert recorded.last["function"] == FUNCTION
    op.call(rows(17), weight(), 1e-6)
    assert recorded.last["function"] == 0x9000


def test_grouped_rows(functions, recorded):
    op = Op(functions, "rms_norm", kernel=kernel(functions, n=16))
    op.call(rows(3), weight(), 1e-6)
    assert (recorded.last["m"], recorded.last["x_row_stride"], recorded.last["normed_row_stride"]) == (12, 16, 16)


def odd_calls() -> dict[str, tuple]:
    x, r, w = rows(4), rows(4), weight()
    wide = torch.zeros(4, 2 * N, dtype=BF16)
    shifted = torch.zeros(4 * N + 1, dtype=BF16)[1:].view(4, N)
    return {
        "other dtype": (x.float(), r.float(), w, 1e-6),
        "other residual dtype": (x, r.half(), w, 1e-6),
        "other weight dtype": (x, r, torch.nn.Parameter(w.data.float()), 1e-6),
        "other N": (wide, wide, w, 1e-6),
        "residual of another shape": (x, rows(2, 2), w, 1e-6),
        "fewer residual rows": (x, r[:2], w, 1e-6),
        "no rows": (x[:0], r[:0], w, 1e-6),
        "no dimensions": (torch.zeros((), dtype=BF16), r, w, 1e-6),
        "columns apart": (torch.zeros(N, 4, dtype=BF16).t(), r, w, 1e-6),
        "misaligned x": (shifted, r, w, 1e-6),
        "misaligned residual": (x, shifted, w, 1e-6),
        "misaligned weight": (x, r, torch.nn.Parameter(torch.zeros(N + 1, dtype=BF16)[1:]), 1e-6),
        "strided weight": (x, r, torch.nn.Parameter(torch.zeros(2 * N, dtype=BF16)[::2]), 1e-6),
        "short weight": (x, r, torch.nn.Parameter(torch.zeros(8, dtype=BF16)), 1e-6),
        "2-D weight": (x, r, torch.nn.Parameter(torch.zeros(1, N, dtype=BF16)), 1e-6),
        "no weight": (x, r, None, 1e-6),
        "too few operands": (x, r, w),
        "too many operands": (x, r, w, 1e-6, 1),
        "subclass": (x.as_subclass(type("Own", (torch.Tensor,), {})), r, w, 1e-6),
        "residual of a subclass": (x, r.as_subclass(type("Own", (torch.Tensor,), {})), w, 1e-6),
        "numbers": (x, 3.0, w, 1e-6),
    }


@pytest.mark.parametrize("name", odd_calls())
def test_odd_calls_take_the_slow_path(functions, recorded, name):
    op = Op(functions, "fused_add_rms_norm")
    before = recorded.last["launches"]
    operands = odd_calls()[name]
    assert op.call(*operands) == "slow"
    assert op.slow_calls == [operands] if len(operands) < 4 else len(op.slow_calls) == 1
    assert recorded.last["launches"] == before


def test_eps_that_is_no_number_takes_the_slow_path(recorded):
    op = Op(launcher.functions(), "rms_norm")
    assert op.call(rows(4), weight(), "small") == "slow"


def test_another_current_device_takes_the_slow_path(recorded):
    op = Op(launcher.functions(), "rms_norm")
    recorded.library.set_context(99)
    assert op.call(rows(4), weight(), 1e-6) == "slow"


def test_failed_launch_takes_the_slow_path(functions, recorded):
    op = Op(functions, "fused_add_rms_norm")
    recorded.library.set_result(1)
    assert op.call(rows(4), rows(4), weight(), 1e-6) == "slow"


def test_strided_rows_without_python(recorded):
    functions = launcher.functions()
    op = Op(functions, "rms_norm", two_level=kernel(functions, function=0x9000))
    packed = torch.zeros(4, 10, 3, N + 16, dtype=BF16)
    row = N + 16
    cases = {  # view: (m, row stride, inner rows, outer stride), or None for the slow path
        (0, 0): (packed[0, 0, :, :N], (3, row, 0, 0)),
        (0, 1): (packed[:, :, 0, :N], (40, 3 * row, 0, 0)),
        (0, 2): (packed[:, :1, :2, :N], (8, row, 2, 30 * row)),
        (0, 3): (packed[0, :, :2, 16 : 16 + N], (20, row, 2, 3 * row)),
        (0, 4): (packed[0, 0, 0, :N], (1, N, 0, 0)),
        (0, 5): (packed[:, :, :, :N], (120, row, 0, 0)),
        (0, 6): (packed[:1, :1, :1, :N].expand(1, 5, 1, N), (5, 0, 0, 0)),
        (1, 0): (packed[:, 2:4, :2, :N], None),
        (1, 1): (packed[0, 0, :, 1 : N + 1], None),
    }
    for view, expected in cases.values():
        result = op.call(view, weight(), 1e-6)
        if expected is None:
            assert result == "slow"
            continue
        last = recorded.last
        assert tuple(last[name] for name in ("m", "x_row_stride", "inner_rows", "x_outer_stride")) == expected
        assert last["function"] == (0x9000 if expected[2] else FUNCTION)
        assert result.shape == view.shape
        assert result.is_contiguous()


def addressed(last: dict[str, float], name: str) -> list[int]:
    """Where the kernel finds the rows of x or residual, from the arguments of the launch (memory.cuh, row_offset)."""
    stride, outer, inner = (int(last[n]) for n in (f"{name}_row_stride", f"{name}_outer_stride", "inner_rows"))
    rows = range(int(last["m"]))
    offsets = [row // inner * outer + row % inner * stride if inner else row * stride for row in rows]
    return [int(last[name]) + 2 * offset for offset in offsets]


def row_addresses(x: torch.Tensor) -> list[int]:
    if x.dim() == 1:
        return [x.data_ptr()]
    return [address for part in x.unbind(0) for address in row_addresses(part)]


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A view [*shape, N] of a buffer: any order of the leading dimensions, gaps, repeated rows."""
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), N
    for dimension in order:
        step += 8 * draw(st.integers(0, 2))
        strides[dimension] = draw(st.sampled_from([step, step, step, 0]))
        step *= shape[dimension]
    return torch.zeros(step + N, dtype=BF16).as_strided((*shape, N), (*strides, 1))


@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_is_found_where_it_is(recorded, data, shape):
    functions = launcher.functions()
    op = Op(functions, "fused_add_rms_norm", two_level=kernel(functions, function=0x9000))
    x, residual = data.draw(views(shape)), data.draw(views(shape))
    before = recorded.last["launches"]
    result = op.call(x, residual, weight(), 1e-6)
    if result == "slow":
        assert recorded.last["launches"] == before
        assert not (x.is_contiguous() and residual.is_contiguous())
        return
    last = recorded.last
    assert addressed(last, "x") == row_addresses(x)
    assert addressed(last, "residual") == row_addresses(residual)
    assert [tensor.is_contiguous() and tensor.shape == x.shape for tensor in result] == [True, True]


def test_strided_and_packed_operands_mix(recorded):
    functions = launcher.functions()
    op = Op(functions, "fused_add_rms_norm", two_level=kernel(functions, function=0x9000))
    heads = torch.zeros(4, 6, N, dtype=BF16)[:, :2]
    op.call(heads, rows(4, 2), weight(), 1e-6)
    last = recorded.last
    assert [last[n] for n in ("m", "inner_rows", "x_row_stride", "x_outer_stride")] == [8, 2, N, 6 * N]
    assert [last["residual_row_stride"], last["residual_outer_stride"]] == [N, 2 * N]
    op.call(rows(4, 2), heads, weight(), 1e-6)
    last = recorded.last
    assert [last["x_outer_stride"], last["residual_outer_stride"]] == [2 * N, 6 * N]
    assert not op.slow_calls


def test_two_level_rows_without_such_a_kernel_take_the_slow_path(recorded):
    op = Op(launcher.functions(), "rms_norm")
    assert op.call(torch.zeros(4, 6, N, dtype=BF16)[:, :2], weight(), 1e-6) == "slow"


def test_in_place(recorded):
    op = Op(launcher.functions(), "fused_add_rms_norm_")
    x, residual = rows(4), rows(4)
    assert op.call(x, residual, weight(), 1e-6) is None
    last = recorded.last
    assert [last["normed"], last["total"]] == [x.data_ptr(), residual.data_ptr()]
    assert [id(tensor) for tensor in op.bumped[0]] == [id(x), id(residual)]


def test_in_place_on_shared_memory_takes_the_slow_path(functions, recorded):
    op = Op(functions, "fused_add_rms_norm_")
    x = rows(6)
    w = torch.nn.Parameter(x.view(-1)[:N])
    for operands in ((x, x, weight(), 1e-6), (x[:4], x[2:], weight(), 1e-6), (x, rows(6), w, 1e-6)):
        assert op.call(*operands) == "slow"
    assert op.call(rows(6), x, w, 1e-6) == "slow"


def test_same_tensor_twice(functions, recorded):
    op = Op(functions, "fused_add_rms_norm")
    x = rows(4)
    normed, total = op.call(x, x, weight(), 1e-6)
    assert recorded.last["residual"] == x.data_ptr()
    assert len({x.data_ptr(), normed.data_ptr(), total.data_ptr()}) == 3


def test_full_table_leaves_the_rest_to_the_slow_path(recorded):
    functions = launcher.functions()
    op = Op(functions, "rms_norm")
    handle = kernel(functions)
    added = [
        functions.add_row_kind(op.table, handle, 0, BF16, BF16, BF16, 1000 + n, 0, 2, 2, 1.0, 1, 1) for n in range(64)
    ]
    assert added == [1] * 63 + [0]
    assert op.call(rows(4), weight(), 1e-6).shape == (4, N)


def test_nothing_leaks(functions, recorded, collect_garbage):
    op = Op(functions, "fused_add_rms_norm")
    x, r, w = rows(4), rows(4), weight()
    wide = torch.zeros(4, 2 * N, dtype=BF16)
    watched = [x, r, w, wide, BF16, torch.Tensor, torch.nn.Parameter]

    def calls() -> None:
        for _ in range(50):
            op.call(x, r, w, 1e-6)
            op.call(x[:2], r[:2], w, 1e-6)
            op.call(wide, wide, w, 1e-6)
        op.slow_calls.clear()

    calls()
    collect_garbage()
    before = [sys.getrefcount(item) for item in watched]
    tensors = sum(type(item) is torch.Tensor for item in gc.get_objects())
    calls()
    collect_garbage()
    assert [sys.getrefcount(item) for item in watched] == before
    assert sum(type(item) is torch.Tensor for item in gc.get_objects()) == tensors
