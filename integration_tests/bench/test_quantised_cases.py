"""Rows that are written quantised, as the benchmark checks and counts them, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rmsnorm_patch.bench import cases, providers
from rmsnorm_patch.bench.quantised import QUANTISED, SCALE
from rmsnorm_patch.bench.suites import SUITES
from rmsnorm_patch.numerics.quantisation import QuantSpec, rms_norm_quantised

BF16 = torch.bfloat16


def case_of(op: str, m: int = 5, n: int = 256, mode: str = "cold") -> cases.Case:
    return cases.Case(op, mode, BF16, m, n)


def right(op: str, value: str = "rounded") -> Any:
    """The definition, with the call of a provider."""
    written = QUANTISED[op]
    quant = QuantSpec(written.quant.scheme, value, layout=written.quant.layout)  # type: ignore[arg-type]
    given = torch.tensor([SCALE]) if quant.scheme == "fp8_static" else None

    def call(x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, ...]:
        rows, scales, normed, total = rms_norm_quantised(x, residual, weight, case_of(op).spec, quant, eps, given)
        return rows, scales, normed if written.both else None, total

    return call


def said(op: str, call: Any) -> str:
    return cases.check(providers.Provider("under test", op, call), case_of(op))


@pytest.mark.parametrize("value", ["rounded", "fp32"])
@pytest.mark.parametrize("op", QUANTISED)
def test_right_rows_are_let_through(op: str, value: str) -> None:
    assert said(op, right(op, value)) == ""


WRONG = {
    "rows a unit off": (lambda r, s, n, t: (r.view(torch.uint8).add(1).view(r.dtype), s, n, t), "half a step"),
    "other columns": (lambda r, s, n, t: (r.view(torch.uint8).flip(-1).view(r.dtype), s, n, t), "half a step"),
    "dtype": (lambda r, s, n, t: (r.float(), s, n, t), "torch.float32"),
    "sum": (lambda r, s, n, t: (r, s, n, 2 * t), "residual sum differs"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("op", QUANTISED)
def test_wrong_rows_are_not_timed(op: str, what: str) -> None:
    change, why = WRONG[what]
    assert why in said(op, lambda *given: change(*right(op)(*given)))


@pytest.mark.parametrize("op", [op for op, written in QUANTISED.items() if written.quant.scheme != "fp8_static"])
def test_wrong_scales_are_not_timed(op: str) -> None:
    assert "error of a scale" in said(
        op, lambda *given: (lambda r, s, n, t: (r, s.mul_(1.02), n, t))(*right(op)(*given))
    )
    assert "scales (" in said(op, lambda *given: (lambda r, s, n, t: (r, s[:2], n, t))(*right(op)(*given)))


def test_a_bias_that_hides_in_the_step_is_seen() -> None:
    """Each number may be half a step away, but not all of them to one side."""
    op = next(iter(QUANTISED))

    assert "all rows together" in said(op, lambda x, r, weight, eps: right(op)(x, r, (weight.float() * 1.01), eps))


def test_unquantised_rows_beside_them_are_checked() -> None:
    op = next(op for op, written in QUANTISED.items() if written.both)
    assert "unquantised rows differ" in said(
        op, lambda *given: (lambda r, s, n, t: (r, s, 1.1 * n, t))(*right(op)(*given))
    )


@pytest.mark.parametrize("op", QUANTISED)
def test_our_triton_kernel_and_what_is_compiled_are_right(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = case_of(op)
    found, missing = providers.load(op, case.spec, wanted=("ours_triton", "inductor"))
    assert missing == {}
    layouts = QUANTISED[op].quant.layout
    names = ["ours_triton", "inductor"] if layouts == "row_major" else ["ours_triton"]
    assert sorted(provider.name for provider in found) == sorted(names)
    with torch.compiler.set_stance("force_eager"):
        assert [cases.check(provider, case) for provider in found] == [""] * len(found)


def test_bytes_are_those_of_sums_rows_and_scales() -> None:
    m, n = 4096, 7168
    counted = {op.removeprefix("fused_add_rms_norm_"): case_of(op, m, n).bytes - 6 * m * n for op in QUANTISED}
    assert counted == {
        "fp8_static": m * n,
        "fp8_token": m * n + 4 * m,
        "fp8_block": m * n + 4 * m * 56,
        "fp8_block_columns": m * n + 4 * m * 56,
        "fp8_block_both": 3 * m * n + 4 * m * 56,
        "int8_token": m * n + 4 * m,
    }


def test_a_chain_depends_on_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch adds x to the sum of the one before."""
    op = next(iter(QUANTISED))
    case, taken = case_of(op, 2, 64, "chain"), []
    monkeypatch.setattr(cases.timing, "replay", lambda launches, count, replays: taken.append((launches(), count)))
    cases.measure(providers.Provider("under test", op, right(op)), case, 5)
    ((x, total), count) = taken[0]
    first, residual = cases.operands(case, 1)[0]
    assert torch.equal(x, first)
    for _ in range(count):
        residual = residual + first
    assert torch.equal(total, residual)


def test_the_suites_hold_every_op() -> None:
    held = {
        (t.case.op, t.case.mode, t.case.m, t.case.n) for name in ("quantised", "quantised_decode") for t in SUITES[name]
    }
    cold = {(op, "cold", m, n) for op in QUANTISED for m in (4096, 16384) for n in (4096, 7168, 8192)}
    chain = {(op, "chain", m, n) for op in QUANTISED for m in (1, 16, 64, 256) for n in (4096, 8192)}
    assert held == cold | chain
