"""The Triton kernel of quantised rows: in the CPU interpreter against quantising what the Triton norms give, and
compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import ahead
from triton.backends.compiler import GPUTarget

from rmsnorm_patch import ops
from rmsnorm_patch.backends.triton.backend import Layout
from rmsnorm_patch.fused.norm_quantised import op, portable
from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, LLAMA, NormSpec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN and 1/0 on purpose

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 1e-6
FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")
QUANTS = {
    "static": QuantSpec("fp8_static"),
    "static native": QuantSpec("fp8_static", "fp32", "native"),
    "token": QuantSpec("fp8_token"),
    "token native": QuantSpec("fp8_token", "fp32", "native"),
    "block": QuantSpec("fp8_block"),
    "block native": QuantSpec("fp8_block", "fp32", "native", "column_major", True),
    "block separate": QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True),
    "block for FlashInfer": QuantSpec("fp8_block", "rounded", "flashinfer", "tma_aligned"),
    "block by rows": QuantSpec("fp8_block", "rounded", "by_rows", "tma_aligned", True),
    "int8": QuantSpec("int8_token"),
    "int8 separate": QuantSpec("int8_token", "fp32", "separate"),
}


def rows(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Zeros, infinities, NaN, tiny and huge numbers among them."""
    values = torch.randn(m, n, generator=torch.Generator().manual_seed(n + seed))
    values[0] = 0
    values[1, 5], values[2, 7] = float("inf"), float("nan")
    values[3] *= 1e-6
    values[4] *= 3e4
    values[5, : n // 2] = 0
    return values.to(dtype)


SHORT = (64, 200, 384, 1003)
LENGTHS = [
    *(
        pytest.param(name, n, marks=() if n in (SHORT[number % 4], SHORT[(number + 1) % 4]) else pytest.mark.long)
        for number, name in enumerate(QUANTS)
        for n in SHORT
    ),  # make test: two lengths of each, each length of half of them
    *((name, 32768) for name in ("token native", "block separate")),  # computed twice
    *((name, 65544) for name in ("token", "block")),  # a part is read again too
    ("block", 65536),  # of an fp32 sum alone, and more than the norm does
]


@pytest.mark.parametrize(("name", "n"), LENGTHS)
def test_interpreted_bits_are_those_of_quantising_the_norm(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quant, dtype = QUANTS[name], FP16 if n == 200 else BF16
    if quant.scheme == "fp8_static":
        given: torch.Tensor | None = torch.tensor([0.02])
    else:
        given = torch.tensor([1.5]) if name == "token" else None
    # Zeros meet zeros; what is no number meets others; the rest has sums that round.
    x, residual, weight = rows(7, n, dtype), rows(7, n, dtype, 1)[[0, 6, 1, 3, 4, 5, 6]], torch.randn(n).to(dtype)
    for spec in (LLAMA, FP32_SUM) if quant.value == "rounded" else (FP32_WEIGHT_MULTIPLY, FP32_SUM):
        check_bits(x, residual, weight, spec, quant, given)


def check_bits(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    spec: NormSpec,
    quant: QuantSpec,
    given: torch.Tensor | None = None,
    eps: float = EPS,
) -> torch.Tensor:
    """The scales, where all results are what quantising the norm's gives."""
    normed, total = ops.bind_fused_add_rms_norm(spec, "triton")(x, residual, weight, eps)
    values = normed
    if quant.value == "fp32":  # an fp32 weight leaves the product unrounded
        wide = NormSpec(round_before_weight="none", sum=spec.sum)
        values, _ = ops.bind_fused_add_rms_norm(wide, "triton")(x, residual, weight.float(), eps)
    want, want_scales = quantise(values, quant, given)
    kept = residual.clone()
    rest = (weight, given, quant.scheme, eps, *ops.spec_args(spec, "triton"), *op.quant_args(quant, True))
    found, scales, second = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, kept, *rest)
    assert torch.equal(kept.view(torch.int16), total.view(torch.int16))
    assert torch.equal(second.nan_to_num(), normed.nan_to_num())
    assert torch.equal(found.view(torch.uint8), want.view(torch.uint8))
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    return scales  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [1000, 3000, 5000])
def test_interpreted_norms_over_a_part_of_a_row(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends in each of three chunks, between two numbers that none can miss."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, residual, weight = torch.randn(2, 5125).to(BF16), torch.randn(2, 5125).to(BF16), torch.randn(5125).to(BF16)
    x[:, width - 1], x[:, width] = 300, 500
    check_bits(x, residual, weight, NormSpec(width=width), QUANTS["token"])


def ones(count: int) -> torch.Tensor:
    """Rows whose norms are the weight, of either sign: their mean squares are 1."""
    return torch.tensor([[1.0], [-1.0]]).expand(2, count).to(BF16)


def test_interpreted_rows_of_every_16_bit_number_near_those_of_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the middle of two are among them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bits = torch.arange((127 - 12) << 7, (127 + 10) << 7, dtype=torch.int16)
    weight = torch.cat((bits.view(BF16), torch.tensor([0.0, 1e-38, 3e38, float("inf"), float("nan")]).to(BF16)))
    x = ones(weight.numel())
    check_bits(x, torch.zeros_like(x), weight, LLAMA, QUANTS["static"], torch.tensor([1.0]))


@pytest.mark.parametrize("largest", [127.0, 1.0, 2.0**-125])
def test_interpreted_rows_of_int8_at_its_ends(largest: float, handed: Callable[[str], list[Any]]) -> None:
    """Steps in the middle of two; a scale that is the limit's inverse; one so small that each step is infinite. What
    becomes a byte is one: of other numbers devices may make what they like."""
    converted = handed("create_fp_to_si")
    weight = torch.arange(-127, 127.5, 0.5).mul(largest / 127).to(BF16)
    x = ones(weight.numel())
    quant = QuantSpec("int8_token", "rounded", "separate")
    scales = check_bits(x, torch.zeros_like(x), weight, LLAMA, quant)
    assert torch.equal(scales, torch.full((2, 1), largest).div(127.0))
    assert converted
    assert all(((values >= -128) & (values <= 127)).all() for values in converted)


@pytest.mark.parametrize("name", ["token native", "block native", "int8 separate"])
def test_interpreted_rows_of_an_infinite_reciprocal_rms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their squares are 0, and no eps is added: they are infinite, and behind their end there is nothing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight = torch.full((3, 1003), 1e-30).to(BF16), torch.rand(1003).add(0.5).to(BF16)
    x[1] = 0
    scales = check_bits(x, torch.zeros_like(x), weight, FP32_WEIGHT_MULTIPLY, QUANTS[name], eps=0.0)
    assert scales[0].isinf().all()


def test_interpreted_rows_with_strides_and_a_plain_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quant, weight = QUANTS["block separate"], torch.randn(256).to(BF16)
    x = torch.randn(2, 6, 512).to(BF16)[:, ::2, :256]
    rest = (weight, None, quant.scheme, EPS, *ops.spec_args(LLAMA, "triton"), *op.quant_args(quant))
    found, scales, second = torch.ops.rmsnorm_patch.rms_norm_quantised(x, *rest)
    want, want_scales = quantise(ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS), quant)
    assert torch.equal(found.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scales, want_scales)
    assert scales.stride() == want_scales.stride()
    assert second.numel() == 0


def build(target: GPUTarget, name: str, n: int, fused_add: bool = True, spec: NormSpec = LLAMA) -> Any:
    layout = Layout("fused_add_rms_norm_" if fused_add else "rms_norm", spec, BF16, n, BF16, ahead.known(target))
    made: dict[str, Any] = portable.constants(layout, spec, QUANTS[name], fused_add, True)
    made |= {"NESTED": False, "GIVEN": name.startswith("static")}
    types = {"rows_ptr": "*u8", "scales_ptr": "*fp32", "given_ptr": "*fp32"}
    return ahead.compiled(target, portable.MODULE, layout, made, BF16, types)


@pytest.mark.parametrize(
    ("target", "name", "n"),
    [
        (GPUTarget("cuda", 80, 32), "token", 4096),
        (GPUTarget("cuda", 90, 32), "block separate", 7168),
        (GPUTarget("cuda", 90, 32), "block for FlashInfer", 4096),
        (GPUTarget("cuda", 100, 32), "int8", 1003),
        (GPUTarget("hip", "gfx942", 64), "block", 4096),
        (GPUTarget("hip", "gfx942", 64), "block for FlashInfer", 4096),
    ],
    ids=str,
)
def test_it_compiles_for_devices_that_are_not_here(target: GPUTarget, name: str, n: int) -> None:
    ahead.check_waits_and_quotients(build(target, name, n), target, name == "block for FlashInfer")


@pytest.mark.parametrize(
    ("capability", "name", "fused_add", "spec"),
    [
        (89, "block", True, LLAMA),
        (90, "block separate", True, LLAMA),
        (90, "block", True, FP32_SUM),
        (90, "token", True, LLAMA),
        (90, "token native", True, FP32_SUM),
        (90, "int8", False, LLAMA),
        (90, "static", True, FP32_SUM),
        (100, "block", True, LLAMA),
        (100, "token", True, LLAMA),
        (100, "block", True, FP32_SUM),
        (100, "token native", True, FP32_SUM),
        (103, "token", True, FP32_SUM),
        (120, "block", True, FP32_SUM),
    ],
)
def test_the_longest_rows_that_stay_in_registers_do_not_spill(
    capability: int, name: str, fused_add: bool, spec: NormSpec
) -> None:
    compiled = build(GPUTarget("cuda", capability, 32), name, 65536, fused_add, spec)
    assert (ahead.usage(compiled, "STACK"), ahead.usage(compiled, "LOCAL")) == (0, 0)
