"""A quantisation that stands in a graph as arithmetic, known by what it computes.

vLLM leaves `QuantFP8.forward_native` to the compiler. How a graph writes it down changes with releases of vLLM and of
torch. So the nodes between a norm and its quantised rows are run on a few rows, on the CPU, and held against
`numerics.quantise`, as the scan of a model does with norms.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from ...numerics.quantisation import GROUP, QuantSpec, quantise
from .quantisations import VIEWS, Quantisation

aten, prims = torch.ops.aten, torch.ops.prims
_PACKETS = (
    *(aten.abs, aten.amax, aten.max, aten.maximum, aten.minimum, aten.clamp, aten.clamp_min, aten.clamp_max),
    *(aten.mul, aten.div, aten.reciprocal, aten.add, aten.exp2, aten.log2, aten.ceil, aten.pow, aten.where),
    *(aten.unsqueeze, aten.squeeze, aten.expand, aten.permute, aten.transpose, aten.t, aten.clone, aten.slice),
    *(aten.full, aten.scalar_tensor, aten.constant_pad_nd, aten._to_copy, prims.convert_element_type),
    *(aten.round, aten.lt, aten.gt, aten.le, aten.ge, aten.eq, aten.logical_not),
)
ARITHMETIC = VIEWS | {getattr(packet, name) for packet in _PACKETS for name in packet.overloads()} | {operator.getitem}
"""What a quantisation may be written with: each node one value, of nothing but its arguments."""
ROWS = 8
"""Of the trial."""
_NATIVE = (
    QuantSpec("fp8_token", arithmetic="native"),
    QuantSpec("fp8_block", arithmetic="native"),
    QuantSpec("fp8_block", arithmetic="native", power_of_two=True),
)


@dataclass(frozen=True)
class _Known:
    """What some nodes compute. scales: places, among them, of those that hold the scales."""

    spec: QuantSpec
    scales: tuple[int, ...]


_KNOWN: dict[str, _Known | str] = {}
"""The nodes, written down -> what they compute, or why that is no quantisation of ours."""


def of_arithmetic(rows: fx.Node, normed: fx.Node, come_after: Callable[[fx.Node], bool]) -> Quantisation | str:
    """What `rows`, quantised ones, are of `normed`, [M, N]; or why they are none of ours."""
    nodes, outside = _between(rows, normed)
    if any(normed in node.all_input_nodes and not come_after(node) for node in nodes):
        return "a part of it stands before the norm"
    if len(outside) > 1 or any(not _is_a_number(node) for node in outside):
        return "it reads other tensors than the norm's rows and one scale"
    given = outside[0] if outside else None
    if normed.meta["val"].dim() != 2:
        return f"its rows have {normed.meta['val'].dim()} dimensions"
    written = _written_down(nodes, normed, given)
    if written not in _KNOWN:
        with _disable_current_modes():
            _KNOWN[written] = _found(nodes, normed, given)
    known = _KNOWN[written]
    if isinstance(known, str):
        return known
    scales = [nodes[place] for place in known.scales]
    return Quantisation(known.spec, given, [rows], scales, normed, nodes[::-1], is_op=False)


def _between(rows: fx.Node, normed: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that make rows of normed, in the graph's order, the last one being rows; and what else they read."""
    inside: set[fx.Node] = set()
    outside: dict[fx.Node, None] = {}
    waiting = [rows]
    while waiting:
        node = waiting.pop()
        if node in inside or node is normed:
            continue
        if node.op != "call_function" or node.target not in ARITHMETIC:
            if isinstance(node.meta.get("val"), torch.Tensor):  # not a size
                outside[node] = None
            continue
        inside.add(node)
        waiting += node.all_input_nodes
    return [node for node in rows.graph.nodes if node in inside], list(outside)


def _is_a_number(node: fx.Node) -> bool:
    value = node.meta["val"]
    return bool(value.dtype == torch.float32 and value.numel() == 1)


def _number(value: Any) -> int:
    """A size, with ROWS for what it leaves open."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, ROWS)))
    return int(value)


def _written_down(nodes: list[fx.Node], normed: fx.Node, given: fx.Node | None) -> str:
    names = {node: f"%{place}" for place, node in enumerate(nodes)} | {normed: "%rows"}
    if given is not None:
        names[given] = f"%given{tuple(given.meta['val'].shape)}"

    def name(node: fx.Node) -> str:
        return names[node] if node in names else str(_number(node.meta["val"]))

    lines = [f"{normed.meta['val'].dtype} {[_number(size) for size in normed.meta['val'].shape]}"]
    inside = set(nodes)
    for node in nodes:
        leaves = any(user not in inside for user in node.users)
        lines.append(f"{node.target} {fx.map_arg(node.args, name)} {fx.map_arg(node.kwargs, name)} {leaves}")
    return "\n".join(lines)


def _found(nodes: list[fx.Node], normed: fx.Node, given: fx.Node | None) -> _Known | str:
    """Run the nodes and compare."""
    x = _trial_rows(*(_number(size) for size in normed.meta["val"].shape)).to(normed.meta["val"].dtype)
    values: dict[fx.Node, Any] = {normed: x}
    scale = torch.tensor([0.0173])
    if given is not None:
        values[given] = scale.reshape(given.meta["val"].shape)

    def value(node: fx.Node) -> Any:
        return values[node] if node in values else _number(node.meta["val"])

    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        values[node] = node.target(*args, **{**kwargs, **({"device": "cpu"} if kwargs.get("device") else {})})  # type: ignore[operator]
    inside = set(nodes)
    leaving = [place for place, node in enumerate(nodes[:-1]) if any(user not in inside for user in node.users)]
    candidates = _NATIVE if given is None else (QuantSpec("fp8_static", arithmetic="native"), _NATIVE[0])
    for spec in candidates:
        want, want_scales = quantise(x, spec, scale if given is not None else None)
        if _same_rows(values[nodes[-1]], want):
            scales = tuple(place for place in leaving if _same_scales(values[nodes[place]], want_scales))
            return _Known(spec, scales)
    return "its arithmetic is none that our kernels have"


def _trial_rows(m: int, n: int) -> torch.Tensor:
    """Rows of many magnitudes, some beyond what is quantised without clamping; one of zeros, one with a lone number."""
    generator = torch.Generator().manual_seed(m * n)
    rows = torch.randn(m, n, generator=generator)
    rows[:, ::GROUP] *= 20
    if m > 4:
        rows[1], rows[2, 1:] = 0, 0
        rows[3] *= 1e-4
        rows[4] *= 1e-9
    return rows


def _same_rows(rows: Any, want: torch.Tensor) -> bool:
    """All but a hundredth equal, and these next to each other: a quotient by a number is not the same everywhere."""
    if not isinstance(rows, torch.Tensor) or rows.dtype != want.dtype or rows.numel() != want.numel():
        return False
    steps = [tensor.reshape(-1).view(torch.uint8).to(torch.int32) for tensor in (rows, want)]
    apart = (steps[0] - steps[1]).abs()
    return bool((apart <= 1).all() and (apart == 0).float().mean() > 0.99)


def _same_scales(scales: Any, want: torch.Tensor) -> bool:
    if not isinstance(scales, torch.Tensor) or scales.dtype != torch.float32 or scales.numel() != want.numel():
        return False
    return want.numel() > 0 and torch.allclose(scales.reshape(want.shape), want, rtol=1e-6, atol=0)
