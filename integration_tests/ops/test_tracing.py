"""Calls that run while something is compiled, in this thread or another: torch says of all of them that it compiles."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.fused.norm_add import op as norm_add
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.ops import listeners

N = 64
FORMS = ("op", "decomposed")


def here(call: Callable[[], Any]) -> Any:
    return call()


def beside(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def while_compiling(call: Callable[[], Any]) -> Any:
    """What `call` gives when the backend of torch.compile makes it, in the middle of a compilation."""
    given: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        given.append((torch.compiler.is_compiling(), call()))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    ((flagged, result),) = given
    if not flagged:
        pytest.skip(f"torch {torch.__version__} does not say to other code that it compiles")
    return result


def tensors(op: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, N, generator=generator) for _ in range(PLAIN_OPS[op].operands)]


def bound_call(op: str) -> list[torch.Tensor]:
    rows = tensors(op)
    return list(PLAIN_OPS[op].results(ops.bind(op, LLAMA)(*rows, torch.ones(N), 1e-5), tuple(rows)))


def dispatched_call(op: str) -> list[torch.Tensor]:
    rows, run = tensors(op), getattr(torch.ops.rmsnorm_patch, op).default
    return list(PLAIN_OPS[op].results(run(*rows, torch.ones(N), 1e-5, *ops.spec_args(LLAMA)), tuple(rows)))


@pytest.mark.parametrize("where", [here, beside])
@pytest.mark.parametrize("call", [bound_call, dispatched_call])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", list(PLAIN_OPS))
def test_a_call_in_the_middle_of_a_compilation_is_run(
    op: str, form: str, call: Any, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ops.COMPILE_VARIABLE, form)
    want = call(op)
    got = while_compiling(lambda: where(lambda: call(op)))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("where", [here, beside])
@pytest.mark.parametrize("op", list(PLAIN_OPS))
def test_such_a_call_goes_where_it_usually_goes(op: str, where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the arithmetic that a graph would get: another thread's compilation must change no bit of a kernel's."""
    as_traced: list[str] = []
    monkeypatch.setattr(ops.Bound, "_traced", lambda bound, *given: as_traced.append(bound.op))
    while_compiling(lambda: where(lambda: bound_call(op)))
    assert not as_traced


@pytest.mark.parametrize("where", [here, beside])
def test_norms_that_take_adds_are_run_too(where: Any) -> None:
    call = norm_add.bind_norm_add_norm(LLAMA)
    x, residual, weight = torch.randn(3, N), torch.randn(3, N), torch.ones(N)
    want = call(x, residual, weight, 1e-5, weight, 1e-5)
    got = while_compiling(lambda: where(lambda: call(x, residual, weight, 1e-5, weight, 1e-5)))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_listeners_hear_a_real_call_beside_a_compilation() -> None:
    heard: list[listeners.Call] = []
    end = listeners.listen(heard.append)
    while_compiling(lambda: beside(lambda: bound_call("rms_norm")))
    end()
    assert len(heard) == 1


def test_a_tracer_with_a_mode_gets_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setenv(ops.COMPILE_VARIABLE, "op")
    call = ops.bind_rms_norm(LLAMA)
    traced = while_compiling(lambda: make_fx(lambda x, w: call(x, w, 1e-5))(torch.randn(3, N), torch.ones(N)))
    assert "rmsnorm_patch.rms_norm.default" in str(traced.graph)
