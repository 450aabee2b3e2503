"""A Triton kernel over rows that has the schedules of a norm: what the folders of `fused` start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...numerics.spec import NormSpec
from . import loader
from .backend import Layout, Rows, Target


class RowKernel:
    """The kernel `name` of the module of that name. op: the plain op whose schedules, and with them trees, it has."""

    def __init__(self, name: str, op: str, spec: NormSpec, dependent: bool) -> None:
        self.name = name
        self.op = op
        self.spec = spec
        self.dependent = dependent
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def layout(self, x: torch.Tensor, weight: torch.Tensor | None) -> Layout:
        """That of rows like those of x [..., N], with a weight [N] or None; made when it is first asked for."""
        dtype = None if weight is None else weight.dtype
        key = (x.dtype, x.shape[-1], dtype, x.device)
        layout = self._layouts.get(key)
        if layout is None:
            target = Target.of(x.device, self.dependent)
            layout = self._layouts[key] = Layout(self.op, self.spec, x.dtype, x.shape[-1], dtype, target)
        return layout

    def start(
        self,
        layout: Layout,
        x: torch.Tensor,
        operands: tuple[Any, ...],
        rows: tuple[Rows, ...],
        constants: Mapping[str, Any],
        more: tuple[int, ...] = (),
    ) -> None:
        """Launch for the rows of x [..., N], on its device and current stream.

        The kernel's parameters are the operands (tensors, then of a norm what is added to mean squares), the number of
        rows, `inner` and the strides of `rows`, `more`, and its constants.
        """
        function = getattr(loader.load(self.name, interpreted=not x.is_cuda), self.name)
        count, inner = x.numel() // layout.columns, rows[0].inner
        strides = (stride // layout.vec for where in rows for stride in where[1:])
        with torch.cuda.device_of(x):
            function[(-(-count // layout.schedule.rows), 1, 1)](
                *operands, count, inner, *strides, *more, NESTED=inner > 1, **constants, **layout.options
            )
