"""With RMSNORM_PATCH_VLLM_TRACE=DIR each process appends a line for every call of our ops to DIR/<pid>.jsonl.

A line is written at once, so that nothing is lost when a worker is killed. Replays of a CUDA graph run no Python and
leave no lines: the calls seen are the captured ones. "parts" stands in the lines of norms that added up a product,
"scheme", "value" and "both" in those of norms that wrote quantised rows. An op that takes the add behind a norm has one
line for all that it computes.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from ..fused.linear_norm import splits as linear_norm_splits
from ..ops import listeners
from . import trial

_installed: list[str] = []


def install(folder: str) -> None:
    """Make every norm of this process write what it is called with; a second call changes nothing."""
    if _installed:
        return
    _installed.append(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    listeners.listen(partial(_write, folder))


def _write(folder: str, call: listeners.Call) -> None:
    if not trial.is_trial() and not linear_norm_splits.is_comparing():  # those belong to no forward
        _append(folder, _line(call))


def _line(call: listeners.Call) -> dict[str, Any]:
    op, spec, x, result = call.op, call.spec, call.x, call.result
    return {
        "op": op.rstrip("_"),
        "in_place": op.endswith("_"),
        "shape": list(x.shape),
        "contiguous": x.is_contiguous(),
        "result_contiguous": result is None or result.is_contiguous(),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": x.device.type,
        "weight": call.weight is not None,
        "dependent": call.dependent,
        "width": spec.width,
        "sum": spec.sum,
        "round_before_weight": spec.round_before_weight,
        **call.more,
    }


def _append(folder: str, line: dict[str, Any]) -> None:
    path = Path(folder) / f"{os.getpid()}.jsonl"  # asked each time: workers may be forked
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)
