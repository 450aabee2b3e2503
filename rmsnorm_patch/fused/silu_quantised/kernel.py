"""The CUDA kernel: gates and what they multiply are read once, and the product leaves quantised
(`silu_and_mul_quantised.cu`).

A scale of a whole row takes one CTA or cluster a row. Other rows are cut in parts that know nothing of each other.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...backends.bindings import kept
from ...backends.cuda import launcher
from ...backends.cuda.kernel_set import KernelSet, configs_for
from ...backends.cuda.rows import address_of, one_level, power_of_two
from ...backends.cuda.schedules import Config, Op, no_kernel, sm
from ...numerics.quantisation import QuantSpec, new_scales
from ...numerics.silu import SILUS, Silu
from ...numerics.spec import NormSpec
from ..norm_quantised.kernel import FP8_CAPABILITY, defines, scale_strides

WHOLE: Op = "silu_and_mul_quantised"
PARTS: Op = "silu_and_mul_quantised_parts"
SPEC = NormSpec(0.0, has_weight=False)
"""What the kernel is built with: it has no norm."""

Results = tuple[torch.Tensor, torch.Tensor]
"""(rows, scales): scales of no elements where the scale is given."""


def op_of(quant: QuantSpec) -> Op:
    """Whose schedules the kernel has."""
    return WHOLE if quant.scheme in ("fp8_token", "int8_token") else PARTS


def cannot_serve(quant: QuantSpec, dtype: torch.dtype, n: int, capability: int, configs: tuple[Config, ...]) -> str:
    """Why no kernel serves rows of n results on a device of that capability, whose schedules are `configs`; or ""."""
    if quant.dtype != torch.int8 and capability < FP8_CAPABILITY:
        return f"fp8 needs sm_{FP8_CAPABILITY} or newer, device has sm_{capability}"
    return "" if configs else no_kernel(op_of(quant), dtype, n, capability)


def serves(quant: QuantSpec, x: torch.Tensor) -> str:
    """`cannot_serve` for the rows and the device of a CUDA tensor x [..., 2 * N]."""
    n = x.shape[-1] // 2
    configs = configs_for(op_of(quant), x.dtype, n, x.get_device())
    return cannot_serve(quant, x.dtype, n, sm(torch.cuda.get_device_capability(x.device)), configs)


def schedules(configs: tuple[Config, ...], silu: Silu, quant: QuantSpec, bounded: bool) -> tuple[Config, ...]:
    """`configs` with the macros of silu and of the quantisation."""
    macros = {"SILU": SILUS.index(silu), **defines(quant, bounded, both=False)}
    return tuple(replace(config, defines=tuple((dict(config.defines) | macros).items())) for config in configs)


def parts_of(config: Config, n: int) -> int:
    """CTAs, or slots of one, that share a row of n results without a word to each other."""
    chunks = dict(config.defines)["PART_CHUNKS"]
    return -(-n // (config.vec * config.threads_per_row * chunks)) if chunks else 1


def bound(silu: Silu, quant: QuantSpec, bounded: bool, dependent: bool) -> BoundSilu:
    """The kernels of one variant. bounded: `given` comes with each call."""
    return _bound(silu, quant, bounded, dependent)


@kept
def _bound(silu: Silu, quant: QuantSpec, bounded: bool, dependent: bool) -> BoundSilu:
    return BoundSilu(silu, quant, bounded, dependent, launcher.functions())


class BoundSilu:
    """f(x, given) -> results. The caller checks."""

    def __init__(
        self, silu: Silu, quant: QuantSpec, bounded: bool, dependent: bool, functions: launcher.Functions
    ) -> None:
        self.silu = silu
        self.quant = quant
        self.bounded = bounded
        self.kernels = KernelSet(op_of(quant), SPEC, dependent, False, functions, self._select)

    def __repr__(self) -> str:
        return f"BoundSilu({self.silu!r}, {self.quant!r})"

    def _select(self, configs: tuple[Config, ...], x: torch.Tensor) -> tuple[Config, ...]:
        return schedules(configs, self.silu, self.quant, self.bounded)

    def __call__(self, x: torch.Tensor, given: torch.Tensor | None) -> Results:
        results = new_results(x, self.quant)
        if x.numel():
            self._launch(x, given, results)
        return results

    def _launch(self, x: torch.Tensor, given: torch.Tensor | None, results: Results) -> None:
        quantised, scales = results
        where = one_level(x)
        gates = where.tensor[..., : x.shape[-1] // 2]
        n, size = gates.shape[-1], x.element_size()
        m = x.numel() // (2 * n)
        # The other half lies n elements behind: n counts among what is aligned.
        chain, _ = self.kernels.chain(gates, None, power_of_two(n * size, *where.offsets(size)), 32, False)
        by_row, by_group = scale_strides(scales, self.quant)
        self.kernels.launch(
            chain,
            (m * self._parts(gates),),
            x,
            x=where.tensor.data_ptr(),
            given=address_of(given),
            quantised=quantised.data_ptr(),
            scales=scales.data_ptr() if scales.numel() else 0,
            m=m,
            x_row_stride=where.stride,
            scale_row_stride=by_row,
            scale_group_stride=by_group,
        )

    def _parts(self, gates: torch.Tensor) -> int:
        """The same for all numbers of rows."""
        n = gates.shape[-1]
        return parts_of(configs_for(self.kernels.op, gates.dtype, n, gates.get_device())[0], n)


def new_results(x: torch.Tensor, quant: QuantSpec) -> Results:
    """Unwritten results for x [..., 2 * N]: the rows contiguous."""
    rows = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=quant.dtype)
    return rows, new_scales(rows, quant)
