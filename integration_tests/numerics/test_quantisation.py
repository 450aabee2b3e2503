"""The definition of quantised rows against a naive one: a number at a time, fp8 by its table of values."""

from __future__ import annotations

import bisect
import math
from itertools import product

import numpy as np
import pytest
import torch

from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.quantisation import (
    ARITHMETICS,
    LAYOUTS,
    QuantSpec,
    new_scales,
    quantise,
    rms_norm_quantised,
)
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec

F = np.float32
QUANTS = {
    f"{scheme}-{arithmetic}" + ("-power" if power else ""): QuantSpec(
        scheme,  # type: ignore[arg-type]
        arithmetic=arithmetic,
        power_of_two=power,
    )
    for scheme, arithmetic, power in product(
        ("fp8_static", "fp8_token", "fp8_block", "int8_token"), ARITHMETICS, (False, True)
    )
    if not (power and (scheme != "fp8_block" or arithmetic == "flashinfer"))
    and (scheme, arithmetic) != ("int8_token", "native")
    and (scheme == "fp8_block" or arithmetic not in ("flashinfer", "by_rows"))
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN, 1 / 0 and overflows on purpose


def e4m3(byte: int) -> float:
    exponent, fraction = byte >> 3 & 15, byte & 7
    return (8 + fraction) / 8 * 2.0 ** (exponent - 7) if exponent else fraction / 8 / 64


SIZES = [e4m3(byte) for byte in range(127)]


def naive_fp8(value: F, missing: int) -> int:
    if math.isnan(value):
        return missing
    size, sign = abs(float(value)), 128 if math.copysign(1.0, value) < 0 else 0
    if size >= 448:
        return 126 | sign
    above = bisect.bisect_left(SIZES, size)
    both = (above - 1, above) if above else (above,)
    return min(both, key=lambda byte: (abs(SIZES[byte] - size), byte % 2)) | sign  # the differences are exact


def naive_int8(value: F) -> int:
    if math.isnan(value):
        return 0
    return max(-128, min(127, round(max(-1000.0, min(1000.0, float(value))))))


def naive_power_of_two(scale: F) -> F:
    if not math.isfinite(scale) or scale == 0:
        return scale
    fraction, exponent = math.frexp(float(scale))
    return F(2.0 ** (exponent - (fraction == 0.5)))


def naive(values: list[F], quant: QuantSpec, given: F | None) -> tuple[list[int], list[F]]:
    """Bytes and scales of one row, as the libraries' sources read."""
    if quant.arithmetic in ("flashinfer", "by_rows"):  # the rows of these tests are few
        return naive_flashinfer(values)
    limit, fused, separate = F(quant.limit), quant.arithmetic == "fused", quant.arithmetic == "separate"
    missing = 127 if quant.arithmetic == "native" else 254 if separate and quant.scheme == "fp8_block" else 126
    if quant.scheme == "fp8_static":
        return [naive_fp8(value * (F(1) / given), missing) for value in values], []
    size = 128 if quant.scheme == "fp8_block" else len(values)
    found, scales = [], []
    for start in range(0, len(values), size):
        group = values[start : start + size]
        numbers = [abs(value) for value in group if not math.isnan(value)]
        largest = max(numbers, default=F(0))
        if quant.arithmetic == "native" and len(numbers) < len(group):
            largest = F("nan")
        if given is not None and largest > given:
            largest = given
        if separate and quant.scheme == "fp8_block" and largest < F(1e-10):
            largest = F(1e-10)
        scale = largest / limit
        least = F(2**-23) if quant.scheme == "int8_token" else F(1 / (448 * 512))
        bounded = fused or quant.scheme == "fp8_token"
        if bounded and scale < least:
            scale = least
        if quant.power_of_two:
            if separate and scale < F(1e-10):
                scale = F(1e-10)
            scale = naive_power_of_two(scale)
        if quant.arithmetic == "native" and scale < least:
            scale = least
        for value in group:
            if quant.scheme == "int8_token" and separate:
                found.append(naive_int8(value * (F(0) if largest == 0 else limit / largest)))
            elif quant.scheme == "int8_token":
                found.append(naive_int8(value * (F(1) / scale)))
            elif quant.scheme == "fp8_token" and quant.arithmetic == "native":
                found.append(naive_fp8(value * (F(1) / scale), missing))
            else:
                found.append(naive_fp8(value / scale, missing))
        scales.append(scale)
    return found, scales


def naive_flashinfer(values: list[F]) -> tuple[list[int], list[F]]:
    """Its `scale_1x128_kernel`, with 1 for an infinite factor too, where its results are NaN or follow from lanes."""
    found, scales = [], []
    for start in range(0, len(values), 128):
        group = values[start : start + 128]
        largest = max((abs(value) for value in group if not math.isnan(value)), default=F(0))
        factor = F(448) / largest if largest != 0 else F(1)
        factor = F(1) if math.isinf(factor) else factor
        found += [naive_fp8(value * factor, 127) for value in group]
        scales.append(F(1) / factor)
    return found, scales


def rows(n: int = 200) -> torch.Tensor:
    values = torch.randn(14, n, generator=torch.Generator().manual_seed(n))
    values[0] = 0
    values[1, 5], values[2, 7], values[3, 130:] = math.inf, math.nan, -math.inf
    values[4] *= 1e38
    values[5] *= 1e-40  # the largest is subnormal
    values[6] *= 1e-12
    values[7] = math.nan
    values[8] *= torch.logspace(-9, 3, n)
    values[9] = torch.arange(n) / 7 * (448 / 28)  # ties of the format
    values[10] = 0.0
    values[10, 3], values[10, 140] = -0.0, 2.0**-9
    values[11] = 448 * 2.0**-6  # a scale that is a power of two
    values[12] = torch.nextafter(values[11], torch.tensor(math.inf))
    return values


GIVEN = {"fp8_static": (0.037, 1.0, 0.0, 1e-30, math.inf), "fp8_token": (None, 1.5, 0.0, 1e-30, math.inf)}
CASES = [pytest.param(quant, given, id=f"{name}-{given}") for name, quant in QUANTS.items()
         for given in GIVEN.get(quant.scheme, (None,))]  # fmt: skip


@pytest.mark.parametrize(("m", "arithmetic"), [(1, "flashinfer"), (31, "flashinfer"), (32, "separate")])
@pytest.mark.parametrize("power", [False, True])
def test_the_number_of_rows_chooses_an_arithmetic(power: bool, m: int, arithmetic: str) -> None:
    """That of all rows, whatever dimensions they lie in; powers of two are those of `separate`."""
    by_rows = QuantSpec("fp8_block", "rounded", "by_rows", "tma_aligned", power)
    chosen = QuantSpec("fp8_block", "rounded", arithmetic, "tma_aligned", power and arithmetic == "separate")  # type: ignore[arg-type]
    assert by_rows.of_rows(m) == chosen
    assert chosen.of_rows(m) == chosen
    values = torch.randn(m, 256, generator=torch.Generator().manual_seed(m))
    for shaped in (values, values[:, None], values[None]):
        found, want = quantise(shaped, by_rows), quantise(shaped, chosen)
        assert torch.equal(found[0].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(found[1], want[1])
        assert found[1].stride() == want[1].stride()


@pytest.mark.parametrize(("quant", "given"), CASES)
def test_every_byte_and_scale_is_the_naive_one(quant: QuantSpec, given: float | None) -> None:
    """Case 90 among the rows: zeros, infinities, NaN, a subnormal largest, a scale of 0, a bound below the largest."""
    values = rows()
    found, scales = quantise(values, quant, None if given is None else torch.tensor([given]))
    assert found.dtype == quant.dtype
    for row in range(len(values)):
        line = [F(value) for value in values[row].tolist()]
        want, want_scales = naive(line, quant, None if given is None else F(given))
        assert [byte & 255 for byte in want] == found[row].view(torch.uint8).tolist(), row
        if want_scales:
            np.testing.assert_array_equal(scales[row].numpy(), np.array(want_scales), str(row))
    if quant.scheme == "fp8_static":
        assert scales.numel() == 0


@pytest.mark.parametrize("spec", [LLAMA, GEMMA, FP32_WEIGHT_MULTIPLY, NormSpec(weight_offset="weight_dtype"),
                                  NormSpec(round_before_weight="none", sum="fp32", output="input"),
                                  NormSpec(has_weight=False), NormSpec(width=100)], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_quantised_is_the_norm_in_both_definitions(dtype: torch.dtype, spec: NormSpec) -> None:
    x, residual = (torch.randn(5, 256).to(dtype) for _ in range(2))
    weight = torch.randn(256).to(dtype) if spec.has_weight else None
    normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, 1e-5)
    for value in ("rounded", "fp32"):
        quant = QuantSpec("fp8_block", value)  # type: ignore[arg-type]
        found, scales, second, sum_ = rms_norm_quantised(x, residual, weight, spec, quant, 1e-5)
        assert torch.equal(second, normed)
        assert torch.equal(sum_, total)
        if value == "rounded":
            want = normed
        else:  # a weight in fp32 leaves the product unrounded
            wide = None if weight is None else weight.float()
            if spec.weight_offset == "weight_dtype" and weight is not None:
                wide = (1.0 + weight).float()
            as_is = NormSpec(None, spec.round_before_weight, "fp32" if spec.weight_offset == "fp32" else "none",
                             spec.has_weight, "promote", spec.sum, spec.width)  # fmt: skip
            want = reference.fused_add_rms_norm(x, residual, wide, as_is, 1e-5)[0].float()
            assert spec.has_weight is False or not torch.equal(want, normed.float()), "the two would be one"
        bytes_, want_scales = quantise(want, quant)
        assert torch.equal(found.view(torch.uint8), bytes_.view(torch.uint8))
        assert torch.equal(scales, want_scales)


@pytest.mark.parametrize("m", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_scales(layout: str, m: int) -> None:
    """Case 91: columns of a multiple of four floats, whose padding is no element of the tensor."""
    quant = QuantSpec("fp8_block", layout=layout)  # type: ignore[arg-type]
    values = torch.randn(m, 384)
    scales = quantise(values, quant)[1]
    assert scales.shape == (m, 3)
    column = {"row_major": 1, "column_major": m, "tma_aligned": -(-m // 4) * 4}[layout]
    assert scales.stride() == ((3, 1) if layout == "row_major" else (1, column))
    assert torch.equal(scales, quantise(values, QuantSpec("fp8_block"))[1])
    batched = new_scales(torch.empty(2, m, 384), quant)
    assert batched.shape == (2, m, 3)
    if m and layout != "row_major":
        assert batched.stride()[:2] == (m, 1)


def test_a_spec_names_what_it_does_not_know() -> None:
    for bad, message in (
        ({"scheme": "fp4"}, "QuantSpec.scheme: got 'fp4'"),
        ({"scheme": "fp8_token", "value": "bf16"}, "QuantSpec.value"),
        ({"scheme": "int8_token", "arithmetic": "native"}, "allowed: 'fused', 'separate'"),
        ({"scheme": "fp8_token", "power_of_two": True}, "they are of fp8_block"),
        ({"scheme": "fp8_block", "layout": "columns"}, "QuantSpec.layout"),
        ({"scheme": "fp8_token", "arithmetic": "flashinfer"}, "got 'flashinfer' for fp8_token"),
        ({"scheme": "int8_token", "arithmetic": "by_rows"}, "got 'by_rows' for int8_token"),
        ({"scheme": "fp8_block", "arithmetic": "flashinfer", "power_of_two": True}, "its scales are inverses"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            QuantSpec(**bad)  # type: ignore[arg-type]
