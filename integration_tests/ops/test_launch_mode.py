"""RMSNORM_PATCH_PDL is read when an op is bound, of every op of the namespace, and not again until `ops.forget`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rmsnorm_patch import ops
from rmsnorm_patch.backends import launch_mode
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.gated_norm import op as gated_norm
from rmsnorm_patch.fused.linear_norm import captured
from rmsnorm_patch.fused.linear_norm import op as linear_norm
from rmsnorm_patch.fused.norm_add import op as norm_add
from rmsnorm_patch.fused.norm_quantised import op as norm_quantised
from rmsnorm_patch.fused.silu_quantised import op as silu_quantised
from rmsnorm_patch.numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE, RMS_NORM
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.ops import listeners

EPS, N = 1e-6, 64
WEIGHT = torch.ones(N)
SPEC = ops.spec_args(LLAMA, "triton")


def rows(dtype: torch.dtype = torch.float32, n: int = N) -> torch.Tensor:
    return torch.randn(3, n, generator=torch.Generator().manual_seed(1)).to(dtype)


QUANT = ("rounded", "fused", "row_major", False)
OPS: dict[str, tuple[Any, ...]] = {
    RMS_NORM.name: (rows(), WEIGHT, EPS, *SPEC),
    FUSED_ADD.name: (rows(), rows(), WEIGHT, EPS, *SPEC),
    FUSED_ADD_IN_PLACE.name: (rows(), rows(), WEIGHT, EPS, *SPEC),
    captured.NAME: (rows(), WEIGHT, EPS, *SPEC),
    gated_norm.NAME: (rows(), rows(), WEIGHT, "silu", "norm_first", EPS, *SPEC),
    norm_add.NORM_ADD: (rows(), rows(), WEIGHT, EPS, *SPEC),
    norm_add.NORM_ADD_NORM: (rows(), rows(), WEIGHT, EPS, WEIGHT, EPS, *SPEC),
    norm_quantised.PLAIN: (rows(), WEIGHT, None, "int8_token", EPS, *SPEC, *QUANT),
    norm_quantised.FUSED: (rows(), rows(), WEIGHT, None, "int8_token", EPS, *SPEC, *QUANT),
    silu_quantised.NAME: (rows(torch.bfloat16, 2 * N), None, "int8_token", "rounded", *QUANT, "triton"),
    linear_norm.NAME: (rows(), torch.eye(N), rows(), WEIGHT, EPS, *SPEC),
}


@pytest.fixture(autouse=True)
def bound_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(launch_mode.VARIABLE, raising=False)
    ops.forget()
    yield
    ops.forget()


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_an_op_reads_the_variable_at_its_first_call_and_then_once_all_is_forgotten(
    name: str, listening: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is none tells who reads it."""
    op, calls = getattr(torch.ops.rmsnorm_patch, name), []
    end = listeners.listen(calls.append) if listening else lambda: None
    try:
        op(*OPS[name])
        monkeypatch.setenv(launch_mode.VARIABLE, "on")
        op(*OPS[name])
        assert len(calls) in ((2,) if listening else (0,))
        assert all(call.dependent for call in calls)
        ops.forget()
        with pytest.raises(UnsupportedInput, match="RMSNORM_PATCH_PDL: got 'on'"):
            op(*OPS[name])
    finally:
        end()


def test_a_kernel_that_an_op_first_needs_later_is_launched_as_the_op_was_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ops.bind_rms_norm(LLAMA, "triton")
    gated = gated_norm.bind(LLAMA, GateSpec("silu", "norm_first"), "triton")
    norm_and_add = norm_add.bind_norm_add(LLAMA, "triton")
    monkeypatch.setenv(launch_mode.VARIABLE, "off")
    x = rows()
    made: list[Any] = [
        plain._route(x, WEIGHT)[1],
        gated._route(x, x, WEIGHT)[1].kernel,  # type: ignore[attr-defined]
        norm_and_add._route(x, WEIGHT)[1].kernel,  # type: ignore[attr-defined]
    ]
    assert [each.dependent for each in made] == [True] * 3
    assert not ops.bind_rms_norm(LLAMA, "triton")._route(x, WEIGHT)[1].dependent  # type: ignore[attr-defined]
