"""The ops of an add behind a norm, without a GPU: their results, what they refuse, what graphs see of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda.schedules import schedules
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.norm_add import kernel, portable
from rmsnorm_patch.fused.norm_add.op import NORM_ADD, NORM_ADD_NORM, bind, bind_norm_add, bind_norm_add_norm
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec

ADD: Any = getattr(torch.ops.rmsnorm_patch, NORM_ADD).default
ADD_NORM: Any = getattr(torch.ops.rmsnorm_patch, NORM_ADD_NORM).default
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS, NEXT_EPS = 1e-5, 1e-3
SPECS = {"llama": LLAMA, "gemma": GEMMA, "one rounding": FP32_WEIGHT_MULTIPLY, "width": NormSpec(width=100),
         "offset in the weight's dtype": NormSpec(weight_offset="weight_dtype"),
         "weightless": NormSpec(has_weight=False), "groups": NormSpec(group=64),
         "fp32 sum": NormSpec(round_before_weight="none", output="input", sum="fp32")}  # fmt: skip


def operands(n: int = 256, dtype: torch.dtype = BF16, m: int = 5) -> list[torch.Tensor]:
    """x, residual, weight, next weight."""
    return [3 * torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype), *torch.randn(2, n).to(dtype)]


def separate(x, residual, weight, next_weight, spec, backend):  # type: ignore[no-untyped-def]
    """(normed, sum) by the norms' own ops."""
    normed = ops.bind_rms_norm(spec, backend)(x, weight, EPS)
    return ops.bind_fused_add_rms_norm(spec, backend)(normed, residual, next_weight, NEXT_EPS)


def check_bits(n: int, dtype: torch.dtype, spec: NormSpec, backend: Any) -> str:
    x, residual, weight, next_weight = operands(n, dtype)
    if not spec.has_weight:
        weight = next_weight = None
    bound = bind_norm_add_norm(spec, backend)
    normed, total = bound(x, residual, weight, EPS, next_weight, NEXT_EPS)
    want, want_total = separate(x, residual, weight, next_weight, spec, backend)
    assert torch.equal(total, want_total)
    assert torch.equal(normed, want)
    assert torch.equal(bind_norm_add(spec, backend)(x, residual, weight, EPS), want_total)
    assert normed.is_contiguous()
    assert total.is_contiguous()
    return bound.why_apart(x, weight)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_bits_of_the_separate_ops(dtype: torch.dtype, spec: NormSpec) -> None:
    assert check_bits(256, dtype, spec, "auto") == ""


@pytest.mark.parametrize("spec", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_each_rounding_is_the_models(spec: NormSpec) -> None:
    """Against fp64 of what the step before has rounded: nothing is carried on unrounded."""
    x, residual, weight, next_weight = operands()
    normed, total = bind_norm_add_norm(spec)(x, residual, weight, EPS, next_weight, NEXT_EPS)
    inner = reference.rms_norm_fp64(x, weight, spec, EPS)
    step = torch.finfo(BF16).eps
    assert ((total.double() - residual.double() - inner).abs() <= step * (inner.abs() + total.abs())).all()
    exact = reference.rms_norm_fp64(total, next_weight, spec, NEXT_EPS)
    assert ((normed.double() - exact).abs() <= step * exact.abs() * 1.5).all()
    unrounded = reference.rms_norm(x.float(), weight.float(), spec, EPS) + residual.float()
    assert not torch.equal(unrounded.to(BF16), total)


@pytest.mark.parametrize(
    "spec", [LLAMA, GEMMA, *(SPECS[name] for name in ("width", "weightless", "fp32 sum"))], ids=str
)
@pytest.mark.parametrize(
    ("n", "apart"),
    [
        (128, ""),
        (333, ""),
        (4608, ""),
        (3584, "the norms' schedules differ"),
    ],
)
def test_interpreted(monkeypatch: pytest.MonkeyPatch, n: int, apart: str, spec: NormSpec) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    why = check_bits(n, BF16, spec, "triton")
    assert why.startswith(apart) if apart else why == ""
    long = torch.empty(1, 70000, dtype=BF16)
    assert portable.cannot_serve(spec, long, None) == "rows of 70000 do not stay in registers"
    if n == 128:
        assert check_bits(n, FP32, spec, "triton") == ""


@pytest.mark.parametrize("width", [1000, 3000, 4500])
def test_interpreted_norms_over_a_part_of_a_row(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends in each of three chunks."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert check_bits(4608, BF16, NormSpec(width=width), "triton") == ""


def test_more_dimensions_strides_and_no_rows() -> None:
    x, residual, weight, next_weight = operands()
    wide = torch.randn(2, 6, 512).to(BF16)[:, ::2, :256]
    for backend in ("auto", "triton"):
        if backend == "triton":
            pytest.importorskip("triton")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            bound = bind_norm_add_norm(LLAMA, backend)
            normed, total = bound(wide, wide + 1, weight, EPS, next_weight, NEXT_EPS)
            flat = bound(wide.reshape(6, 256), wide.reshape(6, 256) + 1, weight, EPS, next_weight, NEXT_EPS)
            assert (normed.shape, total.shape) == (wide.shape, wide.shape)
            assert torch.equal(normed.reshape(6, 256), flat[0])
            assert torch.equal(total.reshape(6, 256), flat[1])
            none = bound(x[:0], residual[:0], weight, EPS, next_weight, NEXT_EPS)
            assert [each.shape for each in none] == [(0, 256), (0, 256)]


def test_no_eps_is_that_of_fp32() -> None:
    x, _, weight, next_weight = operands()
    small = x * 0 + 1e-4
    for eps, next_eps in ((None, EPS), (EPS, None)):
        found = bind_norm_add_norm(LLAMA)(small, small, weight, eps, next_weight, next_eps)
        named = [torch.finfo(FP32).eps if each is None else each for each in (eps, next_eps)]
        again = bind_norm_add_norm(LLAMA)(small, small, weight, named[0], next_weight, named[1])
        assert torch.equal(found[0], again[0])
        assert torch.equal(found[1], again[1])


def test_what_is_refused() -> None:
    x, residual, weight, next_weight = operands()
    bound = bind_norm_add_norm(LLAMA)
    for name, given in {
        "equal dtypes": (x, residual.float(), weight, EPS, next_weight, EPS),
        "equal shapes": (x, residual[:1], weight, EPS, next_weight, EPS),
        "x's dtype": (x, residual, weight.float(), EPS, next_weight.float(), EPS),
        "one dtype": (x, residual, weight, EPS, next_weight.float(), EPS),
        "a weight of shape": (x, residual, weight, EPS, next_weight[:1], EPS),
    }.items():
        with pytest.raises(UnsupportedInput, match=name) as error:
            bound(*given)
        assert NORM_ADD_NORM in str(error.value)
    with pytest.raises(ValueError, match="backend"):
        bind(NORM_ADD, LLAMA, "cpu")  # type: ignore[arg-type]


def test_one_object_for_a_variant() -> None:
    assert bind_norm_add(LLAMA) is bind_norm_add(NormSpec(eps=0.5))
    assert bind_norm_add(LLAMA) is not bind_norm_add_norm(LLAMA)
    assert bind_norm_add(LLAMA) is not bind_norm_add(GEMMA)


def test_graphs_see_the_shapes_and_opcheck_passes() -> None:
    x, residual, weight, next_weight = operands()
    spec = ops.spec_args(GEMMA)
    real = ADD_NORM(x, residual, weight, EPS, next_weight, NEXT_EPS, *spec)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) for each in (x, residual, weight, next_weight)]
        found = ADD_NORM(fake[0], fake[1], fake[2], EPS, fake[3], NEXT_EPS, *spec)
        (total,) = [ADD(*fake[:3], EPS, *spec)]
    for made, result in zip((*found, total), (*real, real[1]), strict=True):
        assert (made.shape, made.dtype, made.stride()) == (result.shape, result.dtype, result.stride())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ADD, (x, residual, weight, EPS, *spec), test_utils=tests)
    torch.library.opcheck(ADD_NORM, (x, residual, weight, EPS, next_weight, NEXT_EPS, *spec), test_utils=tests)
    named = ADD(x, residual, weight, EPS, **{"weight_offset": "fp32", "round_before_weight": "none", "output": "input"})
    assert torch.equal(named, real[1])


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_schedules_have_the_trees_of_both_norms(arch: int, dtype: torch.dtype) -> None:
    """At every length that the kernel serves, so that it never has other bits than the norms."""
    served = 0
    for row_bytes in range(16, 33000, 16):
        n = row_bytes // dtype.itemsize
        own = schedules(kernel.OP, dtype, n, arch)
        if own:
            served += 1
            norms = [schedules(op, dtype, n, arch) for op in ("rms_norm", "fused_add_rms_norm")]
            assert kernel.unlike(own, *norms) == "", n
            assert all(config.threads <= 1024 for config in own)
    assert served == 2048
    assert not schedules(kernel.OP, dtype, 32784 // dtype.itemsize, arch)
    assert "lanes-4" in kernel.unlike(schedules(kernel.OP, BF16, 4096, 90), schedules("rms_norm", FP32, 4096, 90))
