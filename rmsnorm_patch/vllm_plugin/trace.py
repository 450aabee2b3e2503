"""With RMSNORM_PATCH_VLLM_TRACE=DIR each process appends a line for every call of our ops to DIR/<pid>.jsonl.

A line is written at once, so that nothing is lost when a worker is killed. Replays of a CUDA graph run no Python and
leave no lines: the calls seen are the captured ones.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import ops
from . import health


def install(folder: str) -> None:
    """Make every `ops.Bound` of this process write what it is called with; a second call changes nothing."""
    if hasattr(ops.Bound.__call__, "__wrapped__"):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    original = ops.Bound.__call__

    def call(self: ops.Bound, *args: Any) -> Any:
        result = original(self, *args)
        x = args[0]
        if type(x) is torch.Tensor and not torch.compiler.is_compiling() and not health.is_trial():
            first = result[0] if isinstance(result, tuple) else result
            line = {
                "op": self.op.rstrip("_"),
                "in_place": self.op.endswith("_"),
                "shape": list(x.shape),
                "contiguous": x.is_contiguous(),
                "result_contiguous": first is None or first.is_contiguous(),
                "dtype": str(x.dtype).removeprefix("torch."),
                "device": x.device.type,
                "weight": args[-2] is not None,
                "parameter": type(args[-2]) is torch.nn.Parameter,
                "width": self.spec.width,
                "sum": self.spec.sum,
                "round_before_weight": self.spec.round_before_weight,
            }
            _append(Path(folder) / f"{os.getpid()}.jsonl", line)
        return result

    call.__wrapped__ = original  # type: ignore[attr-defined]
    ops.Bound.__call__ = call  # type: ignore[method-assign]


def _append(path: Path, line: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)
