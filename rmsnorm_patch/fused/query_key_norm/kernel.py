"""Two plain norms in one launch: the q and k norms of an attention layer, for a caller that has both at hand."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch

from ...backends import launch_mode
from ...backends.bindings import by_variant
from ...backends.cuda import launcher
from ...backends.cuda.backend import add_row_kind, bind, default_eps, started
from ...backends.cuda.kernel_set import Chain, KernelSet, configs_for
from ...backends.cuda.rows import Rows, address_of, power_of_two, rows_of
from ...errors import UnsupportedInput
from ...numerics import operands
from ...numerics.contract import RMS_NORM
from ...numerics.spec import NormSpec

Pair = tuple[torch.Tensor, torch.Tensor]
K = TypeVar("K", bound="BoundQueryKey")
TWO_NORMS = 5
"""Of this op, as launcher.c numbers them."""


def bind_rms_norm_pair(spec: NormSpec, enable_pdl: bool | None = None) -> BoundPair:
    """f(q, k, q_weight, k_weight, eps) -> (norm of q, norm of k), each bit for bit what `rms_norm` gives.

    q: [..., N], k: [..., N] of one dtype on one CUDA device, any strides; weights: [N] of one dtype, or both None.
    Operands that do not share N, dtypes or device, and rows longer than 2 KiB, are normed by a launch each.
    enable_pdl: as `launch_mode.dependent` takes it.
    """
    return bind_query_key(BoundPair, spec, enable_pdl)


@by_variant
def _bound(kind: type[K], spec: NormSpec, dependent: bool) -> K:
    return started(kind.code, spec, lambda functions: kind(spec, dependent, functions))[0]


def bind_query_key(kind: type[K], spec: NormSpec, enable_pdl: bool | None) -> K:
    """One object of the class for each variant and mode."""
    return _bound(kind, spec, dependent=launch_mode.dependent(enable_pdl))


class BoundQueryKey:
    """An op over the rows of q and k, of one numerics variant. code: its number in launcher.c. table: what the launcher
    knows of it (`started`). in_c: the same for `rewrite.native`, once launcher.c can serve a call; None before, and
    where it is not in use."""

    op: ClassVar[str]
    code: ClassVar[int]

    def __init__(self, spec: NormSpec, dependent: bool, functions: launcher.Functions) -> None:
        self.spec = spec
        self.dependent = dependent
        self.kernels = KernelSet(self.op, spec, dependent, False, functions)
        self.functions = functions
        self.table: object | None = None
        self.in_c: object | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, dependent={self.dependent})"

    def prepare(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Compile and load the kernels for contiguous rows like those of `x`; launches nothing."""
        chain, plain = self.kernels.contiguous(x, weight)
        if plain:
            self._register(x, weight, chain, False)

    def _register(self, x: torch.Tensor, weight: torch.Tensor | None, chain: Chain, two_level: bool) -> None:
        """Let launcher.c serve such calls from now on."""
        if self.functions.kind == "c" and self.table is not None:
            add_row_kind(self.kernels, self.table, x, weight, chain, two_level)
            self.in_c = self.table


class BoundPair(BoundQueryKey):
    """The two norms, which take a launch each where one cannot serve both."""

    op, code = "rms_norm_pair", TWO_NORMS

    def __init__(self, spec: NormSpec, dependent: bool, functions: launcher.Functions) -> None:
        super().__init__(spec, dependent, functions)
        self.single = bind(RMS_NORM.name, spec, dependent)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Pair:
        q_weight, k_weight, eps = rest
        if not self.spec.has_weight:
            q_weight = k_weight = None
        for x, weight in ((q, q_weight), (k, k_weight)):
            operands.check_rms_norm(x, weight, self.spec, self.op)
        if not q.is_cuda:
            raise UnsupportedInput(self.op, f"q on {q.device}", "CUDA tensors", "norm them with ops.bind_rms_norm")
        if self.why_apart(q, k, q_weight, k_weight):
            return self.single(q, q_weight, eps), self.single(k, k_weight, eps)
        return self._launch_pair(
            q, k, q_weight, k_weight, default_eps(self.spec, q.dtype) if eps is None else float(eps)
        )

    def why_apart(
        self, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None
    ) -> str:
        """Why q and k, on CUDA devices, take a launch each; "" where one norms both."""
        if q.dtype != k.dtype or q.shape[-1] != k.shape[-1] or q.device != k.device:
            sides = (f"{x.dtype} rows of {x.shape[-1]} on {x.device}" for x in (q, k))
            return f"q and k differ: {', '.join(sides)}"
        if (q_weight is None) != (k_weight is None) or (
            q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype
        ):
            return "the weights of q and k differ in dtype, or one has none"
        if not q.numel() or not k.numel():
            return "q or k has no rows"
        if self.spec.group is not None or not configs_for(self.op, q.dtype, q.shape[-1], q.get_device()):
            return f"no kernel norms two tensors of {q.dtype} rows of {q.shape[-1]} in one launch"
        return ""

    def _launch_pair(self, q: torch.Tensor, k: torch.Tensor, q_weight: Any, k_weight: Any, eps: float) -> Pair:
        n = q.shape[-1]
        dtype = self.spec.output_dtype(q.dtype, None if q_weight is None else q_weight.dtype)
        normed = torch.empty(q.shape, dtype=dtype, device=q.device), torch.empty(k.shape, dtype=dtype, device=k.device)
        rows, other = rows_of(q), rows_of(k)
        weights = [weight.contiguous() if weight is not None else None for weight in (q_weight, k_weight)]
        two_level = rows.two_level or other.two_level
        size = q.element_size()
        align = power_of_two(n * size, *rows.offsets(size), *other.offsets(size))
        addresses = [address_of(weight) for weight in weights]
        chain, plain = self.kernels.chain(q, q_weight, align, power_of_two(*addresses), two_level)
        if plain:
            self._register(q, q_weight, chain, two_level)
        m, m2 = q.numel() // n, k.numel() // n
        first, inner, outer = _levels(rows, m)
        second, inner2, outer2 = _levels(other, m2)
        self.kernels.launch(
            chain,
            (m, m2),
            q,
            x=rows.tensor.data_ptr(),
            weight=addresses[0],
            normed=normed[0].data_ptr(),
            m=m,
            x_row_stride=first,
            normed_row_stride=n,
            inner_rows=inner,
            x_outer_stride=outer,
            x2=other.tensor.data_ptr(),
            weight2=addresses[1],
            normed2=normed[1].data_ptr(),
            m2=m2,
            x2_row_stride=second,
            normed2_row_stride=n,
            inner_rows2=inner2,
            x2_outer_stride=outer2,
            eps=eps,
        )
        return normed[0], normed[1]


def _levels(rows: Rows, count: int) -> tuple[int, int, int]:
    """(row stride, inner rows, outer stride) in the form that a two-level kernel takes for any rows."""
    return (rows.stride, rows.inner, rows.outer) if rows.two_level else (rows.stride, count, 0)
