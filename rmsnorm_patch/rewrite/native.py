"""launcher.c's part in a patched model: the checks and the call of a pair, of a norm alone, or of a query's and a key's
norm, in one C function each (`launcher_pair.h`, `launcher_query_key.h`).

`in_layer`, `hand_over`, `take`, `alone`, `query_key` and those of an add behind a norm are called first; they give
None, and have done nothing, for whatever they are not sure of, and where there is no C launcher. A norm class is served
once `enroll` (for `alone`, `enroll_alone`, and so on) was called for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from ..backends.cuda import launcher
from . import guards
from .handover import MAX_UNTAKEN, Carry


def _declined(*operands: Any) -> None:
    """Nothing is served yet."""


in_layer: Callable[..., Any] = _declined
"""(norm, a, b) -> (normed, a + b) or None."""
hand_over: Callable[..., Any] = _declined
"""(layer, a, b) -> a + b, with the next norm's result riding on it, or None. Looks at the frames of its caller."""
take: Callable[..., Any] = _declined
"""(norm, x) -> the normed tensor that rides on x, or None."""

alone: Callable[..., Any] = _declined
"""(norm, x) -> norm(x) or None; for the norm's own forward, since it asks for no hooks."""
norm_add: Callable[..., Any] = _declined
"""(inner, side, a, b) -> a + b, operand `side` of which `inner` norms before, or None."""
norm_add_norm: Callable[..., Any] = _declined
"""(norm, inner, side, a, b) -> (norm(sum), sum), the sum as of `norm_add`, or None."""
norm_hand_over: Callable[..., Any] = _declined
"""(layer, inner, side, a, b) -> the sum of `norm_add`, with the next norm's result riding on it, or None."""

query_key: Callable[..., Any] = _declined
"""(query norm, key norm, query, key) -> (norm of query, norm of key) or None."""

rotated: Callable[..., Any] = _declined
"""(query norm, key norm, head axis, query, key, cos, sin) -> both normed and rotated, or None."""

_classes: dict[type, Any] = {}
"""What the C functions know: patched norm class -> how to read its weight and eps, and the op. They hold this dict."""
_alone: dict[type, Any] = {}
"""The same for `alone`."""
_norm_add: dict[type, Any] = {}
_norm_add_norm: dict[type, Any] = {}
"""The same for the functions of these names."""
_query_key: dict[type, Any] = {}
_rotated: dict[type, Any] = {}
"""The same for `query_key` and `rotated`."""


def enroll(cls: type, kernel: Any) -> None:
    """Let the C functions serve the pairs of `cls`, whose `layer_calls.NormKernel` is `kernel`, from now on."""
    _enroll(_classes, cls, kernel, kernel.fused.table)


def enroll_alone(cls: type, kernel: Any, table: object) -> None:
    """Let `alone` serve the norms of `cls`; `table`: that of their op (`ops.Bound.table`)."""
    _enroll(_alone, cls, kernel, table)


def enroll_norm_add(cls: type, kernel: Any, table: object, following: bool) -> None:
    """Let the C functions serve adds behind norms of `cls`; following: with the norm of the sum. table: of that op."""
    _enroll(_norm_add_norm if following else _norm_add, cls, kernel, table)


def enroll_query_key(cls: type, kernel: Any, table: object) -> None:
    """Let `query_key` serve the norms of `cls`; `table`: that of the op that norms two (`BoundPair.in_c`)."""
    _enroll(_query_key, cls, kernel, table)


def enroll_rotated(cls: type, kernel: Any, table: object) -> None:
    """Let `rotated` serve the norms of `cls`; `table`: that of its op (`BoundRotated.in_c`)."""
    _enroll(_rotated, cls, kernel, table)


def forget(cls: type) -> None:
    """Let the C functions serve norms of `cls` no longer, until it is enrolled again."""
    for classes in (_classes, _alone, _norm_add, _norm_add_norm, _query_key, _rotated):
        classes.pop(cls, None)


def _enroll(classes: dict[type, Any], cls: type, kernel: Any, table: object) -> None:
    global in_layer, hand_over, take, alone, norm_add, norm_add_norm, norm_hand_over, query_key, rotated
    pairs = None if cls in classes else launcher.functions().pairs
    if pairs is None:
        return
    if in_layer is _declined:
        _set_surroundings(pairs)
        in_layer, hand_over, take, alone = pairs.in_layer, pairs.hand_over, pairs.take, pairs.alone
        norm_add, norm_add_norm = pairs.norm_add, pairs.norm_add_norm
        norm_hand_over = pairs.norm_hand_over
        query_key, rotated = pairs.query_key, pairs.rotated
    read = kernel.attributes
    classes[cls] = pairs.new_norm(table, kernel, read.weight, read.eps, float(read.implied_eps))


def _set_surroundings(pairs: launcher.Pairs) -> None:
    pairs.set_surroundings(
        _classes,
        _alone,
        _norm_add,
        _norm_add_norm,
        guards.AMBIENT,
        guards.function_modes,
        guards.function_mode_watches,
        torch._C._functorch.maybe_current_level,
        vars(forward_ad),
        torch.is_grad_enabled,
        torch.is_inference_mode_enabled,
        sys._getframe,
        nn.Module._call_impl.__code__,
        Carry,
        tuple.__new__,
        MAX_UNTAKEN,
        (
            _module._global_forward_hooks,
            _module._global_forward_pre_hooks,
            _module._global_backward_hooks,
            _module._global_backward_pre_hooks,
        ),
        _query_key,
        _rotated,
    )
