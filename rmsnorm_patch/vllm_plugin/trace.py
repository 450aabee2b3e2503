"""With RMSNORM_PATCH_VLLM_TRACE=DIR each process appends a line for every call of our ops to DIR/<pid>.jsonl.

A line is written at once, so that nothing is lost when a worker is killed. Replays of a CUDA graph run no Python and
leave no lines: the calls seen are the captured ones. "parts" stands in the lines of norms that added up a product,
"scheme", "value" and "both" in those of norms that wrote quantised rows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..fused.linear_norm import kernel as linear_norm_kernel
from ..fused.linear_norm import splits as linear_norm_splits
from ..fused.norm_quantised import op as norm_quantised_op
from ..fused.norm_quantised.kernel import Operands, Results
from . import trial


def install(folder: str) -> None:
    """Make every norm of this process write what it is called with; a second call changes nothing."""
    if hasattr(ops.Bound.__call__, "__wrapped__"):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    bound, partials = ops.Bound.__call__, linear_norm_kernel.BoundPartials.__call__
    quantised = norm_quantised_op.Variant.run

    def call(self: ops.Bound, *args: Any) -> Any:
        result = bound(self, *args)
        x = args[0]
        if type(x) is torch.Tensor and not torch.compiler.is_compiling() and _is_of_a_forward():
            first = result[0] if isinstance(result, tuple) else result
            _append(folder, _line(self, x, first, args[-2]))
        return result

    def call_in_parts(
        self: linear_norm_kernel.BoundPartials,
        parts: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        normed: torch.Tensor,
    ) -> None:
        partials(self, parts, residual, weight, eps, normed)
        if _is_of_a_forward():
            _append(folder, {**_line(self, residual, normed, weight), "parts": self.parts})

    def call_quantised(self: norm_quantised_op.Variant, arguments: Operands) -> Results:
        results = quantised(self, arguments)
        if _is_of_a_forward():
            quant = {"scheme": self.quant.scheme, "value": self.quant.value, "both": self.both}
            _append(folder, {**_line(self, arguments.x, results[0], arguments.weight), **quant})
        return results

    call.__wrapped__ = bound  # type: ignore[attr-defined]
    ops.Bound.__call__ = call  # type: ignore[method-assign]
    linear_norm_kernel.BoundPartials.__call__ = call_in_parts  # type: ignore[method-assign]
    norm_quantised_op.Variant.run = call_quantised  # type: ignore[method-assign]


def _is_of_a_forward() -> bool:
    return not trial.is_trial() and not linear_norm_splits.is_comparing()


def _line(
    bound: ops.Bound | linear_norm_kernel.BoundPartials | norm_quantised_op.Variant,
    x: torch.Tensor,
    result: torch.Tensor | None,
    weight: Any,
) -> dict[str, Any]:
    op, spec = bound.op, bound.spec
    return {
        "op": op.rstrip("_"),
        "in_place": op.endswith("_"),
        "shape": list(x.shape),
        "contiguous": x.is_contiguous(),
        "result_contiguous": result is None or result.is_contiguous(),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": x.device.type,
        "weight": weight is not None,
        "dependent": bound.enable_pdl if isinstance(bound, norm_quantised_op.Variant) else bound.dependent,
        "width": spec.width,
        "sum": spec.sum,
        "round_before_weight": spec.round_before_weight,
    }


def _append(folder: str, line: dict[str, Any]) -> None:
    path = Path(folder) / f"{os.getpid()}.jsonl"  # asked each time: workers may be forked
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)
