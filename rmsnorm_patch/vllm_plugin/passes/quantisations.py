"""Which quantisation a node of a compiled graph is: one of vLLM's ops, or arithmetic that vLLM left to the compiler.

An op is known by its name and schema: called as it is, or as the functional call that torch makes of an op that writes.
Arithmetic is known by what it computes (`quantised_arithmetic.py`), since releases write it differently.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from ...numerics.quantisation import FP8_LIMIT, GROUP, Layout, QuantSpec

aten = torch.ops.aten
NAMESPACE = "_C"
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default})
"""What hands rows on as they are, if their length stays."""
QUANTISED = (torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True)
class Quantisation:
    """Rows that somebody reads quantised, of a norm. given: as our op takes it. rows, scales: the nodes that hold them,
    behind `node`. nodes: what computes them, from last to first. name: of what does, for people."""

    spec: QuantSpec
    given: fx.Node | None
    rows: list[fx.Node]
    scales: list[fx.Node]
    node: fx.Node
    nodes: list[fx.Node]
    is_op: bool
    name: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two that give the same rows and scales."""
        return self.spec, self.given


@dataclass(frozen=True)
class WritingCall:
    """An op that writes its results. written: the arguments that it writes, by name, in their order; functional: the
    node is a functional call of it, whose results are those of the node."""

    node: fx.Node
    name: str
    arguments: dict[str, Any]
    written: tuple[str, ...]
    functional: bool

    @property
    def input(self) -> Any:
        return self.arguments.get("input")


def call_of(node: fx.Node, part: str = "quant") -> WritingCall | None:
    """The op of vLLM's that a node calls, if its name has this part: by default a quantisation."""
    functional = node.target is auto_functionalized
    op: Any = node.args[0] if functional else node.target
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.name.startswith(f"{NAMESPACE}::") or part not in schema.name:
        return None
    if functional:
        arguments = dict(node.kwargs)
    else:
        named = zip((argument.name for argument in schema.arguments), node.args, strict=False)
        arguments = {**{a.name: a.default_value for a in schema.arguments}, **dict(named), **node.kwargs}
    written = tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return WritingCall(node, schema.name.removeprefix(f"{NAMESPACE}::"), arguments, written, functional)


def _static(call: WritingCall) -> QuantSpec | str:
    scale = call.arguments["scale"]
    if not isinstance(scale, fx.Node) or scale.meta["val"].numel() != 1:
        return "it has a scale for each group, given"
    return QuantSpec("fp8_static", arithmetic="separate")


def _token(call: WritingCall) -> QuantSpec | str:
    return QuantSpec("fp8_token", arithmetic="separate")


def _int8(call: WritingCall) -> QuantSpec | str:
    if call.arguments.get("azp") is not None:
        return "its zeros are not at 0"
    return QuantSpec("int8_token", arithmetic="separate")


def _block(call: WritingCall) -> QuantSpec | str:
    given = call.arguments
    if given["group_size"] != GROUP:
        return f"its groups have {given['group_size']} columns, and ours {GROUP}"
    if given["fp8_max"] != FP8_LIMIT:
        return f"its largest value is {given['fp8_max']}, and ours {FP8_LIMIT}"
    layout = layout_of(call, call.written[1])
    return QuantSpec("fp8_block", "rounded", "separate", layout, bool(given["scale_ue8m0"]))


def layout_of(call: WritingCall, scales: str) -> Layout:
    """As the tensor for the scales, an argument, lies; columns that are padded for TMA are named by a flag, as a symbol
    cannot be."""
    value = call.arguments[scales].meta["val"]
    if value.shape[-1] == 1 or value.stride(-1) == 1:
        return "row_major"
    return "tma_aligned" if call.arguments.get("dummy_is_tma_aligned") else "column_major"


OPS: dict[str, Callable[[WritingCall], QuantSpec | str]] = {
    "static_scaled_fp8_quant": _static,
    "dynamic_per_token_scaled_fp8_quant": _token,
    "dynamic_scaled_int8_quant": _int8,
    "per_token_group_fp8_quant": _block,
    "dynamic_scaled_fp8_quant": lambda call: "it has one scale for all rows, which no row alone gives",
    "static_scaled_int8_quant": lambda call: "no kernel of ours writes int8 rows with a given scale",
    "per_token_group_fp8_quant_packed": lambda call: "it packs its scales as powers of two in int32",
    "per_token_group_quant_int8": lambda call: "no kernel of ours writes int8 rows with a scale for each group",
}
"""vLLM's quantisations: what each is, or why none of ours is the same."""


def of_op(call: WritingCall, rows: fx.Node) -> Quantisation | str:
    """What an op quantises these rows of a norm to, or why it is left alone."""
    views, source = views_to(call.input)
    if source is not rows:
        return "it reads what was computed of the rows"
    try:
        spec = OPS.get(call.name, lambda call: "it is none that our kernels know")(call)
    except KeyError as error:
        return f"its schema has no argument {error}: this vLLM has another op of that name"
    if isinstance(spec, str):
        return spec
    results = results_of(call)
    if results is None:
        return "its results lie in memory that others share"
    held = results[0]
    scales = [] if spec.scheme == "fp8_static" else results[1]
    if any(node.meta["val"].shape != call.input.meta["val"].shape for node in held):
        return "its rows are padded"
    given = call.arguments.get("scale" if spec.scheme == "fp8_static" else "scale_ub")
    made_by = [*(held + scales if call.functional else []), call.node, *buffers_of(call), *views]
    return Quantisation(spec, given, held, scales, call.node, made_by, is_op=True)


def results_of(call: WritingCall) -> list[list[fx.Node]] | None:
    """For each argument that is written, the nodes that hold it afterwards."""
    if call.functional:
        schema = call.node.args[0]._schema  # type: ignore[union-attr]
        first = max(1, len(schema.returns))  # one place for None where it returns nothing
        results: list[list[fx.Node]] = [[] for _ in call.written]
        for user in call.node.users:
            if user.target is not operator.getitem:
                return None
            results[user.args[1] - first].append(user)  # type: ignore[index, operator]
        return results
    buffers = [call.arguments[name] for name in call.written if call.arguments[name] is not None]
    return [[buffer] for buffer in buffers] if all(_is_its_own(buffer) for buffer in buffers) else None


ALLOCATIONS = frozenset({aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default})


def _is_its_own(buffer: fx.Node) -> bool:
    """Whether a buffer is new memory that no other node refers to."""
    while buffer.target is aten.permute.default and len(buffer.all_input_nodes[0].users) == 1:
        buffer = buffer.all_input_nodes[0]
    return buffer.target in ALLOCATIONS


def buffers_of(call: WritingCall) -> list[fx.Node]:
    """What the call's results are written to, and for a view also the memory behind it."""
    buffers = []
    for name in call.written:
        buffer = call.arguments[name]
        while isinstance(buffer, fx.Node):
            buffers.append(buffer)
            buffer = buffer.all_input_nodes[0] if buffer.target is aten.permute.default else None
    return buffers


def views_to(node: Any) -> tuple[list[fx.Node], Any]:
    """The views between rows and a node that reads them as they are, the last first; and the rows."""
    views = []
    while isinstance(node, fx.Node) and node.target in VIEWS:
        source = node.all_input_nodes[0]
        if source.meta["val"].shape[-1:] != node.meta["val"].shape[-1:]:
            break
        views.append(node)
        node = source
    return views, node


def is_quantised(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in QUANTISED


def readers(rows: fx.Node, come_after: Callable[[fx.Node], bool], hands_on: Callable[[Any], bool]) -> Iterator[fx.Node]:
    """Each node that reads rows, through what hands values on, and is no such node itself, or is quantised."""
    seen, waiting = {rows}, [rows]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user in seen or not come_after(user):
                continue
            seen.add(user)
            if is_quantised(user) or not hands_on(user.target):
                yield user
            else:
                waiting.append(user)
