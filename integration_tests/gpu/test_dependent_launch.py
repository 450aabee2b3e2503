"""What the kernel in front has written is what ours reads, the weight too, however early ours starts; plain launches.

The weight is written right in front of a norm: by a kernel without a trigger of its own, or by one of ours, which lets
the next one start before it stores. Two weights take turns, so that a stale one gives the other's result.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from made_rows import rand

from rmsnorm_patch import ops
from rmsnorm_patch.backends import launch_mode
from rmsnorm_patch.backends.cuda import launcher
from rmsnorm_patch.backends.triton import backend as triton_backend
from rmsnorm_patch.fused.linear_norm import kernel as linear_norm_kernel
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.numerics.spec import LLAMA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPS = 1e-6
BF16 = torch.bfloat16
PARTS = 4
CALLS = [
    *((backend, op) for backend in ("cuda", "triton") for op in ("plain", "fused", "in place")),
    ("cuda", "pair"),
    ("cuda", "parts"),
]


def call_of(backend: str, op: str, m: int):
    """(columns, ready): `ready()` makes the operands of one call, and gives what takes the weight and computes it."""
    if op == "pair":
        pair, q, k = query_key_norm_kernel.bind_rms_norm_pair(LLAMA), rand(m, 512, seed=1), rand(3, 512, seed=2)
        return 512, lambda: lambda weight: pair(q, k, weight, weight, EPS)
    n = 4096 if op == "parts" else 8192
    x, residual = rand(m, n, seed=1), rand(m, n, seed=2)
    if op == "parts":
        add_up, pieces = linear_norm_kernel.bound(LLAMA, PARTS), rand(PARTS, m, n, seed=3, dtype=torch.float32)

        def ready_parts():
            total, normed = residual.clone(), torch.empty_like(residual)
            return lambda weight: (add_up(pieces, total, weight, EPS, normed), (normed, total))[1]

        return n, ready_parts
    if op == "plain":
        norm = ops.bind_rms_norm(LLAMA, backend)
        return n, lambda: lambda weight: (norm(x, weight, EPS),)
    if op == "fused":
        fused = ops.bind_fused_add_rms_norm(LLAMA, backend)
        return n, lambda: lambda weight: fused(x, residual, weight, EPS)
    in_place = ops.bind_fused_add_rms_norm_(LLAMA, backend)

    def ready():
        mine, total = x.clone(), residual.clone()
        return lambda weight: (in_place(mine, total, weight, EPS), (mine, total))[1]

    return n, ready


class Cast:
    """A copy that casts is an elementwise kernel. One of the same dtype is a memcpy, which ends before we start."""

    def __init__(self, n: int, backend: str) -> None:
        self.sources = [rand(n, seed=seed, dtype=torch.float32).abs() + plus for seed, plus in ((1, 1), (2, 100))]
        self.weight = nn.Parameter(self.sources[0].to(BF16), requires_grad=False)

    def __call__(self, which: int) -> nn.Parameter:
        self.weight.data.copy_(self.sources[which])
        return self.weight


class Tail:
    """The weight is the end of what one kernel fills: its last stores are under way when its CTAs exit."""

    def __init__(self, n: int, backend: str) -> None:
        self.all = torch.empty(1 << 25, dtype=BF16, device="cuda")
        self.weight = nn.Parameter(self.all[-n:], requires_grad=False)

    def __call__(self, which: int) -> nn.Parameter:
        self.all.fill_((1.5, 96.0)[which])
        return self.weight


class OneOfOurs:
    """Our own kernels let the next one start before they store."""

    def __init__(self, n: int, backend: str) -> None:
        self.seeds = [rand(1, n, seed=seed) for seed in (11, 12)]
        self.ones = nn.Parameter(torch.ones(n, dtype=BF16, device="cuda"), requires_grad=False)
        self.norm = ops.bind_rms_norm(LLAMA, backend)

    def __call__(self, which: int) -> nn.Parameter:
        return nn.Parameter(self.norm(self.seeds[which], self.ones, EPS)[0], requires_grad=False)


def settled(writer, ready) -> list[tuple[torch.Tensor, ...]]:
    """The results with either weight, with nothing under way."""
    found = []
    for which in (0, 1):
        call, weight = ready(), writer(which)
        torch.cuda.synchronize()
        found.append(tuple(result.clone() for result in call(weight)))
        torch.cuda.synchronize()
    return found


def sequence(writer, ready, count: int) -> list[tuple[torch.Tensor, ...]]:
    """`count` times a weight written and, with nothing in between, a norm of it. Two and two calls have one weight: of
    memory that the allocator hands out every second time the stale content is then the other one's."""
    results = []
    for k in range(count):
        call = ready()
        results.append(call(writer(k // 2 % 2)))
    return results


def check(results, expected) -> None:
    wrong = {}
    for k, result in enumerate(results):
        wanted, other = expected[k // 2 % 2], expected[1 - k // 2 % 2]
        if not all(map(torch.equal, result, wanted)):
            differs = result[0] != wanted[0]
            stale = differs & (result[0] == other[0])
            wrong[k] = f"{int(differs.sum())} elements, {int(stale.sum())} of the other weight"
    assert not wrong, f"{len(wrong)} of {len(results)} calls are wrong: {wrong}"


@pytest.mark.parametrize("m", [2, 600])
@pytest.mark.parametrize(("backend", "op"), CALLS)
@pytest.mark.parametrize("writer", [Cast, Tail, OneOfOurs])
def test_a_parameter_written_just_before_is_read_as_written(writer, backend: str, op: str, m: int) -> None:
    m = min(m, linear_norm_kernel.MOST_ROWS) if op == "parts" else m
    n, ready = call_of(backend, op, m)
    write = writer(n, backend)
    expected = settled(write, ready)
    assert not torch.equal(expected[0][0], expected[1][0])
    for _ in range(4):
        torch.cuda._sleep(3_000_000)  # the device lags behind, so that all is queued back to back
        check(sequence(write, ready, 32), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sequence(write, ready, 16)
    for _ in range(8):
        graph.replay()
        graph.replay()
        check(captured, expected)


@pytest.fixture(params=["c", "python"])
def noted_launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Whether each kernel that is made from now on will be launched dependently, by either launcher."""
    noted: list[bool] = []
    monkeypatch.setenv(launcher.VARIABLE, request.param)
    launcher.functions.cache_clear()
    usual = launcher.functions()
    assert usual.kind == request.param

    def new_kernel(*values: int) -> int:
        noted.append(bool(values[7]))
        return usual.new_kernel(*values)

    monkeypatch.setattr(launcher, "functions", lambda: replace(usual, new_kernel=new_kernel))
    ops.forget()
    yield noted
    monkeypatch.undo()
    launcher.functions.cache_clear()
    ops.forget()


def results_of(backend: str, **asked) -> list[torch.Tensor]:
    """One call of every op, bound as asked."""
    x, residual, weight = rand(3, 1024, seed=1), rand(3, 1024, seed=2), nn.Parameter(rand(1024, seed=3))
    weight.requires_grad_(False)
    found = [ops.bind_rms_norm(LLAMA, backend, **asked)(x, weight, EPS)]
    found += ops.bind_fused_add_rms_norm(LLAMA, backend, **asked)(x, residual, weight, EPS)
    mine, total = x.clone(), residual.clone()
    ops.bind_fused_add_rms_norm_(LLAMA, backend, **asked)(mine, total, weight, EPS)
    found += [mine, total]
    if backend == "cuda":
        found += query_key_norm_kernel.bind_rms_norm_pair(LLAMA, **asked)(x, residual, weight, weight, EPS)
        total, normed = residual.clone(), torch.empty_like(x)
        pieces = rand(PARTS, 3, 1024, seed=4, dtype=torch.float32)
        bound = linear_norm_kernel.bound(LLAMA, PARTS, launch_mode.dependent(**asked))
        bound(pieces, total, weight, EPS, normed)
        found += [normed, total]
    return found


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no dependent launches here"
)
def test_plain_launches_by_cuda(noted_launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch_mode.VARIABLE, raising=False)
    expected = results_of("cuda")
    assert noted_launches
    assert all(noted_launches)
    noted_launches.clear()
    plain = results_of("cuda", enable_pdl=False)
    assert noted_launches
    assert not any(noted_launches)
    assert all(map(torch.equal, plain, expected))
    monkeypatch.setenv(launch_mode.VARIABLE, "off")
    noted_launches.clear()
    ops.forget()
    assert all(map(torch.equal, results_of("cuda"), expected))
    assert noted_launches
    assert not any(noted_launches)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no dependent launches here"
)
def test_plain_launches_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(**asked) -> set[bool]:
        bound = [
            triton_backend.bind(op, LLAMA, launch_mode.dependent(**asked)) for op in ("rms_norm", "fused_add_rms_norm")
        ]
        layouts = [layout for op in bound for layout in op._layouts.values() if layout.columns == 1024]
        kernels = [kernel for layout in layouts for kernel, _ in layout.compiled.values()]
        assert len(layouts) == len(bound)
        assert kernels
        assert all(kernel.metadata.launch_pdl == layouts[0].constants["DEPENDENT"] for kernel in kernels)
        return {layout.constants["DEPENDENT"] for layout in layouts}

    monkeypatch.delenv(launch_mode.VARIABLE, raising=False)
    ops.forget()  # what earlier tests launched does not count
    expected = results_of("triton")
    assert launched() == {True}
    assert all(map(torch.equal, results_of("triton", enable_pdl=False), expected))
    assert launched(enable_pdl=False) == {False}
    monkeypatch.setenv(launch_mode.VARIABLE, "off")
    assert all(map(torch.equal, results_of("triton"), expected))
    assert launched() == {False}
