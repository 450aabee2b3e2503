"""Whether two results have the same bits."""

from __future__ import annotations

import torch


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included, and of one dtype."""
    left, right = left.contiguous(), right.contiguous()
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
