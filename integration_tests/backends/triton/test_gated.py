"""The Triton kernel of gated norms: in the CPU interpreter against the definition, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import ahead
from triton.backends.compiler import GPUTarget

from rmsnorm_patch.backends.triton.backend import Layout
from rmsnorm_patch.fused.gated_norm import op, portable
from rmsnorm_patch.numerics.gating import ACTIVATIONS, ORDERS, GateSpec, gated_rms_norm
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec
from rmsnorm_patch.numerics.tolerances import GATED
from rmsnorm_patch.proof.difference import compare

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN and 1/0 on purpose

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GATINGS = [GateSpec(activation, order) for activation, order in product(ACTIVATIONS, ORDERS)]  # type: ignore[arg-type]
SHAPES = {
    "a head": (128, None, (BF16, BF16, BF16)),
    "groups, an fp32 weight": (256, 64, (BF16, BF16, FP32)),
    "an odd length": (1003, None, (FP32, BF16, FP32)),
    "fp16": (1000, 100, (FP16, FP32, FP16)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_interpreted_rows(gating: GateSpec, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is a part of a wider tensor, as in Mamba 2."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    n, group, (x_dtype, gate_dtype, weight_dtype) = SHAPES[shape]
    spec = NormSpec(group=group)
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, 6, n, generator=generator).to(x_dtype)
    gate = torch.randn(2, 6, 2 * n, generator=generator).mul(4).to(gate_dtype)[..., n:]
    weight = torch.rand(n, generator=generator).add(0.5).to(weight_dtype)
    got, want = op.bind(spec, gating, "triton")(x, gate, weight, 1e-6), gated_rms_norm(x, gate, weight, spec, gating)
    assert got.dtype == want.dtype
    found = compare(got.to(x_dtype), want.to(x_dtype))  # what was rounded as x is compared so
    assert not found.violations(GATED[x_dtype], x_dtype), found


@pytest.mark.parametrize("width", [1000, 3000, 5000])
@pytest.mark.parametrize("order", ORDERS)
def test_a_part_of_a_row(order: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends in each of three chunks, between two numbers that none can miss."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec, gating = NormSpec(width=width), GateSpec("silu", order)
    x, gate, weight = torch.randn(2, 5125), torch.randn(2, 5125).add(4), torch.rand(5125).add(0.5)
    x[:, width - 1], x[:, width] = 300, 500
    got, want = op.bind(spec, gating, "triton")(x, gate, weight, 1e-6), gated_rms_norm(x, gate, weight, spec, gating)
    assert not (found := compare(got, want)).violations(GATED[FP32], FP32), found


def test_the_exponential_is_exact_to_its_last_bits(handed: Callable[[str], list[Any]]) -> None:
    """2 is raised to whole numbers and to one within a half, which has a bit less for each time that it is doubled."""
    raised = handed("create_exp2")
    gate = torch.cat((torch.linspace(-88, 20, 3072), torch.linspace(-1, 1, 1024)))[None]
    ones = torch.ones(1, 4096)
    got = op.bind(LLAMA, GateSpec("sigmoid", "norm_first"), "triton")(ones, gate, ones[0], 0.0)
    error = (got.double() / gate.double().sigmoid() - 1).abs()
    assert error.max() <= 4 * 2.0**-24  # what 2 is raised to, the power, the sum and the quotient round
    parts = [part for part in raised if (part != part.round()).any()]
    assert parts
    assert max(abs(part).max() for part in parts) <= 0.5 + 2.0**-18


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_extreme_gates(gating: GateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite and not-a-number gates end as torch ends them, and e^-gate at the ends of its range."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight = torch.ones(9, 64), torch.ones(64)
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), -87.0, -88.5, -104.0, 200.0, 0.0, -0.0])
    gate = torch.randn(9, 64)
    gate[:, 3] = ends
    got = op.bind(LLAMA, gating, "triton")(x, gate, weight, 1e-6)
    want = gated_rms_norm(x, gate, weight, LLAMA, gating)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-38, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "target", [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=str
)
def test_it_compiles_for_devices_that_are_not_here(target: GPUTarget, order: Any) -> None:
    spec, gating = NormSpec(group=1024), GateSpec("silu", order)
    layout = Layout("rms_norm", spec, BF16, 4096, BF16, ahead.known(target))
    constants = portable.constants(layout, gating) | {"NESTED": True}
    compiled = ahead.compiled(target, portable.MODULE, layout, constants, BF16)
    if target.backend == "cuda":
        waits = compiled.asm["ptx"].count("griddepcontrol.wait")
        assert waits == (1 if int(target.arch) >= 90 else 0)
