"""The patched layers, hand-over and all, fed hidden states of the probe families.

The residual-adds cannot be called from outside their layer. What is added can be changed, though: forward hooks on the
embedding and on the layers' children (attention, MLP) multiply what they return, so that the sums are tiny, large, or
have their energy in the last columns. The fused calls are judged by the observer as always; the model's output means
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

FAMILIES: tuple[str, ...] = ("tiny", "last", "large")

_LARGE = {torch.float16: 256.0}


def factors(family: str, hidden_size: int, dtype: torch.dtype, eps: float, rms: float) -> torch.Tensor:
    """What to multiply a contribution by, [hidden_size], powers of two; `rms`: of the sums in the ordinary run."""
    if family == "last":
        made = torch.full((hidden_size,), 2.0**-7, device="cpu")
        made[-min(8, hidden_size) :] = 16.0
        return made
    target = max(eps, 1e-12) ** 0.5 if family == "tiny" else _LARGE.get(dtype, 8192.0)
    exponent = torch.log2(torch.tensor(target / max(rms, 1e-30), device="cpu")).round().clamp(-30, 30)
    return torch.full((hidden_size,), float(2.0**exponent), device="cpu")


@contextmanager
def scaled(
    embedding: nn.Module | None, layers: Sequence[nn.Module], norms: Iterable[nn.Module], factor: torch.Tensor
) -> Iterator[None]:
    """Multiply what `embedding` and the children of `layers` return; norms keep theirs (a hook would disable them)."""
    kept = {id(norm) for norm in norms}
    children = {id(c): c for layer in layers for c in layer.children() if id(c) not in kept}
    targets = [*children.values(), *([embedding] if embedding is not None else [])]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _times(output, factor)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            return (_times(output[0], factor), *output[1:])
        return output

    handles = [target.register_forward_hook(hook) for target in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _times(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if x.shape[-1:] != factor.shape or not x.is_floating_point():
        return x
    return x * factor.to(x.device, x.dtype)
