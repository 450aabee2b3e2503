"""`linear_fused_add_rms_norm_` without a GPU: the bits of a product and the fused norm, what it refuses, its search."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmsnorm_patch import ops
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.linear_norm import op as linear_norm_op
from rmsnorm_patch.fused.linear_norm import splits as linear_norm_splits
from rmsnorm_patch.fused.linear_norm.splits import UNKNOWN, WHOLE, Split, SplitFinder, in_parts
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec
from rmsnorm_patch.ops import dispatch

pytestmark = pytest.mark.usefixtures("products_unknown")

OP: Any = torch.ops.rmsnorm_patch.linear_fused_add_rms_norm_.default
FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")
SPECS = {
    "llama": LLAMA,
    "fp32_sum": FP32_SUM,
    "offset": NormSpec(weight_offset="weight_dtype"),
    "width": NormSpec(width=40),
    "weightless": NormSpec(has_weight=False),
    "weightless_fp32_sum": NormSpec(round_before_weight="none", has_weight=False, output="input", sum="fp32"),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
N, K = 64, 96
Operands = list[Any]
"""rows, matrix, residual, weight."""


def operands(m: int, dtype: torch.dtype = torch.float32, spec: NormSpec = LLAMA) -> Operands:
    """So small that an epsilon of 1e-4 shows in every dtype."""
    tensors = torch.randn(m, K) / 100, torch.randn(N, K) / 10, torch.randn(m, N) / 100, torch.randn(N)
    rows, matrix, residual, weight = (tensor.to(dtype) for tensor in tensors)
    return [rows, matrix, residual, weight if spec.has_weight else None]


def moved(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """A copy so many elements behind an address as an allocator of a device gives it."""
    size = tensor.element_size()
    storage = torch.empty(tensor.numel() + by + linear_norm_splits.ALIGNMENT // size, dtype=tensor.dtype)
    start = -storage.data_ptr() % linear_norm_splits.ALIGNMENT // size + by
    return storage[start : start + tensor.numel()].view_as(tensor).copy_(tensor)


def one_after_the_other(given: Operands, eps: float | None, spec: NormSpec) -> tuple[torch.Tensor, torch.Tensor]:
    rows, matrix, residual, weight = given
    x, total = torch.mm(rows, matrix.t()), residual.clone()
    ops.bind_fused_add_rms_norm_(spec)(x, total, weight, eps)
    return x, total


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_bits_of_the_product_and_the_fused_norm(m: int, dtype: torch.dtype, spec: NormSpec) -> None:
    for eps in (1e-4, None):
        given = operands(m, dtype, spec)
        normed, total = one_after_the_other(given, eps, spec)
        rows, matrix = given[0].clone(), given[1].clone()
        found = OP(*given, eps, *ops.spec_args(spec))
        assert torch.equal(found, normed)
        assert torch.equal(given[2], total)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert torch.equal(given[0], rows)
        assert torch.equal(given[1], matrix)


def test_only_the_residual_counts_as_written() -> None:
    given = operands(5)
    before = [tensor._version for tensor in given]
    OP(*given, 1e-6)
    after = [tensor._version for tensor in given]
    assert [new > old for new, old in zip(after, before, strict=True)] == [False, False, True, False]


@pytest.mark.parametrize("kept", range(8))
def test_spec_arguments_left_out_at_the_end_are_the_defaults(kept: int) -> None:
    """The dispatcher drops what equals a default, so that the op sees any number of them."""
    spec = NormSpec(0.0, "weight", "weight_dtype", output="input", sum="fp32", width=40, group=None)
    args = ops.spec_args(spec)[:kept]
    given = operands(5, torch.bfloat16)
    x, total = torch.mm(given[0], given[1].t()), given[2].clone()
    torch.ops.rmsnorm_patch.fused_add_rms_norm_(x, total, given[3], 1e-4, *args)
    assert torch.equal(OP(*given, 1e-4, *args), x)
    assert torch.equal(given[2], total)


def test_spec_arguments_by_name() -> None:
    given = operands(5, torch.bfloat16)
    normed, total = one_after_the_other(given, 1e-4, NormSpec(weight_offset="fp32", output="input", width=40))
    assert torch.equal(OP(*given, 1e-4, weight_offset="fp32", output="input", width=40), normed)
    assert torch.equal(given[2], total)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_opcheck(spec: NormSpec) -> None:
    """Each dtype with each number of rows once in three specs."""
    first = list(SPECS.values()).index(spec)
    for index, dtype in enumerate(DTYPES):
        m = (0, 1, 5)[(first + index) % 3]
        results = torch.library.opcheck(OP, (*operands(m, dtype, spec), 1e-6, *ops.spec_args(spec)))
        assert set(results.values()) == {"SUCCESS"}


IN_SHORT = ("llama", "weightless_fp32_sum")
"""With a weight and without: the compiler sees nothing else of a spec."""


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=name, marks=() if name in IN_SHORT else pytest.mark.long) for name, spec in SPECS.items()],
)
def test_compiled_with_dynamic_rows(spec: NormSpec) -> None:
    args = ops.spec_args(spec)

    def layer(rows: Any, matrix: Any, residual: Any, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
        normed = OP(rows * 2, matrix, residual, weight, 1e-4, *args)
        return normed + 1, residual * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (5, 2, 9):
        given = operands(m, torch.bfloat16, spec)
        again = [None if tensor is None else tensor.clone() for tensor in given]
        with torch.no_grad():
            for mine, other in zip(compiled(*given), layer(*again), strict=True):
                assert torch.equal(mine, other)
        assert torch.equal(given[2], again[2])


@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_device_that_has_kernels_is_registered(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(OP.name(), key)


REFUSED: dict[str, tuple[dict[int, torch.Tensor], tuple[str, ...]]] = {
    "inner lengths differ": ({1: torch.randn(N, K - 1)}, ("(5, 96)", "(64, 95)", "rows [M, K]", "[N, K]")),
    "a matrix [K, N]": ({1: torch.randn(K, N)}, ("(5, 96)", "(96, 64)")),
    "dtypes differ": ({1: torch.randn(N, K).bfloat16()}, ("torch.float32", "torch.bfloat16", "one dtype")),
    "rows of three dimensions": ({0: torch.randn(1, 5, K)}, ("(1, 5, 96)", "rows [M, K]")),
    "rows with columns in the middle": ({0: torch.randn(5, K, 1)}, ("(5, 96, 1)", "rows [M, K]")),
    "one row without a dimension": ({0: torch.randn(K)}, ("(96,)", "rows [M, K]")),
    "a matrix of three dimensions": ({1: torch.randn(N, K, 1)}, ("(64, 96, 1)", "matrix [N, K]")),
    "residual of fewer rows": ({2: torch.randn(1, N)}, ("residual of shape (1, 64)", "(5, 64)")),
    "residual of other columns": ({2: torch.randn(5, K)}, ("residual of shape (5, 96)", "(5, 64)")),
    "residual of three dimensions": ({2: torch.randn(1, 5, N)}, ("residual of shape (1, 5, 64)",)),
    "residual of another dtype": ({2: torch.randn(5, N).half()}, ("residual of dtype torch.float16",)),
    "residual expanded": ({2: torch.randn(1, N).expand(5, N)}, ("residual of shape (5, 64) expanded",)),
    "weight of another length": ({3: torch.randn(K)}, ("weight of shape (96,)", "(64,)")),
    "weight of two dimensions": ({3: torch.randn(1, N)}, ("weight of shape (1, 64)",)),
    "a result that is no fp16": (
        {0: torch.randn(5, K).half(), 1: torch.randn(N, K).half(), 2: torch.randn(5, N).half()},
        ("torch.float16", "result has dtype torch.float32"),
    ),
    "rows that no kernel serves": (
        {0: torch.randn(5, K).double(), 1: torch.randn(N, K).double(), 2: torch.randn(5, N).double()},
        ("torch.float64", "float32, bfloat16, float16"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_residual_unchanged(name: str) -> None:
    changes, words = REFUSED[name]
    given = [changes.get(place, tensor) for place, tensor in enumerate(operands(5))]
    before, version = given[2].clone(), given[2]._version
    with pytest.raises(UnsupportedInput) as caught:
        OP(*given, 1e-6)
    for word in (*words, "fused_add_rms_norm_: got ", "; supported: ", "; next: "):
        assert word in str(caught.value)
    assert torch.equal(given[2], before)
    assert given[2]._version == version


@pytest.mark.parametrize("name", REFUSED)
def test_refused_while_it_is_traced(name: str) -> None:
    changes, words = REFUSED[name]
    given = [changes.get(place, tensor) for place, tensor in enumerate(operands(5))]
    with FakeTensorMode() as mode, pytest.raises(UnsupportedInput) as caught:
        OP(*(mode.from_tensor(tensor) for tensor in given), 1e-6)
    for word in (*words, linear_norm_op.NAME):
        assert word in str(caught.value)


def test_rows_and_matrix_are_on_one_device() -> None:
    for place in (0, 1):
        given = operands(5)
        given[place] = given[place].to("meta")
        with pytest.raises(UnsupportedInput, match="on meta"):
            OP(*given, 1e-6)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Numbers of rows that were compared, on a device of which that is asked; each comes in two parts."""
    found: list[int] = []
    monkeypatch.setattr(linear_norm_splits, "_may_split", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(linear_norm_splits, "_find_split", lambda rows, *_: found.append(rows.shape[0]) or in_parts(2))
    return found


def parts_of(finder: SplitFinder, m: int) -> int | None:
    """None: not known."""
    rows, matrix, residual, weight = operands(m)
    split = finder.split_of(moved(rows, 0), moved(matrix, 0), residual, weight, LLAMA)
    return None if split == UNKNOWN else split.parts


def test_each_product_is_compared_when_it_is_first_seen(looked_at: list[int]) -> None:
    finder = SplitFinder()
    assert [parts_of(finder, m) for m in (3, 5, 3, 257, 5)] == [2, 2, 2, None, 2]
    assert looked_at == [3, 5]


def test_products_compared_ahead_are_the_only_ones(looked_at: list[int]) -> None:
    """At the first sight of the matrix, here with more rows than the kernel serves."""
    finder = SplitFinder(ahead=[8, 1, 8, 300])
    assert [parts_of(finder, m) for m in (257, 1, 3, 8, 257)] == [None, 2, None, 2, None]
    assert looked_at == [1, 8]
    none = SplitFinder(ahead=())
    assert [parts_of(none, m) for m in (5, 8)] == [None, None]
    assert looked_at == [1, 8]


def test_finders_side_by_side_do_not_share_settings_or_knowledge(looked_at: list[int]) -> None:
    """As two engines of one process have them, in turns."""
    ahead, apart = SplitFinder(ahead=[1, 3]), SplitFinder()
    assert [(parts_of(ahead, m), parts_of(apart, m)) for m in (1, 5, 3)] == [(2, 2), (None, 2), (2, 2)]
    assert looked_at == [1, 3, 1, 5, 3]
    apart.forget()
    assert [parts_of(ahead, 3), parts_of(apart, 3)] == [2, 2]
    assert looked_at == [1, 3, 1, 5, 3, 3]


def test_reordering_is_a_finders_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(linear_norm_splits, "_may_split", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(linear_norm_splits, "_find_split", lambda *given: asked.append(given[-1]) or WHOLE)
    finders = SplitFinder(reordering=True), SplitFinder()
    for finder in (*finders, *finders):
        assert parts_of(finder, 3) == 1
    assert asked == [True, False]


def test_settings_travel_with_the_op() -> None:
    """What `settings_of` writes is read again, in any process; each has one finder, and the op asks that one."""
    for ahead, reordering, text in (
        (None, False, ""),
        (None, True, "reorder"),
        ((), False, "ahead"),
        ([8, 1, 8, 300, 0], True, "ahead 1 8 reorder"),
    ):
        assert linear_norm_splits.settings_of(ahead, reordering) == text
        finder = linear_norm_splits.finder_of(text)
        assert (finder.ahead, finder.reordering) == (SplitFinder(ahead).ahead, reordering)
        assert linear_norm_splits.finder_of(text) is finder
        assert linear_norm_op._bound(True, *ops.spec_args(LLAMA), text)[-1] is finder
        given = operands(5)
        normed, _ = one_after_the_other(given, 1e-6, LLAMA)
        assert torch.equal(OP(*given, 1e-6, splits=text), normed)
    for wrong in ("ahead 8 1", "ahead one", "reorder ahead", "behind 1", "ahead 1  8"):
        with pytest.raises(UnsupportedInput, match="splits: got"):
            linear_norm_splits.finder_of(wrong)


def test_rows_apart_are_no_known_product(looked_at: list[int]) -> None:
    rows, matrix, residual, weight = operands(5)
    rows, matrix, turned = moved(rows, 0), moved(matrix, 0), [moved(tensor.t(), 0).t() for tensor in (rows, matrix)]
    wide = torch.cat([residual, residual], 1)
    finder = SplitFinder()
    assert finder.split_of(rows, matrix, residual, weight, LLAMA) == in_parts(2)
    assert finder.split_of(rows, matrix, wide[:, :N], weight, LLAMA) == UNKNOWN
    assert finder.split_of(turned[0], matrix, residual, weight, LLAMA) == UNKNOWN
    assert finder.split_of(rows, turned[1], residual, weight, LLAMA) == UNKNOWN


def test_operands_at_odd_addresses_are_no_known_product(looked_at: list[int]) -> None:
    rows, matrix, residual, weight = operands(5)
    finder, two = SplitFinder(), in_parts(2)
    for by_rows, by_matrix, split in ((0, 0, two), (1, 0, UNKNOWN), (0, 32, UNKNOWN), (64, 64, two)):
        assert finder.split_of(moved(rows, by_rows), moved(matrix, by_matrix), residual, weight, LLAMA) == split
    assert looked_at == [5]


def test_a_comparison_is_of_its_own_thread(looked_at: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of other threads belong to forwards, also while one of them compares for itself and ends first."""
    one_compares, other_is_done = threading.Event(), threading.Event()
    seen: dict[str, list[bool]] = {"one": [], "other": []}
    find = linear_norm_splits._find_split

    def compare(*given: Any) -> Split:
        name = threading.current_thread().name
        if name == "one":
            one_compares.set()
            assert other_is_done.wait(10)
        seen[name].append(linear_norm_splits.is_comparing())
        return find(*given)

    def other() -> None:
        assert one_compares.wait(10)
        seen["other"].append(linear_norm_splits.is_comparing())
        parts_of(SplitFinder(), 3)
        seen["other"].append(linear_norm_splits.is_comparing())
        other_is_done.set()

    monkeypatch.setattr(linear_norm_splits, "_find_split", compare)
    threads = [threading.Thread(target=lambda: parts_of(SplitFinder(), 3), name="one")]
    threads.append(threading.Thread(target=other, name="other"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"one": [True], "other": [False, True, False]}
    assert not linear_norm_splits.is_comparing()


@pytest.mark.usefixtures("looked_at")
def test_who_is_told_of_products_may_leave_while_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def leaves(*_: Any) -> None:
        told.append("leaves")
        linear_norm_splits.on_found.remove(leaves)

    monkeypatch.setattr(linear_norm_splits, "on_found", [leaves, lambda *_: told.append("stays")])
    parts_of(SplitFinder(), 3)
    assert told == ["leaves", "stays"]


def test_a_backend_that_the_variable_asks_for_gets_the_norm_of_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.forget()
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    assert linear_norm_op._bound(True)[1] == "triton"
    ops.forget()
