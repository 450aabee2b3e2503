"""Which silu_and_mul of a graph writes quantised rows, in each form that vLLM leaves; needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised_graphs import (
    C,
    Made,
    block_op,
    call_as_they_are,
    int8_op,
    native,
    native_block,
    native_silu,
    same,
    silu_block_op,
    silu_op,
    silu_static_op,
    static_op,
    token_op,
)

from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.silu import Silu, silu_and_mul_quantised
from rmsnorm_patch.vllm_plugin import trial
from rmsnorm_patch.vllm_plugin.passes import silu_quantised

Reader = Callable[[Any, Any], Any]
QUANTISATIONS: dict[str, tuple[Reader, QuantSpec]] = {
    "static op": (static_op, QuantSpec("fp8_static", arithmetic="separate")),
    "token op": (lambda rows, scale: token_op(rows), QuantSpec("fp8_token", arithmetic="separate")),
    "bounded op": (token_op, QuantSpec("fp8_token", arithmetic="separate")),
    "int8 op": (lambda rows, scale: int8_op(rows), QuantSpec("int8_token", arithmetic="separate")),
    "block op": (lambda rows, scale: block_op(rows), QuantSpec("fp8_block", arithmetic="separate")),
    "block op, TMA": (
        lambda rows, scale: block_op(rows, "tma_aligned", True),
        QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True),
    ),
    "static arithmetic": (lambda rows, scale: native(rows, scale)[:1], QuantSpec("fp8_static", "fp32", "native")),
    "token arithmetic": (lambda rows, scale: native(rows), QuantSpec("fp8_token", "fp32", "native")),
    "block arithmetic": (lambda rows, scale: native_block(rows), QuantSpec("fp8_block", "fp32", "native")),
    "block arithmetic, columns": (
        lambda rows, scale: native_block(rows, True),
        QuantSpec("fp8_block", "fp32", "native", "column_major"),
    ),
}
PRODUCTS: dict[str, tuple[Callable[[Any], Any], Silu]] = {
    "arithmetic": (native_silu, "fp32"),
    "op": (silu_op, "rounded"),
}


def halves(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """As a product writes them: an op that nothing of is arithmetic."""
    return torch.cat([x * 3, residual], -1)


def made(read: Reader, product: Callable[[Any], Any] = silu_op) -> Made:
    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        return read(product(halves(x, residual)), scale)

    return Made(forward)


def wanted(graph: Made, silu: Silu, quant: QuantSpec, bounded: bool) -> list[torch.Tensor]:
    x, residual, _, scale = graph.copies()
    given = scale if quant.scheme == "fp8_static" or bounded else None
    rows, scales = silu_and_mul_quantised(halves(x, residual), silu, quant, given)
    return [rows] if quant.scheme == "fp8_static" else [rows, scales]


WRITTEN = ("static op", "token arithmetic", "block op, TMA")
"""Whose ops are also tried as calls that write, as vLLM leaves some."""


@pytest.mark.parametrize(
    ("name", "as_they_are"), [(name, form) for name in QUANTISATIONS for form in (False, True)[: 1 + (name in WRITTEN)]]
)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_and_its_quantisation_become_one_op(name: str, product: str, as_they_are: bool) -> None:
    """With the bits of the definition for this form, and, where each step is an op, those of before."""
    (read, quant), (multiply, silu) = QUANTISATIONS[name], PRODUCTS[product]
    graph = made(read, multiply)
    if as_they_are:
        call_as_they_are(graph)
    before = graph.run()
    assert silu_quantised.fuse(graph.graph) == 1
    found = graph.run()
    assert same(found, wanted(graph, silu, quant, name == "bounded op"))
    assert product == "arithmetic" or quant.value == "fp32" or same(found, before)
    (op,) = graph.quantised()
    assert (op["scheme"], op["silu"], op["value"]) == (quant.scheme, silu, quant.value)
    left = [target for target in graph.targets() if target.startswith("_C.")]
    assert left == []
    assert not any(part in target for target in graph.targets() for part in ("exp", "amax", "empty"))


@pytest.mark.parametrize("as_they_are", [False, True], ids=["functional", "written"])
@pytest.mark.parametrize(
    ("read", "silu", "quant"),
    [
        (silu_static_op, "rounded", QuantSpec("fp8_static")),
        (lambda x, scale: silu_block_op(x), "product", QuantSpec("fp8_block", "fp32")),
        (lambda x, scale: silu_block_op(x, True), "product", QuantSpec("fp8_block", "fp32", layout="column_major")),
    ],
    ids=["static", "block", "block, columns"],
)
def test_an_op_of_both_becomes_ours_to_the_bit(read: Reader, silu: Silu, quant: QuantSpec, as_they_are: bool) -> None:
    graph = made(read, lambda x: x)
    if as_they_are:
        call_as_they_are(graph)
    before = graph.run()
    assert silu_quantised.fuse(graph.graph) == 1
    assert same(graph.run(), before)
    (op,) = graph.quantised()
    assert (op["scheme"], op["silu"], op["value"], op["layout"]) == (quant.scheme, silu, quant.value, quant.layout)
    assert not any(target.startswith("_C.") for target in graph.targets())


def plain_too(rows: Any, scale: Any) -> Any:
    return *token_op(rows), rows + 1


def two_schemes(rows: Any, scale: Any) -> Any:
    return *token_op(rows), *static_op(rows, scale)


def given_later(rows: Any, scale: Any) -> Any:
    return static_op(rows, rows.float().abs().amax().reshape(1))


def packed(rows: Any, scale: Any) -> Any:
    result, scales = torch.empty(rows.shape, dtype=torch.uint8), torch.empty(1)
    C.scaled_fp4_quant(result, rows, scales)
    return result, scales


@pytest.mark.parametrize(
    ("read", "product", "why"),
    [
        (plain_too, silu_op, "its rows have other readers too"),
        (plain_too, native_silu, "its rows have other readers too"),
        (two_schemes, silu_op, "its rows have other readers too"),
        (given_later, silu_op, "its rows have other readers too"),
        (packed, silu_op, "it is none that our kernels know"),
        (lambda rows, scale: (rows,), native_silu, ""),
        (lambda x, scale: silu_block_op(x, size=64), lambda x: x, ""),
        (lambda x, scale: silu_block_op(x, bound=scale), lambda x: x, ""),
        (lambda x, scale: silu_static_op(x, scale.expand(4)), lambda x: x, ""),
        (lambda rows, scale: token_op(rows), lambda x: torch.sigmoid(x[:, :256]) * x[:, 256:], ""),
        (lambda rows, scale: token_op(rows), lambda x: torch.nn.functional.silu(x[:, 256:]) * x[:, :256], ""),
        (lambda rows, scale: token_op(rows), lambda x: torch.nn.functional.silu(x[:, :256]) * x[:, :256], ""),
    ],
)
def test_what_is_left_alone_stays_as_it_is(
    read: Reader, product: Callable[[Any], Any], why: str, told: Callable[[], list[str]]
) -> None:
    graph = made(read, product)
    before, targets = graph.run(), graph.targets()
    assert silu_quantised.fuse(graph.graph) == 0
    assert graph.targets() == targets
    assert why == "" or same(graph.run(), before) or read is packed
    assert [why in line for line in told()] == [True] * (why != "")


def test_a_kernel_that_failed_its_trial_leaves_the_product_to_vllm(
    monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(trial, "declined_silu", lambda *arguments: "it does not run here")
    graph = made(lambda rows, scale: token_op(rows))
    assert silu_quantised.fuse(graph.graph) == 0
    assert "(256 columns) is left to _C.dynamic_per_token_scaled_fp8_quant: it does not run here" in "\n".join(told())


def test_rows_of_other_schemes_stay_with_one_line(told: Callable[[], list[str]]) -> None:
    """Those of one scheme are asked for, in a graph that has four."""

    def forward(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        both = halves(x, residual)
        one, other = token_op(silu_op(both)), int8_op(silu_op(both + 1))
        return *one, *other, *silu_block_op(both + 2), *silu_static_op(both + 3, scale), *int8_op(silu_op(both + 4))

    graph = Made(forward)
    before = graph.run()
    assert silu_quantised.fuse(graph.graph, ("fp8_token",)) == 1
    assert same(graph.run(), before)
    assert [op["scheme"] for op in graph.quantised()] == ["fp8_token"]
    whys = [line.rpartition(": ")[2].removesuffix("; so do others like it") for line in told() if "is left to" in line]
    assert whys == [
        f"no engine with {scheme} rows was measured; RMSNORM_PATCH_VLLM_SILU_QUANTISED=on serves them"
        for scheme in ("int8_token", "fp8_block", "fp8_static")
    ]
    assert silu_quantised.fuse(graph.graph) == 4


def test_the_pass_serves_the_schemes_of_its_engine() -> None:
    call = silu_quantised.PASS.wrap_call(lambda manager, graph: None)
    uuid = silu_quantised.PASS.wrap_uuid(lambda manager: "manager")
    settings = [(), ("fp8_token",), ("fp8_token", "int8_token")]
    managers = [SimpleNamespace(rmsnorm_patch_silu_quantised=schemes) for schemes in settings]
    for manager, count in zip(managers, (0, 0, 1), strict=True):
        graph = made(lambda rows, scale: int8_op(rows))
        call(manager, graph.graph)
        assert len(graph.quantised()) == count
    assert len({uuid(manager) for manager in managers}) == 3


def test_each_length_is_told_of_once(told: Callable[[], list[str]]) -> None:
    def twice(x: Any, residual: Any, weight: Any, scale: Any) -> Any:
        first = native(native_silu(halves(x, residual)))
        second = native(native_silu(halves(first[0].to(torch.bfloat16), residual)))
        return *first, *second

    graph = Made(twice)
    assert silu_quantised.fuse(graph.graph) == 2
    said = told()
    assert len(said) == 1
    assert "(256 columns) writes fp8_token rows of its fp32 value, in place of a quantisation in arithmetic" in said[0]
