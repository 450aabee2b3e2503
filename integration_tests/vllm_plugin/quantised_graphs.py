"""Graphs as Inductor's passes see them, of our norms and of vLLM's quantisations; needs no vLLM.

Its ops have the names and schemas that they have in vLLM's wheel for CUDA, and compute on the CPU what
`numerics.quantise` defines. Its arithmetic is that of `QuantFP8.forward_native`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import config as inductor
from torch._inductor.decomposition import select_decomp_table

from rmsnorm_patch import ops
from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
from rmsnorm_patch.numerics.silu import silu_and_mul, silu_and_mul_quantised
from rmsnorm_patch.vllm_plugin.decision import SPECS

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
N = 256
SCHEMAS = {
    "static_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
    "dynamic_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor! scale) -> ()",
    "dynamic_per_token_scaled_fp8_quant": ("(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()"),
    "dynamic_scaled_int8_quant": "(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()",
    "static_scaled_int8_quant": "(Tensor! result, Tensor input, Tensor scale, Tensor? azp) -> ()",
    "per_token_group_fp8_quant": (
        "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float fp8_max, "
        "bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()"
    ),
    "scaled_fp4_quant": "(Tensor! result, Tensor input, Tensor! scale) -> ()",
    "silu_and_mul": "(Tensor! result, Tensor input) -> ()",
    "silu_and_mul_quant": "(Tensor! result, Tensor input, Tensor scale) -> ()",
    "silu_and_mul_per_block_quant": (
        "(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub, bool is_scale_transposed) -> ()"
    ),
}


def _static(result: Any, input: Any, scale: Any, group_shape: Any = None) -> None:
    if scale.numel() == 1:
        result.copy_(quantise(input, QuantSpec("fp8_static", arithmetic="separate"), scale)[0])


def _token(result: Any, input: Any, scale: Any, scale_ub: Any) -> None:
    _copy(quantise(input, QuantSpec("fp8_token", arithmetic="separate"), scale_ub), result, scale)


def _int8(result: Any, input: Any, scale: Any, azp: Any) -> None:
    _copy(quantise(input, QuantSpec("int8_token", arithmetic="separate")), result, scale)


def _block(input: Any, output_q: Any, output_s: Any, size: Any, eps: Any, low: Any, high: Any, ue8m0: Any,
           transposed: Any, tma: Any) -> None:  # fmt: skip
    if size == 128:
        _copy(quantise(input, QuantSpec("fp8_block", arithmetic="separate", power_of_two=ue8m0)), output_q, output_s)


def _silu(result: Any, input: Any) -> None:
    result.copy_(silu_and_mul(input))


def _silu_static(result: Any, input: Any, scale: Any) -> None:
    if scale.numel() == 1:
        result.copy_(silu_and_mul_quantised(input, "rounded", QuantSpec("fp8_static"), scale)[0])


def _silu_block(out: Any, input: Any, scales: Any, size: Any, bound: Any, transposed: Any) -> None:
    if size == 128 and bound is None:
        _copy(silu_and_mul_quantised(input, "product", QuantSpec("fp8_block", "fp32")), out, scales)


def _any(*arguments: Any, **named: Any) -> None:
    """Of ops that are left alone, and of all with tensors that have no data."""


def _copy(made: Any, rows: torch.Tensor, scales: torch.Tensor) -> None:
    rows.copy_(made[0])
    scales.copy_(made[1])


RUN = {
    "static_scaled_fp8_quant": _static,
    "dynamic_per_token_scaled_fp8_quant": _token,
    "dynamic_scaled_int8_quant": _int8,
    "per_token_group_fp8_quant": _block,
    "silu_and_mul": _silu,
    "silu_and_mul_quant": _silu_static,
    "silu_and_mul_per_block_quant": _silu_block,
}
"""Ops that become ours. Of the others no result is read."""
_LIBRARY = torch.library.Library("_C", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, RUN.get(_name, _any), "CPU")
    torch.library.register_fake(f"_C::{_name}", _any, lib=_LIBRARY)
C: Any = torch.ops._C


def same(left: Any, right: Any) -> bool:
    """Whether tensors have the same bits, and lie alike."""
    return all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        for one, other in zip(left, right, strict=True)
    )


def native(x: torch.Tensor, scale: torch.Tensor | None = None, bound: torch.Tensor | None = None) -> Any:
    """`QuantFP8.forward_native` of vLLM 0.33: static, or one scale a row."""
    if scale is None:
        largest = x.abs().amax(dim=-1).unsqueeze(-1).to(torch.float32)
        if bound is not None:
            largest = largest.clamp(max=bound)
        scale = (largest / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    out = x.to(torch.float32) * scale.to(torch.float32).reciprocal()
    return out.clamp(-448.0, 448.0).to(FP8), scale


def native_block(x: torch.Tensor, column_major: bool = False) -> Any:
    """`QuantFP8._quantize_group_native` of vLLM 0.33."""
    grouped = x.view(-1, x.shape[-1] // 128, 128)
    scales = (grouped.abs().max(dim=-1, keepdim=True)[0].float() / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    rows = (grouped / scales).clamp(-448.0, 448.0).to(FP8).view(x.shape)
    scales = scales.squeeze(-1).reshape(x.shape[0], -1)
    return rows, scales.transpose(-2, -1).contiguous().transpose(-1, -2) if column_major else scales


def static_op(x: torch.Tensor, scale: torch.Tensor) -> Any:
    result = torch.empty(x.shape, dtype=FP8)
    C.static_scaled_fp8_quant(result, x, scale, (-1, -1))
    return (result,)


def token_op(x: torch.Tensor, bound: torch.Tensor | None = None) -> Any:
    result, scale = torch.empty(x.shape, dtype=FP8), torch.empty(x.shape[0], 1)
    C.dynamic_per_token_scaled_fp8_quant(result, x, scale, bound)
    return result, scale


def int8_op(x: torch.Tensor) -> Any:
    result, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(x.numel() // x.shape[-1], 1)
    C.dynamic_scaled_int8_quant(result, x.contiguous(), scale, None)
    return result, scale


def block_op(x: torch.Tensor, layout: str = "row_major", ue8m0: bool = False) -> Any:
    """As `per_token_group_quant_fp8` calls it."""
    result, groups, m = torch.empty(x.shape, dtype=FP8), x.shape[-1] // 128, x.shape[0]
    if layout == "row_major":
        scale = torch.empty(m, groups)
    elif layout == "column_major":
        scale = torch.empty(groups, m).permute(-1, -2)
    else:
        scale = torch.empty_strided((m, groups), (1, -(m // -4) * 4))
    C.per_token_group_fp8_quant(
        x, result, scale, 128, 1e-10, -448.0, 448.0, ue8m0, layout != "row_major", layout == "tma_aligned"
    )
    return result, scale


def silu_op(x: torch.Tensor) -> torch.Tensor:
    result = x.new_empty(x.shape[0], x.shape[-1] // 2)
    C.silu_and_mul(result, x)
    return result


def native_silu(x: torch.Tensor) -> torch.Tensor:
    """`SiluAndMul.forward_native` of vLLM."""
    n = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :n]) * x[..., n:]


def silu_static_op(x: torch.Tensor, scale: torch.Tensor) -> Any:
    """As `maybe_fused_act_quant` and vLLM's pass call it."""
    result = torch.empty(x.shape[0], x.shape[-1] // 2, dtype=FP8)
    C.silu_and_mul_quant(result, x, scale)
    return (result,)


def silu_block_op(x: torch.Tensor, transposed: bool = False, size: int = 128, bound: Any = None) -> Any:
    """As vLLM's pass puts it in place of the two."""
    m, n = x.shape[0], x.shape[-1] // 2
    result = torch.empty(m, n, dtype=FP8)
    scales = torch.empty(n // size, m).permute(-1, -2) if transposed else torch.empty(m, n // size)
    C.silu_and_mul_per_block_quant(result, x, scales, size, bound, transposed)
    return result, scales


INDUCTOR, STORED = "rmsnorm_patch", "rmsnorm_patch_c"
"""Numerics under which arithmetic reads the fp32 value, and the stored one."""


def norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, provider: str, form: str) -> Any:
    """(rows, sum) in a form that one of the routes writes."""
    spec = ops.spec_args(SPECS[provider])
    if form == "plain":
        return torch.ops.rmsnorm_patch.rms_norm(x, weight, 1e-5, *spec), residual
    if form == "functional":
        return torch.ops.rmsnorm_patch.fused_add_rms_norm(x, residual, weight, 1e-5, *spec)
    torch.ops.rmsnorm_patch.fused_add_rms_norm_(x, residual, weight, 1e-5, *spec)
    return x, residual


FORMS = ("in place", "written", "functional", "plain")


class Made:
    """The graph that torch makes of `forward(x, residual, weight, scale)`, functional, with symbolic numbers of rows.
    form: "in place" puts our op that writes back in place, as vLLM's lowering does. more: inputs in place of scale."""

    def __init__(
        self, forward: Callable[..., Any], form: str = "written", m: int = 5, more: tuple[torch.Tensor, ...] = ()
    ) -> None:
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(1)
        x, residual = (torch.randn(m, N, generator=generator).to(BF16) for _ in range(2))
        weight = torch.randn(N, generator=generator).to(BF16)
        self.inputs = x, residual, weight, *(more or (torch.tensor([0.02]),))
        made = self.made = list[fx.GraphModule]()

        def keep(module: fx.GraphModule, example: Any) -> Any:
            made.append(module)
            return make_boxed_func(lambda *arguments: module.forward(*arguments))  # as it is when it is called

        backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table)
        with inductor.patch(enable_auto_functionalized_v2=False), torch.no_grad():
            self.call = torch.compile(forward, backend=backend, fullgraph=True)
            self.call(*self.copies())
        self.module = made[0]
        self.graph = self.module.graph
        if form == "in place":
            _write_in_place(self.graph)

    def copies(self) -> list[torch.Tensor]:
        copies = [tensor.clone() for tensor in self.inputs]
        for tensor in copies[:2]:
            torch._dynamo.mark_dynamic(tensor, 0)
        return copies

    def run(self) -> list[torch.Tensor]:
        self.graph.lint()
        self.module.recompile()
        with torch.no_grad():
            found: list[torch.Tensor] = list(self.call(*self.copies()))
        assert self.made == [self.module], "another graph ran"
        return found

    def targets(self) -> list[str]:
        nodes = (node for node in self.graph.nodes if node.op == "call_function")
        return [str(node.args[0] if node.target is auto_functionalized else node.target) for node in nodes]

    def quantised(self) -> list[dict[str, Any]]:
        """The arguments, by name, of each op that writes quantised rows."""
        found = []
        for node in self.graph.nodes:
            op: Any = node.args[0] if node.target is auto_functionalized else node.target
            if "_quantised" in getattr(getattr(op, "_schema", None), "name", ""):
                names = [argument.name for argument in op._schema.arguments]
                found.append(dict(node.kwargs) or dict(zip(names, node.args, strict=True)))
        return found


def _write_in_place(graph: fx.Graph) -> None:
    written = torch.ops.rmsnorm_patch.fused_add_rms_norm_.default
    for node in list(graph.nodes):
        if node.target is auto_functionalized and node.args == (written,):
            x, residual = node.kwargs["x"], node.kwargs["residual"]
            with graph.inserting_before(node):
                names = [argument.name for argument in written._schema.arguments]
                graph.call_function(written, tuple(node.kwargs[name] for name in names))
            for user in list(node.users):
                user.replace_all_uses_with(x if user.args[1] == 1 else residual)
                graph.erase_node(user)
            graph.erase_node(node)


def call_as_they_are(made: Made) -> None:
    """Functional calls of vLLM's quantisations become calls that write, and their results the buffers."""
    for node in list(made.graph.nodes):
        if node.target is auto_functionalized and node.args[0].namespace == "_C":
            schema = node.args[0]._schema
            with made.graph.inserting_before(node):
                made.graph.call_function(node.args[0], (), dict(node.kwargs))
            written = [a.name for a in schema.arguments if a.alias_info is not None]
            for user in list(node.users):
                user.replace_all_uses_with(node.kwargs[written[user.args[1] - 1]])
                made.graph.erase_node(user)
            made.graph.erase_node(node)
