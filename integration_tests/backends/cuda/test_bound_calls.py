"""`ops.Bound` over launcher.c: what a usual call runs of ours, and who serves what the CUDA backend declines.

CPU tensors stand for a GPU's, with a driver that writes launches down.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from recording_driver import BF16, CONTEXT, DLPACK_CPU, FUNCTION, PAIR, Driver, rows, weight

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import driver, kernel_set, launcher, schedules
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.numerics import operands
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.ops import bound as bound_module
from rmsnorm_patch.ops import listeners

PACKAGE = str(Path(rmsnorm_patch.__file__).parent)


@pytest.fixture
def on_gpu(recorded: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Tensors say that they are on the first GPU, an sm_90; launcher.c takes them from the CPU."""
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 0)
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    monkeypatch.setattr(cuda_backend, "DLPACK_CUDA", DLPACK_CPU)
    monkeypatch.setattr(kernel_set, "_function", lambda *_: FUNCTION)
    monkeypatch.setattr(kernel_set, "_capability", lambda *_: 90)
    monkeypatch.setattr(kernel_set, "configs_for", lambda op, dtype, n, _: schedules.schedules(op, dtype, n, 90))
    monkeypatch.setattr(driver, "primary_context", lambda *_: CONTEXT)
    ops.forget()
    assert launcher.functions().kind == "c"
    yield recorded
    ops.forget()


def given_to(op: str) -> tuple[torch.Tensor, ...]:
    return (*(rows(3) for _ in range(PLAIN_OPS[op].operands)), weight())


def functions_run(call: Callable[[], Any]) -> list[CodeType]:
    """The package's Python functions that the call runs."""
    found: list[CodeType] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("op", PLAIN_OPS)
def test_a_usual_call_runs_one_python_function(on_gpu: Driver, op: str) -> None:
    bound, given = ops.bind(op, LLAMA, "cuda"), given_to(op)
    bound(*given, 1e-6)
    before = on_gpu.last["launches"]
    written = [operands.count_write.__code__] if PLAIN_OPS[op].in_place else []
    assert functions_run(lambda: bound(*given, 1e-6)) == [ops.Bound.__call__.__code__, *written]
    assert on_gpu.last["launches"] == before + 1


def test_a_launch_of_two_norms_runs_no_generators(on_gpu: Driver, monkeypatch) -> None:
    """Python makes this launch in each call."""
    monkeypatch.setattr(query_key_norm_kernel, "configs_for", kernel_set.configs_for)
    on_gpu.expect(PAIR)
    bound, (q, k) = query_key_norm_kernel.bind_rms_norm_pair(LLAMA), torch.randn(2, 3, 128).to(BF16)
    weights = torch.ones(2, 128, dtype=BF16)
    bound(q, k, *weights, 1e-6)
    before = on_gpu.last["launches"]
    run = functions_run(lambda: bound(q, k, *weights, 1e-6))
    assert query_key_norm_kernel.BoundPair._launch_pair.__code__ in run
    assert not [code for code in run if code.co_flags & inspect.CO_GENERATOR]
    assert on_gpu.last["launches"] == before + 1


@pytest.mark.parametrize("op", ["fused_add_rms_norm", "fused_add_rms_norm_"])
def test_adds_of_two_dtypes_go_to_others_and_are_offered_once(on_gpu: Driver, monkeypatch, op: str) -> None:
    def chosen(bound: ops.Bound, x: torch.Tensor, weight: torch.Tensor | None, added: torch.dtype) -> str:
        return "cuda" if x.dtype is added else "reference"

    monkeypatch.setattr(ops.Bound, "_chosen", chosen)
    bound, usual = ops.bind(op, LLAMA), given_to(op)
    x, residual, own = torch.randn(3, 64).to(BF16), torch.randn(3, 64), weight()
    declined = cuda_backend.BoundOp.__call__.__code__
    bound(*usual, 1e-6)
    for attempts in (1, 0):
        before = on_gpu.last["launches"]
        if PLAIN_OPS[op].in_place:
            with pytest.raises(UnsupportedInput, match="equal dtypes") as raised:
                bound(x, residual, own, 1e-6)
            assert raised.value.__context__ is None
        else:
            given: list[Any] = []
            run = functions_run(lambda: given.extend(bound(x, residual, own, 1e-6)))  # noqa: B023
            assert run.count(declined) == attempts
            assert torch.equal(given[1], x + residual)
        assert on_gpu.last["launches"] == before
        bound(*usual, 1e-6)
        assert on_gpu.last["launches"] == before + 1


def test_rows_without_a_kernel_go_to_others_and_errors_are_raised_once(on_gpu: Driver, monkeypatch) -> None:
    monkeypatch.setattr(ops.Bound, "_chosen", lambda bound, x, *_: "cuda" if x.shape[-1] < 100 else "reference")
    monkeypatch.setattr(
        kernel_set, "configs_for", lambda op, dtype, n, _: schedules.schedules(op, dtype, n, 90) if n == 64 else ()
    )
    bound, usual = ops.bind_rms_norm(LLAMA), (rows(3), weight())
    bound(*usual, 1e-6)
    for n, error in ((72, KernelBuildError), (64, UnsupportedInput)):
        wrong = torch.ones(n if error is KernelBuildError else 65, dtype=BF16)
        with pytest.raises(error) as raised:
            bound(torch.ones(2, n, dtype=BF16), wrong, 1e-6)
        assert raised.value.__context__ is None
    assert functions_run(lambda: bound(*usual, 1e-6)) == [ops.Bound.__call__.__code__]
    long = torch.randn(2, 128).to(BF16)
    for _ in range(2):
        want = ops.bind_rms_norm(LLAMA, "reference")(long, None, 1e-6)
        assert torch.equal(bound(long, None, 1e-6), want)
    before = on_gpu.last["launches"]
    bound(*usual, 1e-6)
    assert on_gpu.last["launches"] == before + 1


def test_who_listens_hears_calls_that_launcher_c_serves(on_gpu: Driver) -> None:
    heard: list[listeners.Call] = []
    end = listeners.listen(heard.append)
    try:
        bound, given = ops.bind_rms_norm(LLAMA, "cuda"), given_to("rms_norm")
        assert type(bound) is bound_module.TellingBound
        for _ in range(3):
            bound(*given, 1e-6)
    finally:
        end()
    assert [call.op for call in heard] == ["rms_norm"] * 3
