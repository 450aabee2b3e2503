"""The kernels that write silu(gate) * up quantised: byte for byte what the definition and vLLM's own ops give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made_rows import given, rows, same

from rmsnorm_patch.bench.providers.norms import vllm_op
from rmsnorm_patch.fused.silu_quantised import op
from rmsnorm_patch.numerics.quantisation import QuantSpec, new_scales
from rmsnorm_patch.numerics.silu import SILUS, Silu, silu_and_mul_quantised
from rmsnorm_patch.vllm_plugin import trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 needs sm_89"
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
QUANTS = {
    "static": QuantSpec("fp8_static"),
    "static native": QuantSpec("fp8_static", "fp32", "native"),
    "token": QuantSpec("fp8_token"),
    "token native": QuantSpec("fp8_token", "fp32", "native"),
    "block": QuantSpec("fp8_block", "fp32"),
    "block native": QuantSpec("fp8_block", "fp32", "native", "column_major", True),
    "block separate": QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True),
    "int8": QuantSpec("int8_token", arithmetic="separate"),
}


def run(x: torch.Tensor, silu: Silu, quant: QuantSpec, scale: Any, backend: str = "cuda") -> Any:
    arguments = (x, scale, quant.scheme, *op.silu_args(silu, quant), backend)
    return torch.ops.rmsnorm_patch.silu_and_mul_quantised(*arguments)


def check(x: torch.Tensor, silu: Silu, quant: QuantSpec, scale: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    found, scales = run(x, silu, quant, scale)
    want, want_scales = silu_and_mul_quantised(x, silu, quant, scale)
    assert same(found, want)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    assert scales.stride() == want_scales.stride()
    return found, scales


@pytest.mark.parametrize("n", [64, 128, 264, 768, 3584, 4096, 9728, 14336, 18944, 28672, 32768])
@pytest.mark.parametrize("name", QUANTS)
def test_bits_are_those_of_the_definition(name: str, n: int) -> None:
    """Row counts of every schedule. Gates of all kinds of numbers: half of a row that has NaN has them."""
    quant = QUANTS[name]
    for m in (1, 17, 65, 600):
        x = rows(m, 2 * n, m)
        for silu in SILUS:
            check(x, silu, quant, given(quant, silu == "fp32"))


@pytest.mark.parametrize("silu", SILUS)
def test_every_gate_of_16_bits(silu: Silu) -> None:
    for dtype in (BF16, FP16):
        gates = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16).view(dtype).view(16, 4096)
        ups = torch.randn(16, 4096, device="cuda").to(dtype)
        for name in ("static", "static native", "block native"):
            check(torch.cat([gates, ups], -1), silu, QUANTS[name], given(QUANTS[name]))


def test_few_rows_and_many_give_the_same_bits() -> None:
    for name, quant in QUANTS.items():
        x = rows(1000, 2 * 14336, 5)
        found, scales = check(x, "rounded", quant, given(quant))
        few, few_scales = check(x[20:23], "rounded", quant, given(quant))
        assert same(few, found[20:23]), name
        assert scales.numel() == 0 or torch.equal(few_scales, scales[20:23])


@pytest.mark.parametrize("first", [0, 1, 4], ids=lambda first: f"{2 * first} bytes off")
def test_strided_rows(first: int) -> None:
    """A view into wider rows, also one whose elements lie between vectors."""
    for quant in (QUANTS["block separate"], QUANTS["token"]):
        wide = rows(2 * 7, 8192 + 5, 7).view(2, 7, 8197)[:, :6:2, first : first + 8192]
        found, scales = run(wide, "rounded", quant, None)
        want, want_scales = check(wide.reshape(6, 8192), "rounded", quant)
        assert same(found.view(6, 4096), want)
        assert torch.equal(scales.reshape(want_scales.shape), want_scales)


def test_rows_and_a_scale_written_by_the_kernel_in_front_are_read() -> None:
    """Case 88: the launch is dependent, the reads stand behind the wait."""
    for name in ("static", "token", "block"):
        quant, x = QUANTS[name], torch.zeros(4, 2 * 14336, device="cuda", dtype=BF16)
        scale = given(quant)
        for turn in range(100):
            new = rows(4, 2 * 14336, turn)
            new_scale = None if scale is None else torch.full_like(scale, 0.01 * (1 + turn % 5))
            want, _ = silu_and_mul_quantised(new, "rounded", quant, new_scale)
            x.copy_(new)
            if scale is not None and new_scale is not None:
                scale.copy_(new_scale)
            found, _ = run(x, "rounded", quant, scale)
            assert same(found, want), (name, turn)


def _vllm(name: str) -> Any:
    try:
        return vllm_op(name)
    except (ImportError, AttributeError, OSError) as error:
        pytest.skip(f"no {name} of vLLM here: {error}")


def finite(m: int, n: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    x = torch.randn(m, 2 * n, device="cuda", generator=torch.Generator("cuda").manual_seed(m)).to(dtype)
    x[m // 2] = 0
    x[:, n // 2 : n] *= 20
    return x


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("n", [3584, 14336])
def test_vllms_two_ops_give_the_same_bytes(n: int, dtype: torch.dtype) -> None:
    multiply = _vllm("silu_and_mul")
    static, token = _vllm("static_scaled_fp8_quant"), _vllm("dynamic_per_token_scaled_fp8_quant")
    int8 = _vllm("dynamic_scaled_int8_quant")
    for m in (1, 33, 300):
        x = finite(m, n, dtype)
        values = x.new_empty(m, n)
        multiply(values, x)
        scale = torch.tensor([0.037], device="cuda")
        calls = {
            "fp8_static": lambda out, scales: static(out, values, scale),  # noqa: B023
            "fp8_token": lambda out, scales: token(out, values, scales, None),  # noqa: B023
            "int8_token": lambda out, scales: int8(out, values, scales, None),  # noqa: B023
        }
        for scheme, call in calls.items():
            quant = QuantSpec(scheme, arithmetic="separate")  # type: ignore[arg-type]
            out = x.new_empty(m, n, dtype=quant.dtype)
            scales = new_scales(out, quant)
            call(out, scales)
            found, found_scales = run(x, "rounded", quant, scale if scheme == "fp8_static" else None)
            assert same(found, out), scheme
            assert torch.equal(found_scales, scales), scheme


@pytest.mark.parametrize("n", [3584, 14336])
def test_vllms_ops_of_both_give_the_same_bytes(n: int) -> None:
    static, block = _vllm("silu_and_mul_quant"), _vllm("silu_and_mul_per_block_quant")
    for m in (1, 33, 300):
        x = finite(m, n)
        out, scale = x.new_empty(m, n, dtype=torch.float8_e4m3fn), torch.tensor([0.037], device="cuda")
        static(out, x, scale)
        assert same(run(x, "rounded", QuantSpec("fp8_static"), scale)[0], out)
        for layout in ("row_major", "column_major"):
            quant = QuantSpec("fp8_block", "fp32", layout=layout)  # type: ignore[arg-type]
            scales = new_scales(out, quant)
            block(out, x, scales, 128, None, layout == "column_major")
            found, found_scales = run(x, "product", quant, None)
            assert same(found, out), layout
            assert torch.equal(found_scales, scales), layout


@pytest.mark.parametrize("n", [128, 1003, 14336])
@pytest.mark.parametrize("name", QUANTS)
def test_triton_rows_are_a_step_from_the_definition_at_most(name: str, n: int) -> None:
    quant = QUANTS[name]
    x, scale = finite(37, n), given(quant)
    found, scales = run(x, "rounded", quant, scale, "triton")
    want, want_scales = silu_and_mul_quantised(x, "rounded", quant, scale)
    apart = (found.view(torch.uint8).to(torch.int32) - want.view(torch.uint8).to(torch.int32)).abs()
    assert (apart <= 1).all()
    assert (apart == 0).float().mean() > 0.99
    torch.testing.assert_close(scales, want_scales, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("n", [512, 3584, 14336])
@pytest.mark.parametrize("name", QUANTS)
def test_the_trial_of_an_engine_passes(name: str, n: int) -> None:
    quant, x = QUANTS[name], torch.empty(0, 2 * n, dtype=BF16, device="cuda")
    for silu in SILUS:
        assert trial.declined_silu(x, silu, quant, quant.scheme == "fp8_static") == ""
