"""The named sets of cases: what a record holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import VARIANTS, Case
from .quantised import QUANTISED
from .rows import FUSED, OURS, PAIR, PLAIN

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PREFILL_N = (*range(1024, 16385, 1024), 20480, 24576, 32768)
DECODE_M = (1, 16, 64, 128, 256)
DECODE_N = (2048, 2880, 3584, 4096, 5120, 7168, 8192, 16384)
LONG = ((512, 65536), (512, 131072), (512, 262144), (2048, 65536), (1024, 131072))
FP32_SHAPES = ((1, 768), (1, 4096), (64, 768), (64, 4096), (1024, 4096))


@dataclass(frozen=True)
class Todo:
    """A case and who is timed in it; no names: everybody."""

    case: Case
    only: tuple[str, ...] = ()


def grid(op: str, mode: str, dtype: str, ms, ns, only: tuple[str, ...] = (), variant: str = "") -> list[Todo]:
    return [Todo(Case(op, mode, DTYPES[dtype], m, n, variant), only) for n in ns for m in ms]


def shapes(op: str, mode: str, dtype: str, of, only: tuple[str, ...] = ()) -> list[Todo]:
    return [Todo(Case(op, mode, DTYPES[dtype], m, n), only) for m, n in of]


def _variants() -> list[Todo]:
    """Our kernel in every variant; fp32 also with half the columns, which are the bytes of a 16-bit row."""
    rows = []
    for name in filter(None, VARIANTS):
        who = OURS[:1] if name == "fp32 weight and result" else OURS  # such a result does not fit into x
        rows += grid(FUSED, "cold", "bf16", (4096,), (4096,), who, name)
    plain = [name for name in VARIANTS if name and name != "fp32 sum"]
    rows += [todo for name in plain for todo in grid(PLAIN, "cold", "bf16", (4096,), (4096,), OURS, name)]
    for op in (FUSED, PLAIN):
        rows += grid(op, "cold", "fp16", (4096,), (4096,), OURS, "one rounding")
        rows += grid(op, "cold", "fp32", (4096,), (2048, 4096), OURS, "one rounding")
    return rows


def _quantised(mode: str, ms: tuple[int, ...], ns: tuple[int, ...]) -> list[Todo]:
    return [todo for op in QUANTISED for todo in grid(op, mode, "bf16", ms, ns)]


SUITES: dict[str, list[Todo]] = {
    "prefill": grid(FUSED, "cold", "bf16", (4096,), PREFILL_N),
    "prefill_norm": grid(PLAIN, "cold", "bf16", (4096,), PREFILL_N),
    "decode": grid(FUSED, "chain", "bf16", DECODE_M, DECODE_N),
    "hot": grid(FUSED, "hot", "bf16", (4096,), (1024, 2048)),
    "qk": grid(PAIR, "cold", "bf16", (4096,), (128,)) + grid(PAIR, "hot", "bf16", (1, 16, 4096), (128,)),
    "quantised": _quantised("cold", (4096, 16384), (4096, 7168, 8192)),
    "quantised_decode": _quantised("chain", (1, 16, 64, 256), (4096, 8192)),
    "long": shapes(FUSED, "cold", "bf16", LONG) + shapes(PLAIN, "cold", "bf16", LONG),
    "odd": grid(FUSED, "cold", "bf16", (4096,), (769, 2880, 5125, 5126)),
    "variants": _variants(),
    "fp16": grid(PLAIN, "cold", "fp16", (4096,), range(1024, 8193, 1024), ("ours", "ours_triton", "eager")),
    # Beside each fp32 shape our bf16 kernel on rows of the same bytes.
    "fp32": shapes(PLAIN, "hot", "fp32", FP32_SHAPES)
    + shapes(PLAIN, "hot", "bf16", [(m, 2 * n) for m, n in FP32_SHAPES], OURS),
    "host": grid(FUSED, "host", "bf16", (8,), (4096,)) + grid(PLAIN, "host", "bf16", (8,), (4096,)),
}
