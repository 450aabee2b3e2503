"""The gated norm as an op, without a GPU: its results, what it refuses, what graphs see of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda.schedules import schedules
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.gated_norm import kernel, op
from rmsnorm_patch.numerics.gating import ACTIVATIONS, ORDERS, GateSpec, gated_rms_norm, gated_rms_norm_fp64
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, LLAMA, NormSpec

OP: Any = torch.ops.rmsnorm_patch.rms_norm_gated.default
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GATINGS = [GateSpec(activation, order) for activation, order in product(ACTIVATIONS, ORDERS)]  # type: ignore[arg-type]
SPECS = {"llama": LLAMA, "one rounding": FP32_WEIGHT_MULTIPLY, "groups": NormSpec(group=64)}


def operands(n: int = 256, dtype: torch.dtype = BF16, gate: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 5, n).to(dtype), torch.randn(2, 5, n).mul(3).to(gate or dtype), torch.rand(n).to(dtype)


def call(x: Any, gate: Any, weight: Any, spec: NormSpec, gating: GateSpec, backend: str = "auto") -> torch.Tensor:
    arguments = (gating.activation, gating.order, 1e-5, *ops.spec_args(spec, backend))
    return OP(x, gate, weight, *arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_op_and_bound_callable_are_the_reference(dtype: torch.dtype, gating: GateSpec, spec: NormSpec) -> None:
    x, gate, weight = operands(dtype=dtype)
    want = gated_rms_norm(x, gate, weight, spec, gating, 1e-5)
    assert torch.equal(call(x, gate, weight, spec, gating), want)
    assert torch.equal(op.bind(spec, gating)(x, gate, weight, 1e-5), want)
    wide = torch.randn(2, 5, 600).to(dtype)
    view = wide[..., 8:264]
    strided = call(view, gate, weight, spec, gating)
    assert strided.is_contiguous()
    assert torch.equal(strided, gated_rms_norm(view, gate, weight, spec, gating, 1e-5))


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_reference_is_near_the_exact_value(gating: GateSpec) -> None:
    x, gate, weight = operands(dtype=FP32)
    for spec in SPECS.values():
        exact = gated_rms_norm_fp64(x, gate, weight, spec, gating, 1e-5)
        got = gated_rms_norm(x, gate, weight, spec, gating, 1e-5)
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=1e-7)


def test_without_a_weight_without_rows_and_without_an_eps() -> None:
    x, gate, weight = operands()
    gating, weightless = GateSpec("silu", "gate_first"), NormSpec(has_weight=False)
    assert torch.equal(call(x, gate, None, weightless, gating), gated_rms_norm(x, gate, None, weightless, gating, 1e-5))
    assert call(x[:0], gate[:0], weight, LLAMA, gating).shape == (0, 5, 256)
    tiny = op.bind(LLAMA, gating)(x * 1e-4, gate, weight, None)
    assert torch.equal(tiny, gated_rms_norm(x * 1e-4, gate, weight, LLAMA, gating, torch.finfo(FP32).eps))


def test_what_is_refused() -> None:
    x, gate, weight = operands()
    gating = GateSpec("silu", "norm_first")
    for wrong, message in (
        (gate[..., :128], r"gate of shape \(2, 5, 128\)"),
        (gate[:1], r"no broadcasting"),
        (gate.double(), "gate of dtype torch.float64"),
    ):
        with pytest.raises(UnsupportedInput, match=message):
            call(x, wrong, weight, LLAMA, gating)
    with pytest.raises(UnsupportedInput, match="group=100"):
        call(x, gate, weight, NormSpec(group=100), gating)
    bound = op.bind(LLAMA, gating)
    bound(x, gate, weight, 1e-5)
    with pytest.raises(UnsupportedInput, match="no broadcasting"):  # also once such a call was served
        bound(x, gate[:1], weight, 1e-5)
    with pytest.raises(ValueError, match=r"GateSpec\.activation: got 'gelu'; allowed: 'silu', 'sigmoid'"):
        GateSpec("gelu", "norm_first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"GateSpec\.order"):
        GateSpec("silu", "last")  # type: ignore[arg-type]
    with pytest.raises(KernelBuildError, match="CUDA"):
        call(x, gate, weight, LLAMA, gating, "cuda")


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_what_graphs_see_of_it(gating: GateSpec) -> None:
    x, gate, weight = operands(gate=FP32)
    torch.library.opcheck(OP, (x, gate, weight, gating.activation, gating.order, 1e-5))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, gate, weight)]
        result = call(*fake, FP32_WEIGHT_MULTIPLY, gating)
    assert (result.shape, result.dtype) == (x.shape, BF16)


@pytest.mark.parametrize("order", ORDERS)
def test_result_dtype_with_an_fp32_weight(order: Any) -> None:
    """A product that comes last ends in the dtype of x; a norm that comes last promotes as it does alone."""
    x, gate, weight = operands()
    assert call(x, gate, weight.float(), LLAMA, GateSpec("silu", order)).dtype == (BF16 if order[0] == "n" else FP32)


def test_schedules_share_a_tree_and_carry_the_gate_s_macros() -> None:
    for n in (64, 128, 512, 1024, 2048, 4096, 5120, 8192, 16384):
        found = schedules(kernel.OP, BF16, n, 90)
        assert found, n
        assert {config.tree for config in found} == {config.tree for config in schedules("rms_norm", BF16, n, 90)}
        for config in kernel.schedules(found, GateSpec("sigmoid", "gate_first"), FP32):
            assert dict(config.defines).items() >= {"GATE_T": 0, "ACTIVATION": 1}.items()
    assert not schedules(kernel.OP, BF16, 1003, 90)  # Triton's
