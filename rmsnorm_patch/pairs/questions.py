"""What a rewritten forward asks at run time, where a fused call is exact for some tensors or modules only. Where the
answer is no, the model's own statement runs."""

from __future__ import annotations

import sys
import weakref

import torch

_is_tracing = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.maybe_current_level
_references = sys.getrefcount
_users_of_storage = torch._C._storage_Use_Count


def unseen(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether `left = left + right` is `left += right` for everybody: the caller's variable is the only one that holds
    the tensor or its memory, and both give the same dtype and layout. False under autograd, in a traced region, and
    under a mode or transform that may see the operation."""
    return (
        not _is_tracing()
        and type(left) is torch.Tensor
        and type(right) is torch.Tensor
        and left.dtype is right.dtype
        and left.shape == right.shape
        and left.device == right.device
        and not torch.is_grad_enabled()
        and not _dispatch_modes()
        and not _function_modes()
        and _functorch_level() is None
        and left.layout is torch.strided
        and left.is_contiguous()
        and right.is_contiguous()
        and (not left.is_inference() or torch.is_inference_mode_enabled())
        and not left.__dict__
        and _references(left) <= _ALONE
        and not weakref.getweakrefcount(left)
        and _holders(left) in _FRESH
    )


def _holders(tensor: torch.Tensor) -> tuple[int, ...]:
    """How many hold the tensor in C++, its storage in Python and in C++, and what it is a view of: a product of three
    dimensions is a view of one of two, which only the view keeps alive."""
    storage, base = tensor.untyped_storage(), tensor._base
    held = (tensor._use_count(), _references(storage), _users_of_storage(storage._cdata))  # type: ignore[attr-defined]
    if base is None:
        return held
    seen = bool(base.__dict__) or weakref.getweakrefcount(base) > 0
    return (*held, _references(base), base._use_count(), seen)  # type: ignore[attr-defined]


def _references_of_argument(left: object, right: object) -> int:
    return _references(left)


def _references_of_variable() -> int:
    """References to an object that one local variable holds, as the function that it is given to counts them."""
    variable, other = object(), object()
    return _references_of_argument(variable, other)


_ALONE = _references_of_variable()
with torch.no_grad():
    _FRESH = frozenset({_holders(torch.empty(2, device="cpu")), _holders(torch.empty(2, device="cpu").view(1, 2))})
"""What `_holders` counts for a tensor and for a view that nobody else holds."""
