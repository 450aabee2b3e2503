"""The op that writes silu(gate) * up quantised, without a GPU: its results, what it refuses, what graphs see of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_bits import same
from torch._subclasses.fake_tensor import FakeTensorMode

from rmsnorm_patch.backends.cuda.schedules import schedules
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.silu_quantised import kernel, op
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.silu import SILUS, Silu, silu_and_mul_quantised
from rmsnorm_patch.ops import listeners

OP: Any = torch.ops.rmsnorm_patch.silu_and_mul_quantised.default
BF16, FP16 = torch.bfloat16, torch.float16
QUANTS = {
    "static": QuantSpec("fp8_static"),
    "token": QuantSpec("fp8_token", "fp32", "native"),
    "block": QuantSpec("fp8_block", layout="tma_aligned", power_of_two=True, arithmetic="separate"),
    "few or many": QuantSpec("fp8_block", layout="tma_aligned", power_of_two=True, arithmetic="by_rows"),
    "int8": QuantSpec("int8_token", arithmetic="separate"),
}


def given(quant: QuantSpec) -> torch.Tensor | None:
    return torch.tensor([0.02]) if quant.scheme == "fp8_static" else None


def call(x: torch.Tensor, silu: Silu, quant: QuantSpec, *how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return OP(x, given(quant), quant.scheme, *op.silu_args(silu, quant), *how)  # type: ignore[no-any-return]


@pytest.mark.parametrize("silu", SILUS)
@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_on_the_cpu_it_is_the_definition(dtype: torch.dtype, quant: QuantSpec, silu: Silu) -> None:
    x = torch.randn(2, 3, 1024).to(dtype)[..., :512]
    rows, scales = call(x, silu, quant)
    want, want_scales = silu_and_mul_quantised(x, silu, quant, given(quant))
    assert same(rows, want)
    assert same(scales, want_scales)
    assert scales.stride() == want_scales.stride()
    assert rows.is_contiguous()


def test_no_rows_are_no_work_and_calls_are_told_of() -> None:
    heard: list[listeners.Call] = []
    end = listeners.listen(heard.append)
    try:
        rows, scales = call(torch.zeros(0, 512, dtype=BF16), "fp32", QUANTS["block"])
    finally:
        end()
    assert (rows.shape, scales.shape) == ((0, 256), (0, 2))
    assert [(each.op, each.more["scheme"], each.more["silu"]) for each in heard] == [(op.NAME, "fp8_block", "fp32")]


@pytest.mark.parametrize("name", QUANTS)
def test_a_graph_sees_the_shapes_dtypes_and_strides(name: str) -> None:
    quant, x = QUANTS[name], torch.randn(5, 512).to(BF16)
    real = call(x, "rounded", quant)
    with FakeTensorMode() as mode:
        scale = given(quant)
        scale = None if scale is None else mode.from_tensor(scale)
        found = OP(mode.from_tensor(x), scale, quant.scheme, *op.silu_args("rounded", quant))
    for made, result in zip(found, real, strict=True):
        assert (made.shape, made.dtype, made.stride()) == (result.shape, result.dtype, result.stride())


def test_opcheck_and_arguments_by_name() -> None:
    quant, x = QUANTS["block"], torch.randn(5, 512).to(BF16)
    arguments = (x, None, quant.scheme, *op.silu_args("product", quant))
    torch.library.opcheck(OP, arguments, test_utils=("test_schema", "test_faketensor"))
    named = OP(x, None, "fp8_block", silu="product", arithmetic="separate", layout="tma_aligned", power_of_two=True)
    assert all(same(left, right) for left, right in zip(named, OP(*arguments), strict=True))


def test_what_is_refused_says_what_came_and_what_to_do() -> None:
    x = torch.randn(5, 512).to(BF16)
    with pytest.raises(UnsupportedInput, match="given=None for fp8_static"):
        OP(x, None, "fp8_static")
    with pytest.raises(UnsupportedInput, match=r"x of dtype torch\.float32"):
        call(x.float(), "rounded", QUANTS["token"])
    with pytest.raises(ValueError, match=r"QuantSpec.scheme: got 'fp4'"):
        OP(x, None, "fp4")
    with pytest.raises(KernelBuildError, match="not a CUDA device"):
        call(x, "rounded", QUANTS["token"], "cuda")


@pytest.mark.parametrize(
    ("name", "n", "arch", "why"),
    [
        ("token", 14336, 90, ""),
        ("token", 14336, 86, "fp8 needs sm_89"),
        ("int8", 14336, 80, ""),
        ("block", 1 << 20, 90, ""),
        ("token", 32768, 89, ""),
        ("token", 32776, 90, "needs N <= 32768"),
        ("static", 1001, 90, "no CUDA kernel"),
    ],
)
def test_which_rows_have_a_kernel(name: str, n: int, arch: int, why: str) -> None:
    quant = QUANTS[name]
    found = kernel.cannot_serve(quant, BF16, n, arch, schedules(kernel.op_of(quant), BF16, n, arch))
    assert why in found
    assert bool(why) == bool(found)


@pytest.mark.parametrize("n", [8, 128, 768, 3584, 14336, 18944, 28672])
def test_parts_cover_a_row_and_are_as_many_for_all_numbers_of_rows(n: int) -> None:
    for arch in (80, 89, 90, 100, 120):
        configs = schedules(kernel.PARTS, BF16, n, arch)
        assert len({kernel.parts_of(config, n) for config in configs}) == 1
        for config in configs:
            held = config.vec * config.threads_per_row * dict(config.defines)["PART_CHUNKS"]
            parts = kernel.parts_of(config, n)
            assert (parts - 1) * held < n <= parts * held
            assert held % 128 == 0
        assert {kernel.parts_of(config, n) for config in schedules(kernel.WHOLE, BF16, n, arch)} == {1}
