"""The ops: `torch.ops.rmsnorm_patch.*` for graphs, and `bind_*` callables for eager code.

    rms_norm(x, weight?, eps, ...)                        -> normed
    fused_add_rms_norm(x, residual, weight?, eps, ...)    -> (normed, sum)
    fused_add_rms_norm_(x!, residual!, weight?, eps, ...) -> ()       residual <- sum, x <- normed

x, residual: [..., N], fp16, bf16 or fp32, any strides; weight: [N] or None. Results are contiguous whatever the
strides of the inputs (the kernels write rows one after another), so the fake implementations say the same.
`eps=None` means fp32's epsilon (as `NormSpec.eps`). A NormSpec travels as primitive arguments (`spec_args`).
`enable_pdl=False` launches plainly, `True` (in `bind_*` also `None`) as RMSNORM_PATCH_PDL says (`launch_mode`).

The ops are registered with `torch.library.Library.impl`, which costs an eager call less than half
of what `torch.library.custom_op` does. A bound callable skips the dispatcher altogether. Neither kernels nor ops have a
backward: under grad the patched modules use the original arithmetic, and so does a bound callable in a traced graph.
"""

from __future__ import annotations

from ..backends.bindings import forget
from .bound import (
    COMPILE_VARIABLE,
    Bound,
    CompileForm,
    bind,
    bind_fused_add_rms_norm,
    bind_fused_add_rms_norm_,
    bind_rms_norm,
    compile_form,
    spec_args,
)
from .library import NAMESPACE, decompositions
from .tracing import is_traced

__all__ = [
    "COMPILE_VARIABLE",
    "NAMESPACE",
    "Bound",
    "CompileForm",
    "bind",
    "bind_fused_add_rms_norm",
    "bind_fused_add_rms_norm_",
    "bind_rms_norm",
    "compile_form",
    "decompositions",
    "forget",
    "is_traced",
    "spec_args",
]
