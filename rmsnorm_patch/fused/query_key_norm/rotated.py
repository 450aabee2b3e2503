"""The q and k norms of an attention and their rotation in one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...backends.cuda.backend import default_eps
from ...backends.cuda.kernel_set import configs_for
from ...backends.cuda.rows import address_of, power_of_two
from ...errors import UnsupportedInput
from ...numerics import operands
from ...numerics.spec import NormSpec
from .kernel import BoundQueryKey, Pair, bind_query_key

OP = "rms_norm_rotated"
ROTATED = 6
"""Of this op, as launcher.c numbers them."""
MAX_ROWS = 2**31 - 1


class Heads(NamedTuple):
    """Rows [tokens, heads, N] as they lie, strides in elements; tokens: batch * length."""

    batch: int
    length: int
    heads: int
    token_stride: int
    head_stride: int

    @property
    def rows(self) -> int:
        return self.batch * self.length * self.heads

    def packed(self, n: int) -> bool:
        """Whether they lie one after another."""
        return self.head_stride == n and self.token_stride == self.heads * n


def heads_of(x: torch.Tensor, head_axis: int) -> Heads | None:
    """The rows of x [batch, length, heads, N] (head_axis 2) or [batch, heads, length, N] (1); None where x is neither,
    or its tokens do not lie one behind the other, each with all its heads: the results do."""
    if x.dim() != 4 or x.stride(3) != 1 or not x.numel():
        return None
    n, token_axis = x.shape[3], 3 - head_axis
    batch, length, heads = x.shape[0], x.shape[token_axis], x.shape[head_axis]
    head_stride = x.stride(head_axis) if heads > 1 else n
    token_stride = heads * n
    if length > 1:
        token_stride = x.stride(token_axis)
    elif batch > 1:
        token_stride = x.stride(0)
    if batch > 1 and x.stride(0) != length * token_stride:
        return None
    if head_stride < n or (batch * length > 1 and token_stride < (heads - 1) * head_stride + n):
        return None
    return Heads(batch, length, heads, token_stride, head_stride)


def bind_rms_norm_rotated(spec: NormSpec, enable_pdl: bool | None = None) -> BoundRotated:
    """f(q, k, q_weight, k_weight, eps, cos, sin, head_axis) -> (rotated norm of q, of k), [batch, heads, length, N].

    q, k: [batch, length, heads, N] (head_axis 2) or [batch, heads, length, N] (1), of one dtype on one CUDA device, k
    with heads of its own number; weights: [N] of one dtype, or both None; cos, sin: [batch or 1, length, N]. Bits are
    those of `rms_norm` and `rotation.rotate`. The results lie as [batch, length, heads, N], as the model's own rotation
    leaves rows that lie so. Raises UnsupportedInput for what `why_apart` names.
    enable_pdl: as `launch_mode.dependent` takes it.
    """
    return bind_query_key(BoundRotated, spec, enable_pdl)


class BoundRotated(BoundQueryKey):
    """The norms with their rotation."""

    op, code = OP, ROTATED

    def __call__(self, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Pair:
        q_weight, k_weight, eps, cos, sin, head_axis = rest
        if not self.spec.has_weight:
            q_weight = k_weight = None
        for x, weight in ((q, q_weight), (k, k_weight)):
            operands.check_rms_norm(x, weight, self.spec, self.op)
        why = "q is no CUDA tensor" if not q.is_cuda else self.why_apart(q, k, q_weight, k_weight, cos, sin, head_axis)
        if why:
            raise UnsupportedInput(self.op, why, "rows of one length and dtype, with their angles", "rotate them apart")
        eps = default_eps(self.spec, q.dtype) if eps is None else float(eps)
        return self._launch(q, k, q_weight, k_weight, eps, cos, sin, head_axis)

    def why_apart(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        head_axis: int,
    ) -> str:
        """Why the norms of q and k, on CUDA devices, are not one launch with their rotation; "" where they are."""
        sides = heads_of(q, head_axis), heads_of(k, head_axis)
        n = q.shape[-1]
        if sides[0] is None or sides[1] is None or sides[0][:2] != sides[1][:2] or k.shape[-1] != n:
            return f"q {tuple(q.shape)} and k {tuple(k.shape)} do not lie token by token, with rows of one length"
        if q.dtype != k.dtype or q.device != k.device:
            return f"q and k differ: {q.dtype} on {q.device}, {k.dtype} on {k.device}"
        dtypes = {None if weight is None else weight.dtype for weight in (q_weight, k_weight)}
        if len(dtypes) > 1:
            return "the weights of q and k differ in dtype, or one has none"
        if self.spec.output_dtype(q.dtype, *dtypes) != q.dtype:
            return f"the norm of {q.dtype} rows is of another dtype"
        if why := self._why_not_angles(sides[0], q, cos, sin):
            return why
        if max(each.rows for each in sides if each is not None) > MAX_ROWS:
            return f"more than {MAX_ROWS} rows"
        if self.spec.group is not None or not configs_for(self.op, q.dtype, n, q.get_device()):
            return f"no kernel norms and rotates {q.dtype} rows of {n}"
        return ""

    def _why_not_angles(self, of: Heads, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str:
        for name, angle in (("cos", cos), ("sin", sin)):
            if (
                angle.dtype != q.dtype
                or angle.device != q.device
                or angle.dim() != 3
                or angle.shape[0] not in (1, of.batch)
                or angle.shape[1:] != (of.length, q.shape[-1])
            ):
                given = f"{angle.dtype} {tuple(angle.shape)} on {angle.device}"
                return f"{name} is {given}, for {q.dtype} rows of {q.shape[-1]} at {of.batch} x {of.length} tokens"
        return "cos and sin differ in shape" if cos.shape != sin.shape else ""

    def _launch(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        head_axis: int,
    ) -> Pair:
        n, size = q.shape[-1], q.element_size()
        first, second = heads_of(q, head_axis), heads_of(k, head_axis)
        assert first is not None
        assert second is not None
        sides = (first, second)
        rotated = [q.new_empty((*each[:3], n)) for each in sides]
        weights = [weight.contiguous() if weight is not None else None for weight in (q_weight, k_weight)]
        angles = [_aligned(each) for each in (cos, sin)]
        two_level = not all(each.packed(n) for each in sides)
        offsets = [stride * size for each in sides for stride in (each.token_stride, each.head_stride)]
        align = power_of_two(n * size, q.data_ptr(), k.data_ptr(), *offsets)
        addresses = [address_of(weight) for weight in weights]
        chain, plain = self.kernels.chain(q, weights[0], align, power_of_two(*addresses), two_level)
        if plain:
            self._register(q, weights[0], chain, two_level)
        self.kernels.launch(
            chain,
            (first.rows, second.rows),
            q,
            x=q.data_ptr(),
            weight=addresses[0],
            normed=rotated[0].data_ptr(),
            m=first.rows,
            x_row_stride=first.head_stride,
            inner_rows=first.heads,
            x_outer_stride=first.token_stride,
            x2=k.data_ptr(),
            weight2=addresses[1],
            normed2=rotated[1].data_ptr(),
            m2=second.rows,
            x2_row_stride=second.head_stride,
            inner_rows2=second.heads,
            x2_outer_stride=second.token_stride,
            cos=angles[0].data_ptr(),
            sin=angles[1].data_ptr(),
            angles=cos.shape[0] * cos.shape[1],
            eps=eps,
        )
        return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)


def _aligned(angle: torch.Tensor) -> torch.Tensor:
    """`angle` row by row at an address that the widest load takes."""
    angle = angle.contiguous()
    return angle if angle.data_ptr() % 32 == 0 else angle.clone()
