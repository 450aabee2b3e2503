"""The norm that writes quantised rows, as two ops.

    rms_norm_quantised(x, weight?, given?, scheme, eps, ...)                        -> (rows, scales, normed)
    fused_add_rms_norm_quantised_(x, residual!, weight?, given?, scheme, eps, ...)  -> (rows, scales, normed)

x, residual: [..., N] of one dtype; weight: [N] or None; given: fp32 [1], the scale of fp8_static or an upper bound of
the largest magnitude of fp8_token. The arguments after eps are `ops.spec_args` and those of a `QuantSpec`, then `both`.
residual <- x + residual. rows: [..., N], float8_e4m3fn or int8, contiguous. scales: fp32 [..., groups], of no elements
where the scale is given. normed: with both=True the rows as the unquantised op writes them, for a second reader; else
of no elements.

The bits are those of quantising what `rms_norm` or `fused_add_rms_norm_` gives, on the CUDA kernel, the Triton kernel
and in plain PyTorch (`numerics.quantisation` has the definition).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...backends import launch_mode
from ...backends.bindings import kept
from ...backends.names import Backend
from ...errors import UnsupportedInput
from ...numerics import operands
from ...numerics.contract import IMPLIED_EPS, SPEC_ARGUMENTS
from ...numerics.quantisation import QuantSpec, check_given, rms_norm_quantised, rows_of
from ...numerics.spec import NormSpec
from ...ops import dispatch, listeners
from ...ops.library import DEFAULTS, OPTIONS, positional, register, spec_of
from . import kernel
from .kernel import Operands, Results

PLAIN, FUSED = "rms_norm_quantised", "fused_add_rms_norm_quantised_"
_QUANT_ARGUMENTS = (
    "str value='rounded', str arithmetic='fused', str layout='row_major', bool power_of_two=False, bool both=False"
)
_REST = f"Tensor? weight, Tensor? given, str scheme, {SPEC_ARGUMENTS}, {_QUANT_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
SCHEMAS = {PLAIN: f"(Tensor x, {_REST}", FUSED: f"(Tensor x, Tensor(a!) residual, {_REST}"}
_NAMES = (*OPTIONS, "value", "arithmetic", "layout", "power_of_two", "both")
_DEFAULTS = (*DEFAULTS, "rounded", "fused", "row_major", False, False)


def quant_args(quant: QuantSpec, both: bool = False) -> tuple[str, str, str, bool, bool]:
    """The last arguments of the ops, behind `ops.spec_args`; `quant.scheme` stands in front of eps."""
    return quant.value, quant.arithmetic, quant.layout, quant.power_of_two, both


@dataclass(frozen=True)
class Variant:
    """What a call computes, and by what."""

    op: str
    spec: NormSpec
    quant: QuantSpec
    both: bool
    backend: Backend
    dependent: bool

    def check(self, arguments: Operands) -> None:
        """Raise UnsupportedInput for operands that the op does not take."""
        x, residual, weight, given, _ = arguments
        if residual is None:
            operands.check_rms_norm(x, weight, self.spec, self.op)
        else:
            operands.check_fused_add(x, residual, weight, self.spec, self.op)
            operands.check_written("residual", residual, self.op)
            self._check_apart(residual, x=x, weight=weight, given=given)
        if self.spec.group is not None:
            raise UnsupportedInput(
                self.op, f"group={self.spec.group}", "norms with one rstd a row", "norm first, then quantise"
            )
        check_given(x, given, self.quant, self.op)

    def _check_apart(self, residual: torch.Tensor, **read: torch.Tensor | None) -> None:
        for name, tensor in read.items():
            if tensor is not None and operands.share_memory(residual, tensor):
                got = f"residual (written) overlapping {name} in memory"
                raise UnsupportedInput(self.op, got, "tensors with memory of their own", "clone one of them")

    def run(self, arguments: Operands) -> Results:
        """(rows, scales, normed), as `kernel.Results` has them. Raises UnsupportedInput, KernelBuildError."""
        self.check(arguments)
        quant = self.quant.of_rows(rows_of(arguments.x))
        variant = self if quant is self.quant else replace(self, quant=quant)
        results = _RUN[self.backend_for(arguments.x)](variant, arguments)
        if listeners.active:
            more = {"scheme": self.quant.scheme, "value": self.quant.value, "both": self.both}
            x, weight = arguments.x, arguments.weight
            listeners.tell(listeners.Call(self.op, self.spec, self.dependent, x, weight, results[0], more))
        return results

    def backend_for(self, x: torch.Tensor) -> str:
        """ "cuda", "triton" or "reference": what serves `x`. KernelBuildError where a forced backend does not."""
        fused_add, supported = self.op == FUSED, "sm_80 (int8) or sm_89 (fp8) and newer"
        return dispatch.serving(
            self.op, self.backend, x.device, lambda: kernel.serves(fused_add, self.quant, x), supported
        )


def _on_cuda(variant: Variant, arguments: Operands) -> Results:
    fused_add, bounded = arguments.residual is not None, arguments.given is not None
    bound = kernel.bound(variant.spec, variant.quant, fused_add, bounded, variant.both, variant.dependent)
    return _counted(bound(arguments), arguments)


def _on_triton(variant: Variant, arguments: Operands) -> Results:
    from . import portable

    fused_add = arguments.residual is not None
    bound = portable.bound(variant.spec, variant.quant, fused_add, variant.both, variant.dependent)
    return _counted(bound(arguments), arguments)


def _counted(results: Results, arguments: Operands) -> Results:
    if arguments.residual is not None:
        operands.count_write(arguments.residual)
    return results


def _in_pytorch(variant: Variant, arguments: Operands) -> Results:
    x, residual, weight, given, eps = arguments
    rows, scales, normed, total = rms_norm_quantised(x, residual, weight, variant.spec, variant.quant, eps, given)
    if residual is not None:
        residual.copy_(total)
    return rows, scales, normed if variant.both else normed.new_empty(0)


_RUN = {"cuda": _on_cuda, "triton": _on_triton, "reference": _in_pytorch}


@kept
def _variant(op: str, scheme: str, has_weight: bool, *rest: Any) -> Variant:
    """Of all the arguments after eps."""
    before, offset, output, sum_of, width, group, backend, enable_pdl, *quant, both = rest
    spec = spec_of(has_weight, before, offset, output, sum_of, width, group)
    backend, dependent = dispatch.requested_backend(backend), launch_mode.dependent(enable_pdl)
    return Variant(op, spec, QuantSpec(scheme, *quant), both, backend, dependent)  # type: ignore[arg-type]


def _variant_of(op: str, weight: object, scheme: str, rest: tuple[Any, ...], named: dict[str, Any]) -> Variant:
    return _variant(op, scheme, weight is not None, *positional(rest, named, _NAMES, _DEFAULTS))


def _operands(x, residual, weight, given, eps):  # type: ignore[no-untyped-def]
    return Operands(x, residual, weight, given, IMPLIED_EPS if eps is None else eps)


def _plain(x, weight, given, scheme, eps, *rest, **named):  # type: ignore[no-untyped-def]
    variant = _variant_of(PLAIN, weight, scheme, rest, named)
    return variant.run(_operands(x, None, weight, given, eps))


def _fused(x, residual, weight, given, scheme, eps, *rest, **named):  # type: ignore[no-untyped-def]
    variant = _variant_of(FUSED, weight, scheme, rest, named)
    return variant.run(_operands(x, residual, weight, given, eps))


def _fake(variant: Variant, arguments: Operands) -> Results:
    variant.check(arguments)
    return kernel.new_results(arguments.x, arguments.weight, variant.spec, variant.quant, variant.both)


def _fake_plain(x, weight, given, scheme, eps, *rest, **named):  # type: ignore[no-untyped-def]
    return _fake(_variant_of(PLAIN, weight, scheme, rest, named), _operands(x, None, weight, given, eps))


def _fake_fused(x, residual, weight, given, scheme, eps, *rest, **named):  # type: ignore[no-untyped-def]
    return _fake(_variant_of(FUSED, weight, scheme, rest, named), _operands(x, residual, weight, given, eps))


_LIBRARY = register(
    "FRAGMENT", {PLAIN: (SCHEMAS[PLAIN], _plain, _fake_plain), FUSED: (SCHEMAS[FUSED], _fused, _fake_fused)}
)
"""Kept for the life of the process."""
