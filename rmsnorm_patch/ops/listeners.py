"""Who hears the calls of our ops: from eager code and graphs, on every thread of the process.

`rewrite.observe` tells what ran at a site of a patched model, to who watches that thread. An engine of vLLM has no
patched modules: what it calls are ops, and those tell here. Nothing is told of calls that a tracer follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..backends.bindings import forget
from ..locks import Lock
from ..numerics.spec import NormSpec

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Call(NamedTuple):
    """One call, which has ended.

    op: the name it is registered by. dependent: how its kernels are launched. x: [..., N]. weight: [N] or None.
    result: the normed tensor, or the sum where only that is wanted; None where x took it. more: what this op says of
    itself beyond that, by name.
    """

    op: str
    spec: NormSpec
    dependent: bool
    x: torch.Tensor
    weight: torch.Tensor | None
    result: torch.Tensor | None
    more: Mapping[str, Any] = _NOTHING


active: tuple[Callable[[Call], None], ...] = ()
"""Calls are described only while somebody listens. Replaced, never changed: threads that tell go on with theirs."""
_LOCK = Lock()


def listen(listener: Callable[[Call], None]) -> Callable[[], None]:
    """Have `listener` hear each call from now on; the function that is returned ends it.

    Ops are bound anew for it (`ops.forget`): what somebody holds already stays silent.
    """
    global active
    with _LOCK:
        active = (*active, listener)
    forget()

    def end() -> None:
        global active
        with _LOCK:
            left = list(active)
            left.remove(listener)
            active = tuple(left)
        forget()

    return end


def tell(call: Call) -> None:
    """Tell everybody who listens when this begins, but for those who leave before their turn."""
    for listener in active:
        if listener in active:
            listener(call)
