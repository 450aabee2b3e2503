"""Every tolerance of the proof, one row each, with where it comes from. The proof compares by no other number.

The rows start from one fact: a correct kernel differs from the model only in the order of an fp32 sum of positive
terms and in its `rsqrt`. That moves rstd by a few units of 2^-24, the same for a whole row, and moves an output
element only where it lay within that distance of a rounding boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RSTD_UNITS = 8
"""How far an honest rstd may be from the model's, in units of 2^-24. Pairwise and tree sums of N positive fp32 terms
err by at most log2(N)/2 units after the square root and by 1-2 in practice; CUDA's rsqrtf by 2 ulp. Not to be
widened: eps 1e-5 for 1e-6 at rms 1 is 75 of these units, N-1 for N at N = 262144 is 32."""

_UNIT = 2.0**-24


@dataclass(frozen=True)
class SiteTolerance:
    """What a norm's output in one dtype may differ by, element by element, from the original's on the same input.

    max_ulp: largest distance of one element, in representable values of the output dtype.
    fraction: share of elements that may differ at all. flips: rounding flips allowed on top, whatever the count.
    """

    max_ulp: int
    fraction: float
    flips: int

    def allowed(self, elements: int, width: int, dtype: torch.dtype) -> int:
        """Elements that may differ among `elements` in rows of `width`."""
        return int(self.fraction * elements + self.flips * multiplicity(width, dtype))


def multiplicity(width: int, dtype: torch.dtype) -> float:
    """Elements of a row that one rounding flip moves together: those with the same magnitude.

    A binade of bf16 has 128 magnitudes, and the fullest binade of a normal distribution 30% of its values, so in
    a row of 5120 about 12 elements are equal, and flip or stay as one. (Measured at N = 131072: 250 at a time.)
    """
    return max(1.0, 0.3 * width * torch.finfo(dtype).eps)


_HALF = SiteTolerance(max_ulp=2, fraction=1e-3, flips=3)
"""fp16 and bf16. 2 ulp: a flipped rounding of x*rstd is 1 ulp of it, which the multiply by a weight and its own
rounding can carry to 2 ulp of the product, no further. 0.1%: an element flips with probability (shift of rstd) /
(spacing); one unit of 2^-24 flips 0.001-0.002% in bf16 and 0.006-0.012% in fp16, so honest kernels show about 0.01%
and `RSTD_UNITS` = 8 is 0.1% in fp16. A wrong rounding axis shows 19-35%. 3 flips: with few elements 0.1% is less than
one; at 0.01%, four flips among 1000 distinct elements come once in 250 000."""

_FP32 = SiteTolerance(max_ulp=8, fraction=1.0, flips=0)
"""fp32. The row moves as one, so every element may differ and the share says nothing. 8 ulp: rstd, 2 to 4 (measured
over six summation orders and widths: 4), plus the two multiplies' roundings. eps 1e-5 for 1e-6 at rms 1 is 40 ulp."""

SITE: dict[torch.dtype, SiteTolerance] = {torch.bfloat16: _HALF, torch.float16: _HALF, torch.float32: _FP32}

_GATED_HALF = SiteTolerance(max_ulp=4, fraction=1e-3, flips=3)
GATED: dict[torch.dtype, SiteTolerance] = {
    torch.bfloat16: _GATED_HALF,
    torch.float16: _GATED_HALF,
    torch.float32: SiteTolerance(max_ulp=12, fraction=1.0, flips=0),
}
"""Gated norms. Halves, 4 ulp: a product with the gate that comes last rounds a third time, which carries the 2 ulp of
the product before it to 4 at most. The share is that of `SITE`: the activation's own errors are of single elements and
no larger than the row's. fp32, 12 ulp: the 8 of a norm, 2 of `exp`, one of the quotient, one of the products."""

EXACT = SiteTolerance(max_ulp=0, fraction=0.0, flips=0)
"""The residual sum, and every output where the call ran the original arithmetic (`reference`): one IEEE addition, or
the same code on the same input, has one result."""


def scale_bias(dtype: torch.dtype, elements: int, width: int) -> float:
    """Largest |sum((fused - original) * sign(original)) / sum(|original|)| over `elements` outputs in rows of `width`.

    Rounding noise averages out of this ratio and a wrong scale (eps, divisor, missed columns) does not, so it sees
    in bf16 what single elements cannot show. The bound is the shift of a whole row (`RSTD_UNITS`), plus what the
    permitted flips (0.1% of the elements, in clumps of `multiplicity`, either sign) leave: 4 sigma and 3 clumps.
    """
    if dtype == torch.float32 or not elements:
        return RSTD_UNITS * _UNIT
    clump = multiplicity(width, dtype)
    clumps = 3 + 4 * (_HALF.fraction * elements / clump) ** 0.5
    return RSTD_UNITS * _UNIT + clumps * clump * torch.finfo(dtype).eps / elements


EXACT_ERROR_RATIO = 1.02
"""Where the fused spec differs by design (the norm reads the unrounded sum): its rms error against fp64 may be at most
this multiple of the original's. It removes a rounding, so it is smaller in truth; 2% is the spread of the ratio of two
rms errors over the 2^17 elements of a probe (1/sqrt(2 * 2^17) = 0.2% each), ten-fold."""

LOGIT_ERROR_RATIO = 1.5
"""k: logit error of the patched model against a run of the same weights in the next wider dtype, at most k times the
original's own. A kernel within the per-site tolerance rounds a few elements the other way, and the network turns that
into another draw of the same rounding error: the ratio of the two is 1 with a spread that shrinks with the number of
positions. Measured with every norm off by all that the per-site tolerance permits (540 runs: llama, qwen3, gemma2,
mixtral, 4 to 256 positions): 0.90 to 1.15 in fp16 and bf16, 0.93 to 1.40 in fp32, where every element may move. 1.5
lies above all of them. It is the coarse layer: eps 1e-5 for 1e-6 passes it, and the other layers decide."""

GREEDY_MARGIN = 2.0
"""A greedy token may differ only where the original's two best logits are closer than this many times the original's
largest own error against the wider run: both candidates may each be off by that error, so the order of the two is
not determined by the weights at that precision."""
