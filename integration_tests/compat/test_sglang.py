"""SGLang's fused_add_rmsnorm: signature, checks, and what it leaves in its two tensors."""

from __future__ import annotations

import inspect

import pytest
import torch

from rmsnorm_patch import UnsupportedInput
from rmsnorm_patch.compat.sglang import fused_add_rmsnorm
from rmsnorm_patch.scan.probe import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def definition(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """(normed, sum) as SGLang's own layer writes it: fp32 throughout, each result rounded once."""
    total = x.to(torch.float32) + residual.to(torch.float32)
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype), total.to(x.dtype)


def operands(dtype: torch.dtype, rows: int = 5, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(2))
    return x, residual, torch.rand(columns, generator=generator).to(dtype)


def test_the_signature_is_sglang_s() -> None:
    parameters = inspect.signature(fused_add_rmsnorm).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("input", inspect.Parameter.empty),
        ("residual", inspect.Parameter.empty),
        ("weight", inspect.Parameter.empty),
        ("eps", 1e-6),
        ("enable_pdl", None),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("enable_pdl", [None, True, False])
def test_it_writes_what_the_definition_gives(dtype: torch.dtype, enable_pdl: bool | None) -> None:
    x, residual, weight = operands(dtype)
    normed, total = definition(x, residual, weight, 1e-5)
    places = x.data_ptr(), residual.data_ptr()
    assert fused_add_rmsnorm(x, residual, weight, 1e-5, enable_pdl) is None
    assert (x.data_ptr(), residual.data_ptr()) == places
    assert same_bits(residual, total)
    assert same_bits(x, normed)


def test_rows_may_stand_apart_and_no_row_is_fine() -> None:
    x, residual, weight = operands(torch.bfloat16, rows=6)
    wide = torch.zeros(6, 200, dtype=torch.bfloat16)
    wide[:, 40:136] = x
    expected = definition(x, residual, weight, 1e-6)
    fused_add_rmsnorm(wide[:, 40:136], residual, weight)
    assert same_bits(wide[:, 40:136], expected[0])
    assert not wide[:, :40].any()
    fused_add_rmsnorm(x[:0], residual[:0], weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, r, w: (x[None], r, w), "input of shape"),
        (lambda x, r, w: (x, r[0], w), "residual of shape"),
        (lambda x, r, w: (x, r, w[None]), "weight of shape"),
        (lambda x, r, w: (x, r[:3], w), "residual of shape"),
        (lambda x, r, w: (x, r.float(), w), "residual of dtype"),
        (lambda x, r, w: (x, r, w.float()), "weight of torch.float32"),
        (lambda x, r, w: (x, r, w[:-1]), "weight of shape"),
        (lambda x, r, w: (x.t().contiguous().t(), r, w), "input with strides"),
        (lambda x, r, w: (x, x, w), "overlapping"),
        (lambda x, r, w: (x[:1].expand(5, -1), r, w), "expanded"),
        (lambda x, r, w: (x.long(), r.long(), w.long()), "x of dtype"),
    ],
)
def test_anything_else_is_refused_and_nothing_written(change, words: str) -> None:
    x, residual, weight = operands(torch.bfloat16)
    given = change(x, residual, weight)
    before = [tensor.clone() for tensor in given]
    with pytest.raises(UnsupportedInput, match=words) as error:
        fused_add_rmsnorm(*given)
    assert error.value.next_step
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
