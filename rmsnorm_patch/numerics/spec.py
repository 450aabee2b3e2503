"""What an RMSNorm computes: one frozen description that the scan infers and every kernel honours.

    rstd = rsqrt(mean(x[..., :width]^2) + eps)                in fp32   (Zhang & Sennrich 2019, eq. 4)
    y    = round_out( round_mid(x * rstd) * (offset + weight) )

Libraries differ in where they round and in how the weight enters; a fused kernel that ignores the difference
differs from the model in many of its bf16 outputs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

Rounding = Literal["input", "weight", "none"]
WeightOffset = Literal["none", "fp32", "weight_dtype"]
OutputDtype = Literal["input", "promote"]
SumRounding = Literal["rounded", "fp32"]

ROUNDINGS: tuple[Rounding, ...] = ("input", "weight", "none")
WEIGHT_OFFSETS: tuple[WeightOffset, ...] = ("none", "fp32", "weight_dtype")
OUTPUT_DTYPES: tuple[OutputDtype, ...] = ("input", "promote")
SUM_ROUNDINGS: tuple[SumRounding, ...] = ("rounded", "fp32")

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NormSpec:
    """One numerics variant of RMSNorm.

    eps: added to the mean square, in fp32. `None` means the machine epsilon of fp32, also for fp16 and bf16 inputs:
        what `torch.nn.RMSNorm(eps=None)` computes (its documentation says `finfo(x.dtype).eps`).
        The value used at a call is the module's own at that moment; kernels take it as a run-time argument.
    round_before_weight: the dtype that `x * rstd` (fp32) is rounded to before the weight multiply: "input" = x.dtype
        (HF Llama), "weight" = the weight's dtype where that is fp16 or bf16, else not rounded (T5), "none" (Olmo,
        GptOss, Gemma, `F.rms_norm`, vLLM). Without a weight this axis has no effect beyond the output rounding.
    weight_offset: "none": w. "fp32": 1 + float(w). "weight_dtype": 1 + w added and rounded in w.dtype.
    has_weight: False: no weight multiply.
    output: "input" = x.dtype; "promote" = `torch.promote_types` of the rounded value's dtype and the weight's
        (HF Llama with an fp32 weight returns fp32 for bf16 x).
    sum: for a fused residual-add: "rounded" = variance and output use the sum rounded to x.dtype (what eager PyTorch
        does), "fp32" = they use the unrounded fp32 sum (what Inductor's fusion does). The returned sum is always
        rounded to x.dtype.
    width: None = the whole last dimension; k = variance over the leading k columns, every column is scaled.
    group: None = one rstd for a row; g = the row is split in groups of g columns with an rstd each.
    """

    eps: float | None = 1e-6
    round_before_weight: Rounding = "input"
    weight_offset: WeightOffset = "none"
    has_weight: bool = True
    output: OutputDtype = "promote"
    sum: SumRounding = "rounded"
    width: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("round_before_weight", self.round_before_weight, ROUNDINGS),
            ("weight_offset", self.weight_offset, WEIGHT_OFFSETS),
            ("output", self.output, OUTPUT_DTYPES),
            ("sum", self.sum, SUM_ROUNDINGS),
        ):
            if value not in allowed:
                raise ValueError(f"NormSpec.{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")
        for name, size in (("width", self.width), ("group", self.group)):
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"NormSpec.{name}: got {size!r}; allowed: None or a positive number of columns")
        if self.eps is not None and not (isinstance(self.eps, (int, float)) and self.eps >= 0.0):
            raise ValueError(f"NormSpec.eps: got {self.eps!r}; allowed: None or a number of at least 0")
        if not isinstance(self.has_weight, bool):
            raise ValueError(f"NormSpec.has_weight: got {self.has_weight!r}; allowed: True, False")

    @property
    def variant(self) -> NormSpec:
        """The same numerics without the run-time `eps`: what a compiled kernel is specialised on."""
        return self if self.eps == 0.0 else replace(self, eps=0.0)

    def rounded_dtype(self, x: torch.dtype, weight: torch.dtype | None) -> torch.dtype:
        """dtype that `x * rstd` holds when the weight multiply begins."""
        if self.round_before_weight == "input":
            return x
        if self.round_before_weight == "weight" and weight in _HALF:
            return weight
        return torch.float32

    def output_dtype(self, x: torch.dtype, weight: torch.dtype | None) -> torch.dtype:
        """dtype of the result for an input of dtype `x` and a weight of dtype `weight`."""
        if self.output == "input":
            return x
        rounded = self.rounded_dtype(x, weight)
        if not self.has_weight or weight is None:
            return rounded
        return torch.promote_types(rounded, torch.float32 if self.weight_offset == "fp32" else weight)

    def resolve_eps(self, x: torch.dtype) -> float:
        """The number added to the mean square for an input of dtype `x`."""
        return torch.finfo(torch.float64 if x == torch.float64 else torch.float32).eps if self.eps is None else self.eps

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


LLAMA = NormSpec()
"""142 of 224 classes of transformers 5.23: x * rstd rounded to x.dtype, then weight * that."""
FP32_WEIGHT_MULTIPLY = NormSpec(round_before_weight="none", output="input")
"""Olmo2, GptOss, `torch.nn.RMSNorm`, vLLM's CUDA op: one rounding at the end."""
GEMMA = NormSpec(round_before_weight="none", weight_offset="fp32", output="input")
"""Gemma: (1 + w) in fp32, one rounding at the end."""
T5 = NormSpec(round_before_weight="weight")
"""T5: rounded to the weight's dtype only where that is a half type."""
