"""Made inputs for a site: four families, each of which shows an error that the others hide.

randn: the ordinary case; rounding axes, missing offset, low-precision accumulation. tiny: mean square about eps, where
a wrong eps is a factor and not a rounding. last: a row's energy in its last 1 to 16 columns, which a kernel that
forgets columns does not see. large: close to the dtype's range, where a square in half precision is infinite.
"""

from __future__ import annotations

import zlib

import torch

FAMILIES: tuple[str, ...] = ("randn", "tiny", "last", "large")

_ELEMENTS = 1 << 17
"""Elements of a probe: at the honest share of 0.01% that is 13 flips, enough to tell from the 0.1% that is allowed."""

_LARGE = {torch.float16: 6e3, torch.bfloat16: 1e4, torch.float32: 1e4}
"""rms of "large": 4 sigma of a sum of two such operands stays below fp16's 65504."""


def rows_for(hidden_size: int) -> int:
    """Rows of a probe, at least 16, so that no verdict hangs on one row's rstd."""
    return max(16, min(2048, _ELEMENTS // max(hidden_size, 1)))


def site_seed(seed: int, path: str, family: str) -> int:
    """A seed that depends on the site and not on how many sites came before it."""
    return (int(seed) * 1_000_003 + zlib.crc32(f"{path}/{family}".encode())) % 2**63


def operands(
    family: str, count: int, hidden_size: int, dtype: torch.dtype, device: torch.device, eps: float, seed: int
) -> tuple[torch.Tensor, ...]:
    """`count` tensors [rows, hidden_size] whose sum belongs to `family`; made on the CPU, equal on every machine."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows_for(hidden_size)
    made = []
    with torch.device("cpu"):  # a program may have set another default
        for _ in range(count):
            x = torch.randn(rows, hidden_size, generator=generator)
            made.append(_shape(family, x, dtype, eps).to(dtype))
    return tuple(x.to(device) for x in made)


def _shape(family: str, x: torch.Tensor, dtype: torch.dtype, eps: float) -> torch.Tensor:
    rows, hidden_size = x.shape
    if family == "tiny":
        centre = max(eps, 1e-12) ** 0.5
        return x * centre * torch.logspace(-0.5, 1.0, rows).unsqueeze(1)
    if family == "large":
        return x * _LARGE.get(dtype, 1e4)
    if family == "last":
        columns = torch.arange(hidden_size)
        kept = 1 + torch.arange(rows) % min(16, hidden_size)
        return torch.where(columns >= hidden_size - kept.unsqueeze(1), x * 16.0, x * 2.0**-7)
    return x
