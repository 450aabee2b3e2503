"""The fused norm of a product that comes in parts: its inner dimension was split, and the norm's kernel adds them up.

A library splits the inner dimension of a product of few rows to fill the device, and adds the parts in a kernel of its
own, in front of a norm that takes no longer. `rms_norm_partials.cu` reads the parts instead. Its reduction
tree is that of the fused op in place, so its bits are those of "add the parts, round, fused add and norm".
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...backends.bindings import by_variant
from ...backends.cuda import launcher
from ...backends.cuda.kernel_set import KernelSet, configs_for
from ...backends.cuda.rows import address_of, power_of_two
from ...backends.cuda.schedules import Config, Op
from ...numerics.contract import FUSED_ADD_IN_PLACE
from ...numerics.spec import NormSpec
from ...ops import listeners

OP: Op = "rms_norm_partials"
MOST_ROWS = 256
"""A CTA, or a cluster, for each row: more rows are better off with a reduction that fills the device."""
MOST_PARTS = 8
"""A thread asks for one chunk of every part at once."""


def bound(spec: NormSpec, parts: int, dependent: bool | None = None) -> BoundPartials:
    """The kernels of one numerics variant and number of parts. dependent: as `launch_mode.decided` takes it."""
    return _bound(parts, spec, dependent=dependent)


@by_variant
def _bound(parts: int, spec: NormSpec, dependent: bool) -> BoundPartials:
    return BoundPartials(spec, parts, dependent, launcher.functions())


def serves(spec: NormSpec, dtype: torch.dtype, n: int, device: int) -> bool:
    """Whether there is a kernel for rows of `n` columns, whose bits are those of the op that it takes the place of."""
    if spec.group is not None:
        return False
    return _alike(configs_for(OP, dtype, n, device), configs_for(FUSED_ADD_IN_PLACE.name, dtype, n, device))


def _alike(mine: tuple[Config, ...], fused: tuple[Config, ...]) -> bool:
    """Both have schedules, of one reduction tree."""
    return bool(mine and fused) and mine[0].tree == fused[0].tree


class BoundPartials:
    """f(parts, residual, weight, eps, normed): residual <- sum of the parts + residual; normed <- the norm of that.

    parts: fp32 [P, M, N]; residual, normed: 16-bit [M, N]; weight: [N] or None. All contiguous. The caller checks.
    """

    def __init__(self, spec: NormSpec, parts: int, dependent: bool, functions: launcher.Functions) -> None:
        self.op = FUSED_ADD_IN_PLACE.name
        """The op whose place the kernel takes."""
        self.spec = spec
        self.parts = parts
        self.dependent = dependent
        self.kernels = KernelSet(OP, spec, dependent, FUSED_ADD_IN_PLACE.fused_add, functions, self._select)

    def __repr__(self) -> str:
        return f"BoundPartials({self.spec!r}, parts={self.parts}, dependent={self.dependent})"

    def _select(self, configs: tuple[Config, ...], x: torch.Tensor) -> tuple[Config, ...]:
        """The schedules with the number of parts, which the kernel is compiled for."""
        return tuple(replace(config, defines=(*config.defines, ("PARTIALS", self.parts))) for config in configs)

    def __call__(
        self,
        parts: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        normed: torch.Tensor,
    ) -> None:
        m, n = residual.shape
        align = power_of_two(residual.data_ptr(), normed.data_ptr(), n * residual.element_size())
        address = address_of(weight)
        chain, _ = self.kernels.chain(residual, weight, align, power_of_two(address), False)
        self.kernels.launch(
            chain,
            (m,),
            residual,
            parts=parts.data_ptr(),
            residual=residual.data_ptr(),
            weight=address,
            normed=normed.data_ptr(),
            total=residual.data_ptr(),
            part_stride=m * n,
            parts_row_stride=n,
            residual_row_stride=n,
            normed_row_stride=n,
            total_row_stride=n,
            eps=eps,
        )
        if listeners.active:
            more = {"parts": self.parts}
            listeners.tell(listeners.Call(self.op, self.spec, self.dependent, residual, weight, normed, more))
