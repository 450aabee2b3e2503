"""The rotation of a query and its key by their positions (RoPE), operation for operation as most models write it."""

from __future__ import annotations

import torch


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """The second half of each row of x [..., N], negated, in front of the first."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, length, N] turned by cos and sin [batch or 1, length, N], of one dtype. The two products and
    their sum are rounded to it, one after the other."""
    return (x * cos.unsqueeze(1)) + (rotate_half(x) * sin.unsqueeze(1))
