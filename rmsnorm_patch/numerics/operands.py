"""What the ops accept, checked in one place; each error names the tensor, what came and what is supported.

The full checks are slow beside a launch. Backends run them when they meet a new (dtype, N, ...) for the first time and
repeat per call only what such a key does not cover: equal shapes and devices, and aliasing of what is written.
"""

from __future__ import annotations

from functools import partial

import torch

from ..errors import UnsupportedInput
from .spec import SUPPORTED_DTYPES, NormSpec

_DTYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, op: str = "rms_norm") -> None:
    """Raise `UnsupportedInput` unless norm(x [..., N], weight [N] or None) is defined for `spec`."""
    if x.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedInput(op, f"x of dtype {x.dtype}", f"x of dtype {_DTYPES}", "cast x, or leave this norm out")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise UnsupportedInput(
            op, f"x of shape {tuple(x.shape)}", "a last dimension of at least one column", "check the hidden size"
        )
    n = x.shape[-1]
    if weight is not None:
        _check_weight(op, x, weight, n)
    if spec.width is not None and spec.width > n:
        raise UnsupportedInput(op, f"width={spec.width} for x with {n} columns", f"width <= {n}", "correct the spec")
    if spec.group is not None and n % spec.group:
        raise UnsupportedInput(
            op, f"group={spec.group} for x with {n} columns", f"a divisor of {n}", "correct the spec's group"
        )


def _check_weight(op: str, x: torch.Tensor, weight: torch.Tensor, n: int) -> None:
    if weight.dim() != 1 or weight.shape[0] != n:
        raise UnsupportedInput(
            op,
            f"weight of shape {tuple(weight.shape)} for x of shape {tuple(x.shape)}",
            f"a weight of shape ({n},) or None",
            "pass the weight that belongs to this hidden size",
        )
    if weight.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedInput(
            op, f"weight of dtype {weight.dtype}", f"a weight of dtype {_DTYPES}", "dequantise or cast the weight"
        )
    if weight.device != x.device:
        raise UnsupportedInput(
            op, f"weight on {weight.device} and x on {x.device}", "both on one device", "move one with .to(device)"
        )


def weight_fits(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """The per-call part of `check_rms_norm`, for a (dtype, N, weight dtype) that has passed it before."""
    return weight is None or (weight.shape == x.shape[-1:] and _together(x, weight))


def mixes_dtypes(x: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether x + residual adds two dtypes, which the CUDA kernels leave to others."""
    return x.dtype is not residual.dtype


def sum_dtype(x: torch.Tensor, residual: torch.Tensor) -> torch.dtype:
    """dtype of x + residual: that of both, or fp32."""
    return torch.promote_types(x.dtype, residual.dtype) if mixes_dtypes(x, residual) else x.dtype


def alike(x: torch.Tensor, residual: torch.Tensor) -> bool:
    """The per-call part of `check_fused_add`: equal shapes, dtypes and devices."""
    return residual.shape == x.shape and not mixes_dtypes(x, residual) and _together(x, residual)


def _together(x: torch.Tensor, other: torch.Tensor) -> bool:
    """On one device; `get_device()` costs a third of `device`, and is -1 for all that is no accelerator."""
    return x.get_device() == other.get_device() and (x.is_cuda or x.device == other.device)


def check_fused_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    spec: NormSpec,
    op: str = "fused_add_rms_norm",
    mixed: bool = False,
) -> None:
    """The checks of `check_rms_norm`, and that `residual` matches x in shape, device and dtype, or with `mixed` is of
    any supported dtype."""
    check_rms_norm(x, weight, spec, op)
    if residual.shape != x.shape:
        raise UnsupportedInput(
            op,
            f"residual of shape {tuple(residual.shape)} for x of shape {tuple(x.shape)}",
            "equal shapes (no broadcasting)",
            "expand or reshape before the call",
        )
    if residual.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedInput(
            op, f"residual of dtype {residual.dtype}", f"a residual of dtype {_DTYPES}", "cast the residual"
        )
    if residual.device != x.device:
        raise UnsupportedInput(
            op, f"residual on {residual.device} and x on {x.device}", "both on one device", "move one with .to(device)"
        )
    if not mixed and mixes_dtypes(x, residual):
        raise UnsupportedInput(
            op, f"residual of dtype {residual.dtype} and x of dtype {x.dtype}", "equal dtypes", "cast one of them"
        )


check_mixed_add = partial(check_fused_add, mixed=True)
"""What the op that returns its sum takes: an add of two dtypes gives fp32, which no operand could hold in place."""


def check_in_place(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    spec: NormSpec,
    op: str = "fused_add_rms_norm_",
) -> None:
    """The checks of `check_fused_add`, and that x (<- normed) and residual (<- sum) can be written without harm."""
    check_fused_add(x, residual, weight, spec, op)
    out = spec.output_dtype(x.dtype, None if weight is None else weight.dtype)
    if out != x.dtype:
        raise UnsupportedInput(
            op,
            f"x of dtype {x.dtype} where the result has dtype {out}",
            "results of x's own dtype",
            "call fused_add_rms_norm, which allocates its result",
        )
    check_written("x", x, op)
    check_written("residual", residual, op)
    check_aliasing(x, residual, weight, op)


def check_written(name: str, tensor: torch.Tensor, op: str) -> None:
    """Raise where elements of a tensor that is written share their memory."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise UnsupportedInput(
            op,
            f"{name} of shape {tuple(tensor.shape)} expanded with strides {tensor.stride()}",
            "a tensor whose elements each have their own memory",
            f"pass {name}.contiguous(), or call fused_add_rms_norm",
        )


def count_write(*tensors: torch.Tensor) -> None:
    """Tell autograd's version counters that a kernel wrote these, as any in-place op does."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def check_aliasing(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, op: str = "fused_add_rms_norm_"
) -> None:
    """Raise where one of the written tensors shares memory with the other or with the weight."""
    pairs = [("residual", residual, "x", x)]
    if weight is not None:
        pairs += [("x", x, "weight", weight), ("residual", residual, "weight", weight)]
    for name, left, other, right in pairs:
        if share_memory(left, right):
            raise UnsupportedInput(
                op,
                f"{name} (written) overlapping {other} in memory",
                "tensors with memory of their own",
                "clone one of them, or call fused_add_rms_norm",
            )


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether any element of `a` and `b` has the same address (exact for slices with equal strides, else cautious)."""
    if isinstance(a, torch._subclasses.FakeTensor) or a.numel() == 0 or b.numel() == 0:
        return False
    low, high = a.data_ptr(), b.data_ptr()
    first = a if low <= high else b
    distance = abs(high - low) // first.element_size()
    if distance >= _extent(first):
        return False
    if a.stride() != b.stride() or a.dtype != b.dtype or a.dim() < 2 or a.stride(-1) != 1:
        return True
    period = a.stride(-2)
    return not a.shape[-1] <= distance % period <= period - b.shape[-1]


def _extent(x: torch.Tensor) -> int:
    """Elements from the first address of `x` to one past its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
