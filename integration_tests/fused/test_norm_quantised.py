"""The ops that write quantised rows, without a GPU: their results, what they refuse, what graphs see of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from same_bits import same
from torch._subclasses.fake_tensor import FakeTensorMode

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda.schedules import schedules
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.fused.norm_quantised import kernel
from rmsnorm_patch.fused.norm_quantised.op import FUSED, PLAIN, quant_args
from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, NormSpec

PLAIN_OP: Any = getattr(torch.ops.rmsnorm_patch, PLAIN).default
FUSED_OP: Any = getattr(torch.ops.rmsnorm_patch, FUSED).default
BF16, FP16 = torch.bfloat16, torch.float16
QUANTS = {
    "static": QuantSpec("fp8_static"),
    "token": QuantSpec("fp8_token", "fp32", "native"),
    "block": QuantSpec("fp8_block", layout="tma_aligned", power_of_two=True, arithmetic="separate"),
    "few or many": QuantSpec("fp8_block", layout="tma_aligned", power_of_two=True, arithmetic="by_rows"),
    "int8": QuantSpec("int8_token", arithmetic="separate"),
}
SPECS = {"llama": LLAMA, "gemma": GEMMA, "weightless": NormSpec(has_weight=False), "width": NormSpec(width=100),
         "fp32 sum": NormSpec(round_before_weight="none", output="input", sum="fp32")}  # fmt: skip


def operands(m: int = 5, n: int = 256, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n).to(dtype)


def given(quant: QuantSpec) -> torch.Tensor | None:
    return torch.tensor([0.02]) if quant.scheme == "fp8_static" else None


def call(x, residual, weight, quant, spec=LLAMA, eps=1e-5, both=False, scale=None, backend="auto"):  # type: ignore[no-untyped-def]
    scale = given(quant) if scale is None else scale
    rest = (weight, scale, quant.scheme, eps, *ops.spec_args(spec, backend), *quant_args(quant, both))
    return PLAIN_OP(x, *rest) if residual is None else FUSED_OP(x, residual, *rest)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_quantising_what_the_norm_gives(dtype: torch.dtype, quant: QuantSpec, spec: NormSpec) -> None:
    x, residual, weight = operands(dtype=dtype)
    weight = weight if spec.has_weight else None
    for both in (False, True):
        normed, total = ops.bind_fused_add_rms_norm(spec)(x, residual, weight, 1e-5)
        kept = residual.clone()
        rows, scales, second = call(x, kept, weight, quant, spec, both=both)
        assert torch.equal(kept, total)
        assert rows.is_contiguous()
        assert second.shape == (x.shape if both else (0,))
        assert not both or torch.equal(second, normed)
        if quant.value == "rounded":
            want, want_scales = quantise(normed, quant, given(quant))
            assert same(rows, want)
            assert torch.equal(scales, want_scales)
            again = call(total, None, weight, quant, spec, both=both)
            assert spec.sum == "fp32" or (same(again[0], rows) and torch.equal(again[1], scales))


def test_no_eps_is_that_of_fp32_and_no_rows_are_no_work() -> None:
    x, residual, weight = operands()
    quant = QUANTS["block"]
    wide = call(x * 0 + 1e-4, None, weight, quant, eps=None)
    assert not same(wide[0], call(x * 0 + 1e-4, None, weight, quant, eps=1e-5)[0])
    rows, scales, _ = call(x[:0], residual[:0], weight, quant)
    assert (rows.shape, scales.shape) == ((0, 256), (0, 2))


def test_more_dimensions_and_strides() -> None:
    quant = QUANTS["block"]
    x = torch.randn(2, 6, 512).to(BF16)[:, ::2, :256]
    weight = torch.randn(256).to(BF16)
    rows, scales, _ = call(x, None, weight, quant)
    flat_rows, flat_scales, _ = call(x.reshape(6, 256), None, weight, quant)
    assert same(rows.view(6, 256), flat_rows)
    assert scales.shape == (2, 3, 2)
    assert torch.equal(scales.reshape(6, 2), flat_scales)
    assert scales.stride() == (3, 1, 8)  # six rows, in columns of eight floats


def test_only_the_residual_counts_as_written() -> None:
    tensors = operands()
    before = [tensor._version for tensor in tensors]
    call(*tensors, QUANTS["token"])
    assert [tensor._version - old for tensor, old in zip(tensors, before, strict=True)] == [0, 1, 0]


@pytest.mark.parametrize(("name", "both"), list(product(QUANTS, (False, True))))
def test_a_graph_sees_the_shapes_dtypes_and_strides(name: str, both: bool) -> None:
    x, residual, weight = operands()
    quant = QUANTS[name]
    real = call(x, residual.clone(), weight, quant, both=both)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, residual, weight)]
        scale = given(quant)
        found = call(*fake, quant, both=both, scale=None if scale is None else mode.from_tensor(scale))
    for made, result in zip(found, real, strict=True):
        assert (made.shape, made.dtype, made.stride()) == (result.shape, result.dtype, result.stride())


def test_opcheck() -> None:
    x, residual, weight = operands()
    for quant in (QUANTS["static"], QUANTS["block"]):
        rest = (weight, given(quant), quant.scheme, 1e-5, *ops.spec_args(LLAMA), *quant_args(quant, True))
        torch.library.opcheck(FUSED_OP, (x, residual, *rest), test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(PLAIN_OP, (x, *rest), test_utils=("test_schema", "test_faketensor"))


def test_arguments_by_name_are_those_by_place() -> None:
    x, _, weight = operands()
    quant = QUANTS["block"]
    named = {"layout": quant.layout, "power_of_two": True, "arithmetic": "separate", "both": True}
    found = PLAIN_OP(x, weight, None, "fp8_block", 1e-5, **named)
    want = call(x, None, weight, quant, both=True)
    assert all(same(left, right) for left, right in zip(found, want, strict=True))


def test_a_compiled_graph_gives_the_same_bits() -> None:
    x, residual, weight = operands()

    def forward(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = residual + 0
        rows, scales, _ = call(x, total, weight, QUANTS["block"])
        return rows, scales, total

    found = torch.compile(forward, backend="aot_eager", fullgraph=True)(x, residual)
    assert all(same(left, right) for left, right in zip(found, forward(x, residual), strict=True))


def test_what_is_refused_says_what_came_and_what_to_do() -> None:
    x, residual, weight = operands()
    quant = QUANTS["static"]
    token = QuantSpec("fp8_token")
    for arguments, named, message in (
        (
            (x, residual, weight),
            {"quant": quant, "scale": torch.ones(2)},
            r"given=\(2,\).*the scale: fp32, one element",
        ),
        ((x, residual, weight), {"quant": quant, "scale": torch.ones(1).half()}, "float16.*the scale: fp32"),
        ((x, residual, weight), {"quant": QUANTS["int8"], "scale": torch.ones(1)}, "for int8_token.*None"),
        ((x, residual[:3], weight), {"quant": token}, "residual of shape"),
        ((x, residual[:1].expand(5, 256), weight), {"quant": token}, "expanded with strides"),
        ((x, x, weight), {"quant": token}, "overlapping x"),
        ((x, residual, residual[0]), {"quant": token}, "overlapping weight"),
        ((x, residual, weight), {"quant": token, "spec": NormSpec(group=64)}, "one rstd a row"),
        ((x.long(), None, weight), {"quant": token}, "x of dtype torch.int64"),
    ):
        with pytest.raises(UnsupportedInput, match=message):
            call(*arguments, **named)
    rest = (weight, None, "fp8_static", 1e-5)
    with pytest.raises(UnsupportedInput, match="given=None for fp8_static"):
        FUSED_OP(x, residual, *rest)
    with pytest.raises(ValueError, match=r"QuantSpec.scheme: got 'fp4'"):
        FUSED_OP(x, residual, weight, None, "fp4", 1e-5)
    with pytest.raises(KernelBuildError, match="not a CUDA device"):
        call(x, residual, weight, token, backend="cuda")


def test_kernels_have_the_trees_of_the_norms() -> None:
    for fused, n, arch in product((False, True), (100, 128, 1000, 4096, 7168, 16384, 32768), (89, 90, 100, 120)):
        configs = schedules(kernel.norm_of(fused), BF16, n, arch)
        made = kernel.schedules(schedules(kernel.OP, BF16, n, arch), configs, QUANTS["token"], False, False)
        assert {config.tree for config in made} == {config.tree for config in configs}
        assert {config.source for config in made} == {kernel.SOURCE}
        assert (made[0].m[0], made[-1].m[1]) == (1, configs[-1].m[1])


@pytest.mark.parametrize(
    ("quant", "n", "arch", "why"),
    [
        (QUANTS["token"], 4096, 90, ""),
        (QUANTS["token"], 4096, 86, "fp8 needs sm_89"),
        (QUANTS["int8"], 4096, 86, ""),
        (QUANTS["token"], 999, 90, ""),
        (QUANTS["block"], 1004, 90, ""),
        (QUANTS["block"], 999, 90, "a multiple of 4"),
        (QUANTS["int8"], 131072, 86, "longer than the registers"),
        (QUANTS["token"], 1 << 20, 90, "needs N <="),
    ],
)
def test_which_rows_have_a_kernel(quant: QuantSpec, n: int, arch: int, why: str) -> None:
    for fused in (False, True):
        configs = schedules(kernel.norm_of(fused), BF16, n, arch)
        found = kernel.cannot_serve(fused, quant, BF16, n, arch, configs)
        assert why in found
        assert bool(why) == bool(found)


def test_specs_that_differ_in_a_kernel_differ_in_its_macros() -> None:
    specs = [QuantSpec(scheme, value) for scheme in ("fp8_token", "fp8_block") for value in ("fp32", "rounded")]  # type: ignore[arg-type]
    specs += [QuantSpec("fp8_block", arithmetic="separate"), QuantSpec("fp8_block", power_of_two=True)]
    made = [tuple(kernel.defines(spec, False, False).items()) for spec in (*specs, QuantSpec("int8_token"))]
    assert len(set(made)) == len(made)
    assert kernel.defines(QuantSpec("fp8_token"), True, False)["HAS_BOUND"] == 1
    assert kernel.defines(QUANTS["static"], True, False)["HAS_BOUND"] == 0
