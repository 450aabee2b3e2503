"""The CUDA kernel of both ops: one read of the row and the residual, a reduction for each norm (`rms_norm_add.cu`).

Its reduction trees are those of `rms_norm` and `fused_add_rms_norm` for the same length, so that its bits are those of
the separate ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...backends.cuda import backend as cuda_backend
from ...backends.cuda import launcher
from ...backends.cuda.kernel_set import Chain, KernelSet, configs_for
from ...backends.cuda.rows import Rows, address_of, one_level, power_of_two
from ...backends.cuda.schedules import Config, Op, no_kernel, sm
from ...numerics.contract import FUSED_ADD, RMS_NORM
from ...numerics.spec import NormSpec

OP: Op = "rms_norm_add"
CODES = {"rms_norm_add": 3, "rms_norm_add_rms_norm": 4}
"""launcher.c's numbers of the ops."""
_NORMS = (RMS_NORM.name, FUSED_ADD.name)


def with_next(configs: tuple[Config, ...], following: bool) -> tuple[Config, ...]:
    """The schedules, for the op with the norm of the sum or for the one without."""
    return tuple(replace(config, defines=(*config.defines, ("NEXT", int(following)))) for config in configs)


def cannot_serve(spec: NormSpec, x: torch.Tensor, weight: torch.Tensor | None) -> str:
    """Why no kernel gives the norms' own bits for rows like those of `x`; "" if one does."""
    if spec.group is not None:
        return f"groups of {spec.group} columns"
    n, index = x.shape[-1], x.get_device()
    own = configs_for(OP, x.dtype, n, index)
    if not own:
        return no_kernel(OP, x.dtype, n, sm(torch.cuda.get_device_capability(index)))
    return unlike(own, *(configs_for(op, x.dtype, n, index) for op in _NORMS))


def unlike(own: tuple[Config, ...], *norms: tuple[Config, ...]) -> str:
    """Why kernels of these schedules give other bits than the norms of theirs; "" if they give the same."""
    others = {config.tree for configs in norms for config in configs} - {own[0].tree}
    return f"the norms' reduction trees are {', '.join(sorted(others))}, not {own[0].tree}" if others else ""


def bind(op: Any, dependent: bool) -> tuple[Callable[..., Any], object | None]:
    """The callable of an `op.BoundNormAdd`, and launcher.c's table of it where launcher.c starts it."""
    bound, call = cuda_backend.started(
        CODES[op.op], op.spec, lambda functions: BoundKernel(op.op, op.spec, dependent, functions, op.check)
    )
    if bound.functions.kind != "c":  # in Python a plain call knows the plain ops alone
        return bound, None
    return call, bound.table


class BoundKernel:
    """f(x, residual, weight, eps) -> sum, or f(..., next_weight, next_eps) -> (normed, sum), on CUDA tensors."""

    def __init__(
        self,
        op: str,
        spec: NormSpec,
        dependent: bool,
        functions: launcher.Functions,
        check: Callable[..., None],
    ) -> None:
        self.op = op
        self.spec = spec
        self.following = op != "rms_norm_add"
        self.functions = functions
        self.check = check
        self.kernels = KernelSet(
            OP, spec, dependent, True, functions, lambda found, x: with_next(found, self.following)
        )
        self.table: object = None

    def __repr__(self) -> str:
        return f"BoundKernel({self.op!r}, {self.spec!r})"

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None, *following: Any
    ) -> Any:
        weight = weight if self.spec.has_weight else None
        next_weight, next_eps = following if self.following else (None, None)
        next_weight = next_weight if self.spec.has_weight else None
        self.check(x, residual, weight, eps, *((next_weight, next_eps) if self.following else ()))
        eps, next_eps = (
            cuda_backend.default_eps(self.spec, x.dtype) if each is None else float(each) for each in (eps, next_eps)
        )
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        normed = torch.empty_like(total) if self.following else None
        if x.numel():
            self._launch(one_level(x), one_level(residual), (weight, next_weight), (eps, next_eps), normed, total)
        return total if normed is None else (normed, total)

    def _launch(
        self,
        x: Rows,
        residual: Rows,
        weights: tuple[torch.Tensor | None, torch.Tensor | None],
        eps: tuple[float, float],
        normed: torch.Tensor | None,
        total: torch.Tensor,
    ) -> None:
        n, size = total.shape[-1], total.element_size()
        weight, next_weight = (None if each is None else each.contiguous() for each in weights)
        addresses = [address_of(each) for each in (weight, next_weight)]
        written = total.data_ptr() | address_of(normed)
        align = power_of_two(n * size, written, *x.offsets(size), *residual.offsets(size))
        m = total.numel() // n
        self.kernels.launch(
            self._chain(total, weight, align, power_of_two(*addresses)),
            (m,),
            total,
            x=x.tensor.data_ptr(),
            residual=residual.tensor.data_ptr(),
            weight=addresses[0],
            normed=address_of(normed),
            total=total.data_ptr(),
            m=m,
            x_row_stride=x.stride,
            residual_row_stride=residual.stride,
            normed_row_stride=n,
            total_row_stride=n,
            next_weight=addresses[1],
            eps=eps[0],
            next_eps=eps[1],
        )

    def _chain(self, x: torch.Tensor, weight: torch.Tensor | None, align: int, weight_align: int) -> Chain:
        """The kernels of a call; launcher.c serves the next plain one like it."""
        chain, plain = self.kernels.chain(x, weight, align, weight_align, False)
        if plain:
            cuda_backend.add_row_kind(self.kernels, self.table, x, weight, chain, False)
        return chain
