"""Products and fused norms as one op: the bits of the two calls, whoever adds up the parts of a split product."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from made_rows import rand

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import launcher
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.linear_norm import kernel as linear_norm_kernel
from rmsnorm_patch.fused.linear_norm import op as linear_norm_op
from rmsnorm_patch.fused.linear_norm import splits as linear_norm_splits
from rmsnorm_patch.fused.linear_norm.splits import HIDDEN, UNKNOWN, WHOLE
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, NormSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("products_unknown"),
]

EPS = 1e-5
BF16, FP16 = torch.bfloat16, torch.float16
FP32_SUM = NormSpec(eps=0.0, round_before_weight="none", output="input", sum="fp32")
SPECS = {"fp32 sum": FP32_SUM, "llama": LLAMA, "gemma": GEMMA, "no weight": NormSpec(has_weight=False, output="input")}
measured = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="products are split on sm_90"
)
OP = torch.ops.rmsnorm_patch.linear_fused_add_rms_norm_


def operands(m: int, n: int, k: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    weight = nn.Parameter(rand(n, seed=4, dtype=dtype), requires_grad=False)
    return (
        rand(m, k, seed=1, dtype=dtype),
        rand(n, k, seed=2, dtype=dtype, scale=k**-0.5),
        rand(m, n, seed=3, dtype=dtype),
        weight,
    )


def two_calls(rows, matrix, residual, weight, spec):
    x, total = torch.mm(rows, matrix.t()), residual.clone()
    ops.bind_fused_add_rms_norm_(spec)(x, total, weight, EPS)
    return x, total


def one_call(rows, matrix, residual, weight, spec):
    total = residual.clone()
    return OP(rows, matrix, total, weight, EPS, *ops.spec_args(spec)), total


def same(left, right) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(left, right, strict=True))


def known() -> dict[linear_norm_splits.Key, linear_norm_splits.Split]:
    """What was found by calls that name no settings."""
    return linear_norm_splits.finder_of("").known


def most_parts(finder: linear_norm_splits.SplitFinder) -> int:
    return max(split.parts for split in finder.known.values())


def kernels_of(call) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in on_device if "Memcpy" not in event.name]


@pytest.mark.parametrize(
    ("n", "k"), [(2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336), (256, 512), (2880, 4096)]
)
def test_the_bits_of_the_two_calls(n: int, k: int) -> None:
    for m in (1, 2, 3, 8, 17, 32, 64, 100, 256, 300):
        tensors = operands(m, n, k)
        want = two_calls(*tensors, FP32_SUM)
        for _ in range(2):  # compared, then remembered
            assert same(one_call(*tensors, FP32_SUM), want), m
        kept = operands(m, n, k)
        assert same(tensors, kept)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_kind_of_norm(spec: NormSpec, dtype: torch.dtype) -> None:
    for m in (1, 16, 40):
        rows, matrix, residual, weight = operands(m, 2048, 8192, dtype)
        weight = weight if spec.has_weight else None
        assert same(one_call(rows, matrix, residual, weight, spec), two_calls(rows, matrix, residual, weight, spec))


@measured
def test_few_rows_of_a_long_product_come_in_parts() -> None:
    """What cuBLAS splits is its own choice; that it splits these (an H100 in two parts, an H200 in four) is why the op
    exists."""
    for m in (1, 8, 16):
        one_call(*operands(m, 4096, 14336), FP32_SUM)
    found = {product: split.parts for (product, _, _), split in known().items()}
    assert len(found) == 3
    assert all(parts > 1 for parts in found.values()), found


@measured
@pytest.mark.parametrize("kind", ["c", "python"])
def test_kernels_of_one_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel fewer than the two calls launch, whichever launcher starts it."""
    monkeypatch.setenv(launcher.VARIABLE, kind)
    launcher.functions.cache_clear()
    ops.forget()
    try:
        assert launcher.functions().kind == kind
        tensors = operands(8, 4096, 14336)
        counts = []
        for call in (two_calls, one_call):
            call(*tensors, FP32_SUM)
            names = kernels_of(lambda call=call: call(*tensors, FP32_SUM))
            counts.append(len(names))
            assert ("rms_norm_partials" in names) == (call is one_call)
        assert counts[1] == counts[0] - 1
    finally:
        launcher.functions.cache_clear()
        ops.forget()


@measured
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336), (192, 512)])
def test_whether_the_library_adds_up_parts_is_known(n: int, k: int) -> None:
    for m in (1, 8, 32, 64, 128, 256):
        tensors = operands(m, n, k)
        split = linear_norm_splits.finder_of("").split_of(*tensors, FP32_SUM)
        names = kernels_of(lambda tensors=tensors: torch.mm(tensors[0], tensors[1].t()))
        assert (split == WHOLE) == (not any("splitKreduce" in name for name in names)), (m, split, names)


@measured
@pytest.mark.parametrize(("split", "dependent"), [(UNKNOWN, True), (HIDDEN, True), (WHOLE, False)])
def test_how_the_norm_of_a_whole_product_is_launched(
    split: linear_norm_splits.Split, dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dependently unless the product's own kernel stands in front of it."""
    variant, backend, *norms, finder = linear_norm_op._bound(True, *ops.spec_args(FP32_SUM))
    launched: list[bool] = []

    def noting(norm):
        def call(*operands):
            launched.append(norm.dependent)
            norm(*operands)

        return call

    monkeypatch.setattr(linear_norm_op, "_bound", lambda *_: (variant, backend, *map(noting, norms), finder))
    monkeypatch.setattr(finder, "split_of", lambda *_: split)
    tensors = operands(8, 2048, 2048)
    assert same(one_call(*tensors, FP32_SUM), two_calls(*tensors, FP32_SUM))
    assert launched == [dependent]


@measured
def test_other_sums_are_as_exact() -> None:
    """Where they are allowed: against fp64, beside what the two calls give."""
    finder = linear_norm_splits.finder_of("reorder")
    for n, k in ((2048, 2048), (2048, 8192), (1024, 4096)):
        for m in (1, 8, 32, 64):
            rows, matrix, residual, weight = operands(m, n, k)
            sums = residual.clone()
            OP(rows, matrix, sums, weight, EPS, *ops.spec_args(FP32_SUM), "reorder")
            assert m > 32 or most_parts(finder) > 1
            finder.forget()
            exact = (rows.double() @ matrix.double().t()).add_(residual)
            stock = two_calls(rows, matrix, residual, weight, FP32_SUM)[1]
            ours, theirs = ((total.double() - exact).abs() for total in (sums, stock))
            assert ours.max() <= 1.1 * theirs.max()
            assert ours.mean() <= 1.01 * theirs.mean()


@measured
def test_a_split_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(8, 4096, 14336)
    one_call(*tensors, FP32_SUM)
    right = most_parts(linear_norm_splits.finder_of(""))
    assert right > 1
    linear_norm_splits.finder_of("").forget()
    monkeypatch.setattr(
        linear_norm_splits, "SPLITS", tuple(parts for parts in linear_norm_splits.SPLITS if parts != right)
    )
    assert same(one_call(*tensors, FP32_SUM), two_calls(*tensors, FP32_SUM))
    assert set(known().values()) == {HIDDEN}


@measured
def test_a_norm_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = linear_norm_kernel.BoundPartials.__call__

    def wrong(self, parts, residual, weight, eps, normed):
        launch(self, parts, residual, weight, eps + 1e-3, normed)

    monkeypatch.setattr(linear_norm_kernel.BoundPartials, "__call__", wrong)
    tensors = operands(8, 4096, 14336)
    assert same(one_call(*tensors, FP32_SUM), two_calls(*tensors, FP32_SUM))
    assert set(known().values()) == {HIDDEN}


@measured
def test_a_matrix_that_tells_nothing_is_not_split() -> None:
    rows, matrix, residual, weight = operands(8, 4096, 14336)
    one_call(rows, torch.zeros_like(matrix), residual, weight, FP32_SUM)
    assert set(known().values()) == {WHOLE}


@measured
def test_what_is_not_asked() -> None:
    """More rows than the kernel serves, fp32, rows that are a slice: the two calls, and nothing is remembered."""
    rows, matrix, residual, weight = operands(300, 2048, 8192)
    for few, dtype in ((300, BF16), (8, torch.float32)):
        tensors = [tensor.to(dtype) for tensor in (rows[:few], matrix, residual[:few], weight)]
        assert same(one_call(*tensors, FP32_SUM), two_calls(*tensors, FP32_SUM))
    wide = rand(8, 2 * 8192, seed=1)
    strided = wide[:, :8192], matrix, residual[:8], weight
    assert same(one_call(*strided, FP32_SUM), two_calls(*strided, FP32_SUM))
    assert known() == {}


@measured
def test_rows_apart_take_the_two_calls_although_the_product_is_known() -> None:
    rows, matrix, residual, weight = operands(8, 4096, 14336)
    one_call(rows, matrix, residual, weight, FP32_SUM)
    assert most_parts(linear_norm_splits.finder_of("")) > 1
    wide_rows, wide = rand(8, 2 * 14336, seed=5)[:, :14336], rand(8, 2 * 4096, seed=6)
    for given in ((wide_rows, residual), (rows, wide[:, 4096:]), (wide_rows, wide[:, 4096:])):
        x, total = torch.mm(given[0], matrix.t()), given[1].clone()
        ops.bind_fused_add_rms_norm_(FP32_SUM)(x, total, weight, EPS)
        beside = wide[:, :4096].clone()
        assert torch.equal(OP(given[0], matrix, given[1], weight, EPS, *ops.spec_args(FP32_SUM)), x)
        assert torch.equal(given[1], total)
        assert torch.equal(wide[:, :4096], beside)


@measured
@pytest.mark.parametrize("by", [1, 8, 16, 64])
def test_operands_at_odd_addresses_take_the_two_calls(by: int) -> None:
    """By 2, 16, 32 and 128 bytes."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device="cuda")
        return storage[by:].view_as(tensor).copy_(tensor)

    rows, matrix, residual, weight = operands(8, 4096, 14336)
    one_call(rows, matrix, residual, weight, FP32_SUM)
    for given in ((moved(rows), matrix), (rows, moved(matrix)), (moved(rows), moved(matrix))):
        assert linear_norm_splits.finder_of("").split_of(*given, residual, weight, FP32_SUM) == UNKNOWN
        assert same(one_call(*given, residual, weight, FP32_SUM), two_calls(*given, residual, weight, FP32_SUM))


@measured
def test_autograd_counts_what_was_written_in_parts() -> None:
    rows, matrix, residual, weight = operands(8, 4096, 14336)
    one_call(rows, matrix, residual, weight, FP32_SUM)
    before = [tensor._version for tensor in (rows, matrix, residual, weight)]
    OP(rows, matrix, residual, weight, EPS, *ops.spec_args(FP32_SUM))
    after = [tensor._version for tensor in (rows, matrix, residual, weight)]
    assert [new > old for new, old in zip(after, before, strict=True)] == [False, False, True, False]


@measured
def test_compared_ahead_and_never_again() -> None:
    """At the first sight of a matrix, whatever its rows; what was not asked for is taken whole."""
    settings = linear_norm_splits.settings_of([1, 8, 8, 512])
    finder = linear_norm_splits.finder_of(settings)
    for m in (300, 1, 2, 8, 16):
        rows, matrix, total, weight = operands(m, 4096, 14336)
        normed = OP(rows, matrix, total, weight, EPS, *ops.spec_args(FP32_SUM), settings)
        assert same((normed, total), two_calls(*operands(m, 4096, 14336), FP32_SUM))
        assert sorted(product.m for product, _, _ in finder.known) == [1, 8]
    assert all(split.kind == "parts" for split in finder.known.values())
    OP(*operands(2, 2048, 8192), EPS, *ops.spec_args(FP32_SUM), settings)
    assert sorted(product.m for product, _, _ in finder.known if product.n == 2048) == [1, 8]
    assert known() == {}


@measured
@pytest.mark.parametrize("compared", [True, False])
def test_in_a_graph_with_new_data(compared: bool) -> None:
    """A capture with a product that was never compared takes it whole."""
    rows, matrix, residual, weight = operands(4, 4096, 14336)
    ops.bind_fused_add_rms_norm_(FP32_SUM)(residual.clone(), residual.clone(), weight, EPS)
    torch.mm(rows, matrix.t())
    if compared:
        one_call(rows, matrix, residual, weight, FP32_SUM)
    held = rows.clone(), residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normed = OP(held[0], matrix, held[1], weight, EPS, *ops.spec_args(FP32_SUM))
    assert bool(known()) == compared
    for seed in range(3):
        new = rand(4, 14336, seed=10 + seed), rand(4, 4096, seed=20 + seed)
        for static, value in zip(held, new, strict=True):
            static.copy_(value)
        graph.replay()
        assert same((normed, held[1]), two_calls(new[0], matrix, new[1], weight, FP32_SUM))


@pytest.mark.sanitized
@pytest.mark.parametrize("n", [64, 192, 2048, 2880, 4096, 5120, 8192, 16384])
def test_the_kernel_against_the_sum_and_the_fused_op(n: int) -> None:
    """Outputs are poisoned, and the rows behind the last one keep what they held."""
    if not linear_norm_kernel.serves(FP32_SUM, BF16, n, 0):
        assert torch.cuda.get_device_capability() >= (10, 0)  # chunks of 32 bytes there
        pytest.skip("not served on this device")
    for spec in (FP32_SUM, LLAMA):
        for parts in (2, 3, 8):
            for m in (1, 5, 33):
                weight = nn.Parameter(rand(n, seed=4), requires_grad=False)
                pieces = torch.randn(parts, m, n, generator=torch.Generator("cuda").manual_seed(m), device="cuda")
                padded = rand(m + 1, n, seed=3)
                residual, behind = padded[:m], padded[m].clone()
                total = pieces[0]
                for piece in pieces[1:]:
                    total = total + piece
                x, want = total.to(BF16), residual.clone()
                ops.bind_fused_add_rms_norm_(spec)(x, want, weight, EPS)
                normed = torch.full((m, n), float("nan"), dtype=BF16, device="cuda")
                linear_norm_kernel.bound(spec, parts)(pieces, residual, weight, EPS, normed)
                assert same((normed, residual), (x, want)), (parts, m)
                assert torch.equal(padded[m], behind)


def test_operands_of_two_layers_are_refused() -> None:
    rows, matrix, residual, weight = operands(8, 2048, 8192)
    kept = residual.clone()
    for wrong in (
        (rows[:, :64], matrix, residual, weight),
        (rows, matrix.float(), residual, weight),
        (rows, matrix, residual[:4], weight),
        (rows, matrix, residual, weight[:64]),
        (rows, matrix.cpu(), residual, weight),
        (rows, matrix, residual[:1].expand(8, -1), weight),
    ):
        with pytest.raises(UnsupportedInput):
            OP(*wrong, EPS, *ops.spec_args(FP32_SUM))
    one_call(rows, matrix, residual, weight, FP32_SUM)
    with pytest.raises(UnsupportedInput, match="residual of shape"):  # known by now
        OP(rows, matrix, residual[:4], weight, EPS, *ops.spec_args(FP32_SUM))
    assert torch.equal(residual, kept)
    assert cuda_backend.available()[0]
