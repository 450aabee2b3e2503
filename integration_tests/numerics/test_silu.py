"""silu(gate) * up: each way against fp64 for every gate that there is, and against what PyTorch computes."""

from __future__ import annotations

import pytest
import torch

from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
from rmsnorm_patch.numerics.silu import DTYPES, SILUS, Silu, check_silu, silu_and_mul, silu_and_mul_quantised


def every_gate(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a 16-bit dtype but NaN."""
    gates = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return gates[~gates.isnan()]


def beside(gates: torch.Tensor) -> torch.Tensor:
    return torch.cat([gates, torch.randn(gates.shape, generator=torch.Generator().manual_seed(1)).to(gates.dtype)], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", SILUS)
def test_every_gate_against_fp64(silu: Silu, dtype: torch.dtype) -> None:
    gates = every_gate(dtype)
    # Below, 1 + e^-gate leaves fp32; above, the product does.
    gates = gates[(gates.float() > -87) & (gates.float() < 1e37)]
    x = beside(gates)
    gate, up = x.double().chunk(2, -1)
    exact = gate / (1 + torch.exp(-gate))
    if silu == "rounded":
        exact = exact.to(dtype).double()
    found = silu_and_mul(x, silu, rounded=False).double()
    step = torch.finfo(dtype).eps if silu == "rounded" else 0.0  # next to the middle of two numbers
    torch.testing.assert_close(found, exact * up, rtol=step + 2.0**-21, atol=2.0**-24 if silu == "rounded" else 1e-38)
    apart = (found.float() != (exact * up).float()).float().mean()
    assert silu != "rounded" or apart < 0.001


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_is_what_pytorch_computes(dtype: torch.dtype) -> None:
    x = beside(every_gate(dtype))
    gate, up = x.chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    found = silu_and_mul(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)
    assert (found != want).logical_and(~want.isnan()).float().mean() < 0.001


def test_the_ways_differ() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    values = [silu_and_mul(x, silu, rounded=False) for silu in SILUS]
    assert all(not torch.equal(values[left], values[right]) for left, right in ((0, 1), (0, 2), (1, 2)))
    once, twice = silu_and_mul(x, "fp32"), silu_and_mul(x, "rounded")
    assert torch.equal(once, values[1].to(torch.bfloat16))
    assert not torch.equal(once, twice)


@pytest.mark.parametrize("value", ["fp32", "rounded"])
@pytest.mark.parametrize("silu", SILUS)
def test_quantised_rows_are_those_of_the_product(silu: Silu, value: str) -> None:
    x = torch.randn(5, 2, 512, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    quant = QuantSpec("fp8_block", value, layout="tma_aligned")  # type: ignore[arg-type]
    rows, scales = silu_and_mul_quantised(x, silu, quant)
    want, want_scales = quantise(silu_and_mul(x, silu, rounded=value == "rounded"), quant)
    assert torch.equal(rows.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scales, want_scales)
    assert (rows.shape, scales.shape, rows.is_contiguous()) == ((5, 2, 256), (5, 2, 2), True)


@pytest.mark.parametrize(
    ("x", "silu", "message"),
    [
        (torch.zeros(2, 8), "rounded", "x of dtype torch.float32"),
        (torch.zeros(2, 7).half(), "rounded", r"x of shape \(2, 7\)"),
        (torch.zeros(2, 0).half(), "rounded", r"x of shape \(2, 0\)"),
        (torch.zeros(2, 8).half(), "gelu", "silu='gelu'"),
    ],
)
def test_what_is_refused(x: torch.Tensor, silu: str, message: str) -> None:
    with pytest.raises(UnsupportedInput, match=message):
        check_silu(x, silu, "an op")
