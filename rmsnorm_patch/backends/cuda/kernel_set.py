"""The compiled kernels of one op and numerics variant: found by what a call needs of them, built when that is new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ...errors import KernelBuildError
from ...numerics.spec import NormSpec
from ..bindings import kept
from . import driver, jit, launcher
from .arguments import Arguments
from .rows import MAX_ALIGN, power_of_two
from .schedules import Config, Op, schedules, sm


class Loaded(NamedTuple):
    """One kernel on its device. m_max: the largest number of rows that it serves."""

    m_max: int
    handle: int
    rows_per_cta: int
    arguments: Arguments


@dataclass(frozen=True)
class Chain:
    """Kernels of one reduction tree, ascending by the numbers of rows that they serve."""

    kernels: tuple[Loaded, ...]

    def serving(self, m: int) -> Loaded:
        """The kernel for `m` rows."""
        for kernel in self.kernels:
            if m <= kernel.m_max:
                break
        return kernel


class KernelSet:
    """Kernels by (dtypes, N, device, alignment, addressing), launched dependently or plainly.

    select: of the op's schedules for a tensor those that are built, or others made of them; by default all.
    """

    def __init__(
        self,
        op: Op,
        spec: NormSpec,
        dependent: bool,
        fused_add: bool,
        functions: launcher.Functions,
        select: Callable[[tuple[Config, ...], torch.Tensor], tuple[Config, ...]] | None = None,
    ) -> None:
        self.op = op
        self.spec = spec
        self.dependent = dependent
        self.fused_add = fused_add
        self.functions = functions
        self._select = select
        self._chains: dict[tuple[Any, ...], Chain] = {}

    def chain(
        self, x: torch.Tensor, weight: torch.Tensor | None, align: int, weight_align: int, two_level: bool
    ) -> tuple[Chain, bool]:
        """The kernels for these types, compiled now if they are new, and whether they are new and serve rows that are
        as aligned as contiguous ones are."""
        n, index = self.spec.group or x.shape[-1], x.get_device()
        weight_dtype = None if weight is None else weight.dtype
        configs = configs_for(self.op, x.dtype, n, index)
        if not configs:
            raise KernelBuildError(
                site=f"{self.op}: N={n}, {x.dtype}",
                got=f"sm_{_capability(index)}",
                supported="see kernels/cuda/schedules",
                next_step="use backend='auto' or 'triton'",
            )
        vec, size = configs[0].vec, x.element_size()
        weight_size = size if weight is None else weight.element_size()
        align = min(align, vec * size)
        full_weight_align = min(vec * weight_size, MAX_ALIGN)
        weight_align = min(weight_align, full_weight_align)
        key = (x.dtype, weight_dtype, x.shape[-1], index, align, weight_align, two_level)
        chain = self._chains.get(key)
        if chain is not None:
            return chain, False
        chain = self._chains[key] = self._build(configs, x, weight_dtype, align, weight_align, two_level)
        return chain, align == min(power_of_two(n * size), vec * size) and weight_align == full_weight_align

    def contiguous(self, x: torch.Tensor, weight: torch.Tensor | None) -> tuple[Chain, bool]:
        """`chain` of contiguous rows like those of `x`, from an allocation of their own."""
        align = power_of_two((self.spec.group or x.shape[-1]) * x.element_size())
        return self.chain(x, weight, align, MAX_ALIGN, False)

    def _build(
        self,
        configs: tuple[Config, ...],
        x: torch.Tensor,
        weight_dtype: torch.dtype | None,
        align: int,
        weight_align: int,
        two_level: bool,
    ) -> Chain:
        index, n = x.get_device(), self.spec.group or x.shape[-1]
        kernels: list[Loaded] = []
        following = 0
        for config in reversed(configs if self._select is None else self._select(configs, x)):
            arguments = jit.source_of(config.source).arguments
            build = jit.Build(
                config=config,
                spec=self.spec,
                fused_add=self.fused_add,
                n=n,
                weight_rows=x.shape[-1] // n,
                x_dtype=x.dtype,
                weight_dtype=weight_dtype,
                align=align,
                weight_align=weight_align,
                two_level=two_level,
                arch=_capability(index),
            )
            following = self.functions.new_kernel(
                _function(build, index),
                driver.primary_context(index),
                n,
                config.m[1],
                config.rows_per_cta,
                config.cluster,
                config.threads,
                int(self.dependent and build.arch >= 90),
                align,
                weight_align,
                following,
                arguments,
            )
            kernels.insert(0, Loaded(config.m[1], following, config.rows_per_cta, arguments))
        return Chain(tuple(kernels))

    def launch(self, chain: Chain, rows: tuple[int, ...], on: torch.Tensor, /, **arguments: float) -> None:
        """Start the kernel for that many rows, on the current stream of the device that the tensor is `on`.

        rows: of each set that has CTAs of its own; most ops have one. arguments: the fields that the kernel declares.
        """
        kernel, groups = chain.serving(sum(rows)), 0
        for m in rows:
            groups += -(-m // kernel.rows_per_cta)
        stream = torch._C._cuda_getCurrentRawStream(on.get_device())
        code = self.functions.launch(kernel.handle, stream, groups, kernel.arguments.pack(arguments))
        if code:
            raise self._launch_error(code, on)

    def _launch_error(self, code: int, x: torch.Tensor) -> KernelBuildError:
        got = f"M={x.numel() // x.shape[-1]} rows" if code == launcher.TOO_MANY_ROWS else driver.error_name(code)
        return KernelBuildError(
            site=f"{self.op}: launch on {x.device}, x {tuple(x.shape)} {x.dtype}",
            got=got,
            supported="a grid of at most 2^31 - 1 blocks on a working device",
            next_step="split the call, or use backend='triton'; an error of an earlier kernel can surface here",
        )


@lru_cache(maxsize=64)
def _capability(index: int) -> int:
    return sm(torch.cuda.get_device_capability(index))


@kept
def configs_for(op: Op, x_dtype: torch.dtype, n: int, index: int) -> tuple[Config, ...]:
    """The schedules of `op` for rows of `n` columns on device `index`; empty where no kernel serves them."""
    return schedules(op, x_dtype, n, _capability(index), torch.cuda.get_device_name(index))


@cache
def _function(build: jit.Build, device: int) -> int:
    """Address of the loaded kernel on this device; the same for every op that needs the same build."""
    site = f"kernels/cuda/{build.config.source} on cuda:{device} (sm_{build.arch})"
    code = jit.machine_code(build)
    return driver.load(code, build.config.entry, device, site, build.config.cluster)
