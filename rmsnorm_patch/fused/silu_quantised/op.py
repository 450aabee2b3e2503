"""silu_and_mul whose rows are written quantised, as an op.

    silu_and_mul_quantised(x, given?, scheme, silu, value, arithmetic, layout, power_of_two, ...) -> (rows, scales)

x: [..., 2 * N] of fp16 or bf16, any strides: gates, then what they multiply. given: fp32 [1], the scale of fp8_static
or an upper bound of the largest magnitude of fp8_token. silu: one of `numerics.silu.SILUS`. The others are of a
`QuantSpec`. rows: [..., N], float8_e4m3fn or int8, contiguous. scales: fp32 [..., groups], of no elements where the
scale is given. The bits are those of `numerics.silu`, by the CUDA kernel, the Triton kernel (whose exponential differs
in last bits) and in plain PyTorch. There is no backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...backends import launch_mode
from ...backends.bindings import kept
from ...backends.names import Backend
from ...numerics.quantisation import QuantSpec, check_given, rows_of
from ...numerics.silu import Silu, check_silu, silu_and_mul_quantised
from ...ops import dispatch, listeners
from ...ops.library import positional, register
from . import kernel
from .kernel import Results

NAME = "silu_and_mul_quantised"
SCHEMA = (
    "(Tensor x, Tensor? given, str scheme, str silu='rounded', str value='rounded', str arithmetic='fused', "
    "str layout='row_major', bool power_of_two=False, str backend='auto', bool enable_pdl=True) -> (Tensor, Tensor)"
)
_NAMES = ("silu", "value", "arithmetic", "layout", "power_of_two", "backend", "enable_pdl")
_DEFAULTS = ("rounded", "rounded", "fused", "row_major", False, "auto", True)


def silu_args(silu: Silu, quant: QuantSpec) -> tuple[str, str, str, str, bool]:
    """The arguments of the op behind `quant.scheme`, but for how it is served."""
    return silu, quant.value, quant.arithmetic, quant.layout, quant.power_of_two


@dataclass(frozen=True)
class Variant:
    """What a call computes, and by what."""

    silu: Silu
    quant: QuantSpec
    backend: Backend
    dependent: bool

    def check(self, x: torch.Tensor, given: torch.Tensor | None) -> None:
        """Raise UnsupportedInput for operands that the op does not take."""
        check_silu(x, self.silu, NAME)
        check_given(x, given, self.quant, NAME)

    def run(self, x: torch.Tensor, given: torch.Tensor | None) -> Results:
        """(rows, scales). Raises UnsupportedInput, KernelBuildError."""
        self.check(x, given)
        quant = self.quant.of_rows(rows_of(x))
        variant = self if quant is self.quant else replace(self, quant=quant)
        results = _RUN[self.backend_for(x)](variant, x, given)
        if listeners.active:
            more = {"scheme": self.quant.scheme, "value": self.quant.value, "silu": self.silu}
            listeners.tell(listeners.Call(NAME, kernel.SPEC, self.dependent, x, None, results[0], more))
        return results

    def backend_for(self, x: torch.Tensor) -> str:
        """ "cuda", "triton" or "reference": what serves `x`. KernelBuildError where a forced backend does not."""
        supported = "rows of a multiple of 16 bytes on sm_80 (int8) or sm_89 (fp8) and newer"
        return dispatch.serving(NAME, self.backend, x.device, lambda: kernel.serves(self.quant, x), supported)


def _on_cuda(variant: Variant, x: torch.Tensor, given: torch.Tensor | None) -> Results:
    return kernel.bound(variant.silu, variant.quant, given is not None, variant.dependent)(x, given)


def _on_triton(variant: Variant, x: torch.Tensor, given: torch.Tensor | None) -> Results:
    from . import portable

    return portable.bound(variant.silu, variant.quant, variant.dependent)(x, given)


def _in_pytorch(variant: Variant, x: torch.Tensor, given: torch.Tensor | None) -> Results:
    return silu_and_mul_quantised(x, variant.silu, variant.quant, given)


_RUN = {"cuda": _on_cuda, "triton": _on_triton, "reference": _in_pytorch}


@kept
def _variant(scheme: str, silu: str, *rest: Any) -> Variant:
    *quant, backend, enable_pdl = rest
    backend, dependent = dispatch.requested_backend(backend), launch_mode.dependent(enable_pdl)
    return Variant(silu, QuantSpec(scheme, *quant), backend, dependent)  # type: ignore[arg-type]


def _variant_of(scheme: str, rest: tuple[Any, ...], named: dict[str, Any]) -> Variant:
    return _variant(scheme, *positional(rest, named, _NAMES, _DEFAULTS))


def _run(x, given, scheme, *rest, **named):  # type: ignore[no-untyped-def]
    return _variant_of(scheme, rest, named).run(x, given)


def _fake(x, given, scheme, *rest, **named):  # type: ignore[no-untyped-def]
    variant = _variant_of(scheme, rest, named)
    variant.check(x, given)
    return kernel.new_results(x, variant.quant)


_LIBRARY = register("FRAGMENT", {NAME: (SCHEMA, _run, _fake)})
"""Kept for the life of the process."""
