"""Who listens hears each call of an op once, from eager code and from graphs, and nothing of calls that are traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.fused.gated_norm import op as gated_norm
from rmsnorm_patch.fused.norm_add import op as norm_add
from rmsnorm_patch.fused.norm_quantised import op as norm_quantised
from rmsnorm_patch.numerics.contract import FUNCTIONAL, PLAIN_OPS
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.ops import bound as bound_module
from rmsnorm_patch.ops import listeners


@pytest.fixture
def heard() -> Iterator[list[listeners.Call]]:
    calls: list[listeners.Call] = []
    end = listeners.listen(calls.append)
    yield calls
    end()


def rows(op: str) -> list[torch.Tensor]:
    return [torch.randn(3, 16) for _ in range(PLAIN_OPS[op].operands)]


WEIGHT = torch.ones(16)


@pytest.mark.parametrize("op", PLAIN_OPS)
def test_a_call_of_a_plain_op_is_heard_from_eager_code_and_from_a_graph(op: str, heard: list[listeners.Call]) -> None:
    operands = rows(op)
    result = ops.bind(op, LLAMA)(*operands, WEIGHT, 1e-6)
    getattr(torch.ops.rmsnorm_patch, op)(*rows(op), None, 1e-6, *ops.spec_args(LLAMA))
    eager, in_graph = heard
    assert (eager.op, eager.spec, eager.dependent) == (op, LLAMA.variant, True)
    assert eager.x is operands[0]
    assert eager.weight is WEIGHT
    assert eager.result is (result[0] if isinstance(result, tuple) else result)
    assert (in_graph.op, in_graph.weight, in_graph.spec.has_weight) == (op, None, False)


@pytest.mark.parametrize("op", FUNCTIONAL)
def test_a_call_that_a_tracer_follows_is_not_heard(op: str, heard: list[listeners.Call]) -> None:
    bound = ops.bind(op, LLAMA)
    torch.compile(lambda *operands: bound(*operands, WEIGHT, 1e-6), backend="eager", fullgraph=True)(*rows(op))
    assert heard == []


def test_fused_ops_are_heard_once_with_what_they_say_of_themselves(heard: list[listeners.Call]) -> None:
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    norm_add.bind_norm_add(LLAMA)(x, residual, WEIGHT, 1e-6)
    norm_add.bind_norm_add_norm(LLAMA)(x, residual, WEIGHT, 1e-6, WEIGHT, 1e-6)
    gated_norm.bind(LLAMA, GateSpec("silu", "norm_first"))(x, residual, WEIGHT, 1e-6)
    getattr(torch.ops.rmsnorm_patch, norm_quantised.PLAIN)(x, WEIGHT, None, "int8_token", 1e-6)
    assert [(call.op, dict(call.more)) for call in heard] == [
        (norm_add.NORM_ADD, {}),
        (norm_add.NORM_ADD_NORM, {}),
        (gated_norm.NAME, {"activation": "silu", "order": "norm_first"}),
        (norm_quantised.PLAIN, {"scheme": "int8_token", "value": "rounded", "both": False}),
    ]
    assert all(call.x is x and call.result is not None and call.result.shape == x.shape for call in heard)


def test_norms_that_an_op_runs_apart_are_heard_in_its_place(
    heard: list[listeners.Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = norm_add.bind_norm_add_norm(LLAMA)
    monkeypatch.setattr(bound, "_new_route", lambda *_: ("triton", bound._apart))
    bound(torch.randn(3, 16), torch.randn(3, 16), WEIGHT, 1e-6, WEIGHT, 1e-6)
    assert [call.op for call in heard] == ["rms_norm", "fused_add_rms_norm"]


def test_where_nobody_listens_a_call_does_not_ask() -> None:
    calls: list[listeners.Call] = []
    assert type(ops.bind_rms_norm(LLAMA)) is ops.Bound
    end = listeners.listen(calls.append)
    assert type(ops.bind_rms_norm(LLAMA)) is not ops.Bound
    end()
    bound = ops.bind_rms_norm(LLAMA)
    assert type(bound) is ops.Bound
    bound(torch.randn(3, 16), WEIGHT, 1e-6)
    assert calls == []


def a_call() -> listeners.Call:
    x = torch.randn(3, 16)
    return listeners.Call("rms_norm", LLAMA, True, x, WEIGHT, x)


def test_who_leaves_or_comes_while_a_call_is_told_costs_nobody_else_the_call() -> None:
    heard: list[str] = []
    ends: dict[str, Callable[[], None]] = {}

    def listener(name: str, then: Callable[[], object] = lambda: None) -> None:
        def hear(_: listeners.Call) -> None:
            heard.append(name)
            then()

        ends[name] = listeners.listen(hear)

    listener("leaves itself", lambda: ends.pop("leaves itself")())
    listener("sends another away, brings a third", lambda: (ends.pop("sent away")(), listener("brought")))
    listener("sent away")
    listener("stays")
    try:
        listeners.tell(a_call())
        assert heard == ["leaves itself", "sends another away, brings a third", "stays"]
    finally:
        for end in ends.values():
            end()
    assert not listeners.active


def test_who_begins_to_listen_while_another_thread_binds_hears_that_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both where an op is kept by itself and below an op of torch's."""
    spec = replace(LLAMA, width=7)
    calls: list[listeners.Call] = []
    ends = []

    class Binding(ops.Bound):
        def __init__(self, *which: Any) -> None:
            if not ends:  # what another thread does now
                ends.append(listeners.listen(calls.append))
            super().__init__(*which)

    x = torch.randn(3, 16)
    monkeypatch.setattr(bound_module, "Bound", Binding)
    try:
        torch.ops.rmsnorm_patch.rms_norm(x, WEIGHT, 1e-6, *ops.spec_args(spec))
        monkeypatch.undo()
        calls.clear()
        torch.ops.rmsnorm_patch.rms_norm(x, WEIGHT, 1e-6, *ops.spec_args(spec))
        ops.bind_rms_norm(spec)(x, WEIGHT, 1e-6)
    finally:
        for end in ends:
            end()
    assert len(calls) == 2
