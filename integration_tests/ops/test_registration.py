"""`torch.ops.rmsnorm_patch`: schemas, fake implementations, mutation, decomposition."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rmsnorm_patch import ops
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.contract import FUNCTIONAL, PLAIN_OPS
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec

FORMS = pytest.mark.parametrize("form", ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.slow])])
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")
NAMES = list(PLAIN_OPS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPECS = {
    "llama": LLAMA,
    "one_rounding": FP32_WEIGHT_MULTIPLY,
    "gemma": GEMMA,
    "t5": T5,
    "offset_in_weight_dtype": replace(LLAMA, weight_offset="weight_dtype"),
    "fp32_sum": replace(LLAMA, sum="fp32"),
    "weightless": replace(LLAMA, has_weight=False),
    "width": replace(LLAMA, width=40),
    "grouped": replace(LLAMA, group=32),
}


def op_of(name: str) -> Any:
    return getattr(torch.ops.rmsnorm_patch, name).default


def arguments(name: str, spec: NormSpec, x: torch.Tensor, weight: torch.Tensor | None) -> tuple[Any, ...]:
    others = (torch.randn(x.shape).to(x.dtype) for _ in range(PLAIN_OPS[name].operands - 1))
    return (x, *others, weight, 1e-6, *ops.spec_args(spec))


def as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


@FORMS
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, spec: NormSpec, form: str) -> None:
    """The short form: one of the dtypes and shapes, drawn for each op and spec, goes through AOTAutograd."""
    cases = [
        (dtype, weight_dtype, shape)
        for dtype in DTYPES
        for weight_dtype in dict.fromkeys((dtype, torch.float32))
        if not PLAIN_OPS[name].in_place or spec.output_dtype(dtype, weight_dtype) == dtype
        for shape in ((3, 2, 64), (0, 64))
    ]
    traced = cases if form == "long" else random.Random(f"{name} {spec}").sample(cases, 1)
    for dtype, weight_dtype, shape in cases:
        weight = torch.randn(64, dtype=weight_dtype) if spec.has_weight else None
        given = arguments(name, spec, torch.randn(shape).to(dtype), weight)
        utils = UNTRACED + ("test_aot_dispatch_dynamic",) * ((dtype, weight_dtype, shape) in traced)
        results = torch.library.opcheck(op_of(name), given, test_utils=utils)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_fake_results_have_the_strides_of_the_real_ones(name: str) -> None:
    """Contiguous, whatever the inputs': a compiled graph that guessed otherwise would read the wrong elements."""
    for make in (
        lambda: torch.randn(4, 64),
        lambda: torch.randn(64, 4).t(),
        lambda: torch.randn(5, 3, 64).transpose(0, 1),
        lambda: torch.randn(4, 200)[:, 8:72],
        lambda: torch.randn(1, 64).expand(4, 64),
    ):
        x, weight = make(), torch.randn(64)
        args = arguments(name, LLAMA, x, weight)
        real = op_of(name)(*args)
        with FakeTensorMode() as mode:
            fake = op_of(name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for mine, other in zip(as_tuple(real), as_tuple(fake), strict=True):
            assert mine.is_contiguous()
            assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_ops_on_cpu_are_the_reference_bit_for_bit(spec: NormSpec) -> None:
    x, residual, weight = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    weight = weight if spec.has_weight else None
    args = ops.spec_args(spec)
    expected = reference.fused_add_rms_norm(x, residual, weight, spec, 1e-5)
    found = torch.ops.rmsnorm_patch.fused_add_rms_norm(x, residual, weight, 1e-5, *args)
    alone = torch.ops.rmsnorm_patch.rms_norm(x, weight, 1e-5, *args)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(alone, reference.rms_norm(x, weight, spec, 1e-5))
    before = x._version, residual._version
    if expected[0].dtype == x.dtype:
        torch.ops.rmsnorm_patch.fused_add_rms_norm_(x, residual, weight, 1e-5, *args)
        assert torch.equal(x, expected[0])
        assert torch.equal(residual, expected[1])
        assert x._version > before[0]
        assert residual._version > before[1]


def test_functional_ops_leave_their_inputs_alone_even_when_they_are_one_tensor() -> None:
    x, weight = torch.randn(5, 64), torch.ones(64)
    before, version = x.clone(), x._version
    normed, total = torch.ops.rmsnorm_patch.fused_add_rms_norm(x, x, weight, 1e-6)
    assert torch.equal(x, before)
    assert x._version == version
    assert torch.equal(total, x + x)
    assert len({x.data_ptr(), normed.data_ptr(), total.data_ptr(), weight.data_ptr()}) == 4


def test_spec_arguments_by_name_and_by_default() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    found = torch.ops.rmsnorm_patch.rms_norm(x, weight, 1e-6, weight_offset="fp32", width=40)
    assert torch.equal(found, reference.rms_norm(x, weight, NormSpec(weight_offset="fp32", width=40), 1e-6))
    assert torch.equal(torch.ops.rmsnorm_patch.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, LLAMA, 1e-6))


def test_eps_none_is_what_torch_uses() -> None:
    x = torch.randn(5, 64) * 1e-3
    found = torch.ops.rmsnorm_patch.rms_norm(x, None, None)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, (64,)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_decomposition_is_the_reference_and_leaves_no_op(name: str, spec: NormSpec) -> None:
    x, weight = torch.randn(4, 3, 64).transpose(0, 1).bfloat16(), torch.randn(64).bfloat16()
    args = arguments(name, spec, x, weight if spec.has_weight else None)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def call(*given: torch.Tensor) -> Any:
        left = iter(given)
        return op_of(name)(*(next(left) if isinstance(a, torch.Tensor) else a for a in args))

    graph = make_fx(call, decomposition_table=ops.decompositions(), tracing_mode="symbolic")(*tensors)
    assert not [node for node in graph.graph.nodes if "rmsnorm_patch" in str(node.target)]
    for mine, other in zip(as_tuple(graph(*tensors)), as_tuple(call(*tensors)), strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()


def test_symbolic_rows_stay_symbolic() -> None:
    def call(x: torch.Tensor, residual: torch.Tensor) -> Any:
        return torch.ops.rmsnorm_patch.fused_add_rms_norm(x, residual, None, 1e-6)

    graph = make_fx(call, tracing_mode="symbolic")(torch.randn(5, 64), torch.randn(5, 64))
    assert any(str(node.target) == "rmsnorm_patch.fused_add_rms_norm.default" for node in graph.graph.nodes)
    for rows in (1, 5, 9):
        x, residual = torch.randn(rows, 64), torch.randn(rows, 64)
        assert torch.equal(graph(x, residual)[0], call(x, residual)[0])


def test_functionalised_in_place_op_gives_the_same_values() -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)

    def call(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = x.clone(), residual.clone()
        torch.ops.rmsnorm_patch.fused_add_rms_norm_(x, residual, weight, 1e-6)
        return x, residual

    compiled: Callable[..., Any] = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, other in zip(compiled(x, residual), call(x, residual), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", NAMES)
def test_every_device_that_has_kernels_is_registered(name: str) -> None:
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rmsnorm_patch::{name}", key)
