"""The CUDA kernel: x and its gate are read once, and the row leaves normed and gated (`rms_norm_gated.cu`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...backends.bindings import by_variant
from ...backends.cuda import launcher
from ...backends.cuda.jit import DTYPE_CODES
from ...backends.cuda.kernel_set import KernelSet, configs_for
from ...backends.cuda.rows import MAX_ALIGN, address_of, in_step, power_of_two
from ...backends.cuda.schedules import Config, Op, no_kernel, sm
from ...numerics.gating import ACTIVATIONS, GateSpec
from ...numerics.spec import NormSpec

OP: Op = "rms_norm_gated"


def serves(spec: NormSpec, x: torch.Tensor) -> str:
    """Why no kernel serves the rows and the device of a CUDA tensor; "" if one does."""
    n = spec.group or x.shape[-1]
    if configs_for(OP, x.dtype, n, x.get_device()):
        return ""
    return no_kernel(OP, x.dtype, n, sm(torch.cuda.get_device_capability(x.device)))


def schedules(configs: tuple[Config, ...], gating: GateSpec, gate_dtype: torch.dtype) -> tuple[Config, ...]:
    """`configs` with the macros of the gate."""
    macros = {"GATE_T": DTYPE_CODES[gate_dtype], "ACTIVATION": list(ACTIVATIONS).index(gating.activation)}
    return tuple(replace(config, defines=(*config.defines, *macros.items())) for config in configs)


def held(spec: NormSpec, gating: GateSpec) -> NormSpec:
    """The spec of a kernel's build: a product with the gate that comes first is the fp32 sum of a fused add."""
    return replace(spec, sum="fp32" if gating.order == "gate_first" else "rounded")


def bound(spec: NormSpec, gating: GateSpec, gate_dtype: torch.dtype, dependent: bool | None = None) -> BoundGated:
    """The kernels of one numerics variant. dependent: as `launch_mode.decided` takes it."""
    return _bound(gating, gate_dtype, spec, dependent=dependent)


@by_variant
def _bound(gating: GateSpec, gate_dtype: torch.dtype, spec: NormSpec, dependent: bool) -> BoundGated:
    return BoundGated(spec, gating, gate_dtype, dependent, launcher.functions())


class BoundGated:
    """f(x, gate, weight, eps) -> the gated norm of x. The caller checks.

    x, gate: [..., N] on one CUDA device, any strides, gate of `gate_dtype`; weight: [N] or None. The result is
    contiguous, of the shape of x.
    """

    def __init__(
        self,
        spec: NormSpec,
        gating: GateSpec,
        gate_dtype: torch.dtype,
        dependent: bool,
        functions: launcher.Functions,
    ) -> None:
        self.spec = spec
        self.gating = gating
        self.gate_dtype = gate_dtype
        first = gating.order == "gate_first"
        self.kernels = KernelSet(OP, held(spec, gating), dependent, first, functions, self._select)

    def __repr__(self) -> str:
        return f"BoundGated({self.spec!r}, {self.gating!r}, {self.gate_dtype})"

    def _select(self, configs: tuple[Config, ...], x: torch.Tensor) -> tuple[Config, ...]:
        return schedules(configs, self.gating, self.gate_dtype)

    def prepare(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Build the kernels for contiguous rows like those of `x`, and for a gate that is part of a wider tensor."""
        self.kernels.contiguous(x, weight)
        if self.spec.group is not None:
            self.kernels.chain(x, weight, power_of_two(self.spec.group * x.element_size()), MAX_ALIGN, True)

    def __call__(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        normed = new_result(x, weight, self.spec, self.gating)
        if x.numel():
            self._launch(x, gate, None if weight is None else weight.contiguous(), eps, normed)
        return normed

    def _launch(
        self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float, normed: torch.Tensor
    ) -> None:
        columns = self.spec.group or x.shape[-1]
        m = x.numel() // columns
        step = in_step(x, gate, self.spec.group)
        rows, gates, size = step.rows, step.other, x.element_size()
        assert gates is not None
        # Bytes by which x's rows are aligned, and by as many elements the gate's.
        align = power_of_two(columns * size, *rows.offsets(size), *gates.offsets(size))
        chain, _ = self.kernels.chain(x, weight, align, power_of_two(address_of(weight)), step.two_level)
        self.kernels.launch(
            chain,
            (m,),
            x,
            x=rows.tensor.data_ptr(),
            gate=gates.tensor.data_ptr(),
            weight=address_of(weight),
            normed=normed.data_ptr(),
            m=m,
            x_row_stride=rows.stride,
            gate_row_stride=gates.stride,
            inner_rows=step.inner_rows,
            x_outer_stride=step.outer_stride,
            gate_outer_stride=step.other_outer_stride,
            eps=eps,
        )


def new_result(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, gating: GateSpec) -> torch.Tensor:
    """Unwritten and contiguous, for `x`."""
    return x.new_empty(x.shape, dtype=gating.output_dtype(x.dtype, None if weight is None else weight.dtype, spec))
