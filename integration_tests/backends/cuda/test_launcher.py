"""The launcher's decisions and what it hands to the driver, on CPU tensors with a driver that writes it down.

What the kernels make of it is tested on a GPU; here: every field of the launch, what is served without
Python and what goes to the slow path, and that nothing leaks.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import arguments, cache, driver, jit, kernel_set, launcher, schedules
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda.launcher import in_python
from rmsnorm_patch.cli import environment
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.linear_norm import kernel as linear_norm_kernel
from rmsnorm_patch.fused.norm_quantised import kernel as norm_quantised_kernel
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.spec import LLAMA

N = 64
BF16 = torch.bfloat16
PLAIN = jit.source_of("rms_norm_rows.cu").arguments
PAIR = jit.source_of("rms_norm_pair.cu").arguments
PARTIALS = jit.source_of("rms_norm_partials.cu").arguments
LAUNCH = "grid block shared_bytes count id0 value0 id1 value1 stream function launches pushes".split()  # noqa: SIM905
STREAM, FUNCTION, CONTEXT = 0x5000, 0x7000, 1
CLUSTER, PROGRAMMATIC = 4, 6
DLPACK_CPU = 1


class Driver:
    """The recording driver: `last` is the latest launch by field name."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.recorded.restype = ctypes.c_int64
        self.library.recorded_arguments.restype = ctypes.c_void_p
        self.library.set_context.argtypes = [ctypes.c_int64]

    def expect(self, taken: arguments.Arguments) -> None:
        """What the kernels that are launched from now on declare."""
        self.arguments = taken
        self.library.expect(taken.size)

    @property
    def last(self) -> dict[str, float]:
        found = self.arguments.unpack(ctypes.string_at(self.library.recorded_arguments(), self.arguments.size))
        return {**found, **{name: self.library.recorded(i) for i, name in enumerate(LAUNCH)}}


@pytest.fixture(scope="module")
def driver_path(shared_library: Callable[..., Path]) -> Path:
    return shared_library(Path(__file__).with_name("recording_driver.c"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for this file's tests: the launcher is compiled once."""
    return tmp_path_factory.mktemp("compiled") / "cache"


@pytest.fixture
def recorded(driver_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(compiled))
    monkeypatch.setattr(driver, "LIBRARY", str(driver_path))
    monkeypatch.delenv(launcher.VARIABLE, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    driver.library.cache_clear()
    launcher.functions.cache_clear()
    found = Driver(driver_path)
    found.library.set_result(0)
    found.library.set_context(CONTEXT)
    found.expect(PLAIN)
    yield found
    driver.library.cache_clear()
    launcher.functions.cache_clear()


@pytest.fixture(params=["c", "python"])
def functions(request: pytest.FixtureRequest, recorded: Driver) -> launcher.Functions:
    return launcher.functions() if request.param == "c" else launcher.python_functions("asked for")


def kernel(functions: launcher.Functions, **changes: Any) -> int:
    values = {
        "function": FUNCTION,
        "context": CONTEXT,
        "n": N,
        "m_max": 2**63 - 1,
        "rows_per_cta": 4,
        "cluster": 1,
        "threads": 256,
        "dependent": 1,
        "align": 16,
        "weight_align": 16,
        "next": 0,
        "arguments": PLAIN,
    }
    return functions.new_kernel(*{**values, **changes}.values())


class Op:
    """One op's callable over `functions`, with a plan for bf16 rows of N; `slow` collects what it was not sure of."""

    def __init__(self, functions: launcher.Functions, op: str, has_weight: bool = True, **plan: int) -> None:
        self.slow_calls: list[tuple] = []
        self.bumped: list[tuple] = []

        def slow(*operands):
            self.slow_calls.append(operands)
            return "slow"

        self.table, self.call = functions.make_callable(
            PLAIN_OPS[op].code,
            has_weight,
            slow,
            torch.Tensor,
            torch.nn.Parameter,
            torch._C._dynamo.guards._empty_strided_cpu,
            lambda *tensors: self.bumped.append(tensors),
            torch.Tensor.__dlpack_c_exchange_api__,
            DLPACK_CPU,
        )
        self.functions = functions
        handle, two_level = plan.pop("kernel", None) or kernel(functions), plan.pop("two_level", 0)
        weight_dtype = BF16 if has_weight else None
        device = 0 if functions.kind == "c" else -1  # DLPack's index of the CPU, and torch's
        codes = launcher.dlpack_code(BF16), launcher.dlpack_code(weight_dtype)
        n = plan.pop("n", N)
        functions.add_plan(self.table, handle, two_level, BF16, weight_dtype, BF16, n, device, 2, 2, 2.5, *codes)


def rows(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, N, dtype=BF16)


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(N, dtype=BF16))


def test_launcher_is_compiled_once_and_kept(recorded, compiled):
    assert (launcher.functions().kind, launcher.functions().reason) == ("c", "")
    (path,) = compiled.glob("*.artefact")
    before = path.stat().st_mtime_ns
    launcher.functions.cache_clear()
    assert launcher.functions().kind == "c"
    assert path.stat().st_mtime_ns == before


ZEROS = PLAIN.pack(dict.fromkeys(PLAIN.names, 0))


def test_a_launch_starts_the_bytes_that_it_is_given(functions, recorded):
    for taken in (PLAIN, PAIR, PARTIALS):
        recorded.expect(taken)
        values = {name: i + 1 for i, name in enumerate(taken.names)} | {"eps": 0.5}
        assert functions.launch(kernel(functions, arguments=taken), STREAM, 3, taken.pack(values)) == 0
        last = recorded.last
        assert {name: last[name] for name in taken.names} == values
        assert (last["grid"], last["block"], last["stream"], last["function"]) == (3, 256, STREAM, FUNCTION)
        assert (last["count"], last["id0"], last["value0"]) == (1, PROGRAMMATIC, 1)


def test_arguments_of_another_kernel_are_not_started(functions, recorded):
    before = recorded.last["launches"]
    with pytest.raises(TypeError, match="another size"):
        functions.launch(kernel(functions, arguments=PAIR), STREAM, 3, ZEROS)
    assert recorded.last["launches"] == before


def test_launch_attributes(functions, recorded):
    functions.launch(kernel(functions, cluster=8), STREAM, 2, ZEROS)
    last = recorded.last
    assert (last["grid"], last["shared_bytes"]) == (16, 0)
    assert [last[name] for name in ("count", "id0", "value0", "id1", "value1")] == [2, CLUSTER, 8, PROGRAMMATIC, 1]
    functions.launch(kernel(functions, cluster=8, dependent=0), STREAM, 2, ZEROS)
    assert (recorded.last["count"], recorded.last["id0"]) == (1, CLUSTER)
    functions.launch(kernel(functions, dependent=0), STREAM, 2, ZEROS)
    assert recorded.last["count"] == 0


def test_no_rows_no_launch_and_too_many_rows_are_said(functions, recorded):
    before = recorded.last["launches"]
    handle = kernel(functions, cluster=2)
    assert functions.launch(handle, STREAM, 0, ZEROS) == 0
    assert functions.launch(handle, STREAM, 2**30, ZEROS) == launcher.TOO_MANY_ROWS
    assert recorded.last["launches"] == before


def test_another_context_is_pushed(functions, recorded):
    before = recorded.last["pushes"]
    recorded.library.set_context(99)
    functions.launch(kernel(functions), STREAM, 2, ZEROS)
    assert recorded.last["pushes"] == before + 1


def test_driver_error_is_returned(functions, recorded):
    recorded.library.set_result(719)
    assert functions.launch(kernel(functions), STREAM, 2, ZEROS) == 719


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
    for plan in ({"kernel": other}, {"kernel": kernel(functions, m_max=8, next=other)}):
        op = Op(functions, "rms_norm", **plan)
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
    added = [functions.add_plan(op.table, handle, 0, BF16, BF16, BF16, 1000 + n, 0, 2, 2, 1.0, 1, 1) for n in range(64)]
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


def test_without_a_compiler_ctypes_serves_with_one_warning(recorded, cache_dir, monkeypatch):
    monkeypatch.setattr(launcher, "compiler", lambda: [])
    with pytest.warns(RuntimeWarning, match="no C compiler") as seen:
        assert launcher.functions().kind == "python"
    launcher.functions()
    assert len(seen) == 1
    assert isinstance(Op(launcher.functions(), "rms_norm").call, in_python.PlainCall)


def test_compiler_failure_shows_its_message(recorded, cache_dir, monkeypatch):
    monkeypatch.setattr(launcher, "_FLAGS", ("-not-a-flag",))
    monkeypatch.setenv(launcher.VARIABLE, "c")
    with pytest.raises(KernelBuildError, match="not-a-flag"):
        launcher.functions()


def test_missing_driver_is_named(recorded, monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setenv(launcher.VARIABLE, "c")
    with pytest.raises(KernelBuildError, match="libcuda"):
        launcher.functions()
    driver.library.cache_clear()
    with pytest.raises(KernelBuildError, match="libno-such-driver"):
        driver.library()


def test_launcher_variable(recorded, monkeypatch):
    monkeypatch.setenv(launcher.VARIABLE, "python")
    assert launcher.functions().kind == "python"
    launcher.functions.cache_clear()
    monkeypatch.setenv(launcher.VARIABLE, "rust")
    with pytest.raises(UnsupportedInput, match="auto, c, python") as caught:
        launcher.functions()
    assert (caught.value.site, caught.value.got) == (launcher.VARIABLE, "'rust'")


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


def test_env_says_who_starts_kernels(recorded, monkeypatch):
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    ops.forget()
    assert environment.starting() == "started by launcher.c"
    with monkeypatch.context() as older:
        older.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
        ops.forget()
        why = "started from Python, a few microseconds more a call: torch before 2.10"
        assert environment.starting().startswith(why)
    monkeypatch.setenv(launcher.VARIABLE, "python")
    launcher.functions.cache_clear()
    ops.forget()
    assert environment.starting().endswith(f"{launcher.VARIABLE}=python")
    ops.forget()


def test_env_says_why_nobody_can_start_kernels(recorded, tmp_path, monkeypatch):
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    folder = tmp_path / "open"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(folder))
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()
    assert str(folder) in environment.starting()
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()


def test_every_op_with_kernels_is_bound_anew_once_all_is_forgotten(recorded, monkeypatch):
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    ops.forget()
    held = [
        *(lambda op=op: cuda_backend.bind(op, LLAMA) for op in PLAIN_OPS),
        lambda: linear_norm_kernel.bound(LLAMA, 2),
        lambda: query_key_norm_kernel.bind_rms_norm_pair(LLAMA),
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
    monkeypatch.setattr(norm_quantised_kernel, "configs_for", kernel_set.configs_for)
    monkeypatch.setattr(driver, "primary_context", lambda *_: CONTEXT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return recorded


@pytest.mark.parametrize("op", PLAIN_OPS)
def test_a_set_starts_the_kernel_of_a_plain_op_and_says_once_that_its_calls_are_plain(device_of_sm_90, functions, op):
    row, plain = PLAIN_OPS[op], []
    bound = cuda_backend.BoundOp(op, LLAMA, True, replace(functions, add_plan=lambda *values: plain.append(values)))
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
