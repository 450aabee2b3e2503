"""What fuzzes the kernels passes right ones, in the interpreter, and sees each kind of wrong one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from rmsnorm_patch import ops


@pytest.fixture(scope="module")
def cases(script) -> ModuleType:
    return script("benchlib.kernel_cases")


def drawn(cases: ModuleType, count: int) -> list:
    short = [v for v in cases.variants(count, 1) if v.n <= 5200]
    return [replace(case := cases.drawn(v, 1), m=min(case.m, 3)) for v in short]


def test_variants_follow_from_the_seed_and_reach_every_axis(cases):
    found = cases.variants(300, 5)
    assert found == cases.variants(300, 5)
    assert len(set(found)) == 300
    assert {v.op for v in found} == set(cases.OPS)
    assert {v.spec for v in found} == set(cases.SPECS)
    assert {v.layout for v in found} == set(cases.LAYOUTS)


def test_right_kernels_pass(cases, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = drawn(cases, 24)
    assert {case.variant.op for case in found} == set(cases.OPS)
    assert [fault for case in found if (fault := cases.fault_in(case, "triton", "cpu"))] == []


def wrong_eps(op: Callable, *operands: object) -> object:
    return op(*operands[:-1], operands[-1] * 40)


def sum_not_written(op: Callable, *operands: object) -> object:
    kept = operands[1].clone()
    op(*operands)
    operands[1].copy_(kept)
    return None


def writes_behind_its_row(op: Callable, *operands: object) -> object:
    op(*operands)
    x = operands[0]
    x.as_strided((1,), (1,), x.storage_offset() + x.shape[-1])[0] = 0
    return None


def writes_an_operand(op: Callable, *operands: object) -> object:
    result = op(*operands)
    operands[0][0, 0] += 1
    return result


def last_column_unwritten(op: Callable, *operands: object) -> object:
    result = op(*operands)
    result[0][..., -1] = float("nan")
    return result


@pytest.mark.parametrize(
    ("op", "wrong", "said"),
    [
        ("fused_add_rms_norm", wrong_eps, "rms error"),
        ("fused_add_rms_norm_", sum_not_written, "the sum is not"),
        ("fused_add_rms_norm_", writes_behind_its_row, "outside"),
        ("fused_add_rms_norm", writes_an_operand, "an operand was written"),
        ("fused_add_rms_norm", last_column_unwritten, "NaN"),
    ],
)
def test_wrong_ones_are_seen(cases, op, wrong, said):
    variant = cases.Variant(op, cases.LLAMA, torch.bfloat16, torch.bfloat16, 96, "padded")
    case = cases.Case(variant, 5, 1e-6, 1e-3, "", 1)

    def bind(name: str, spec: object, backend: str) -> Callable:
        return lambda *operands: wrong(ops.bind(name, spec, "reference"), *operands)

    assert cases.fault_in(case, "reference", "cpu") == ""
    assert said in cases.fault_in(case, "reference", "cpu", bind)
