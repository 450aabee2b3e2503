"""Operands of a case, its fp64 truth, and the launches of each timing mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..numerics.contract import PLAIN_OPS
from ..numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec
from . import quantised, roofline, timing
from .providers import Provider
from .quantised import QUANTISED
from .rows import FUSED, PAIR, PLAIN

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # nothing is timed on a CPU; the checks are tested there
HEADS = (32, 8)
"""Query and key heads of an rms_norm_pair case; as many value heads as key heads lie between its rows."""

MAX_REL_ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-19}
"""Largest |got - fp64| / max(|fp64|, row scale): two roundings of the output dtype (ulp/2 each, 2**-8 relative for
bf16), or for fp32 the rounding of a sum of up to 2**18 squares."""

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class CaseVariant:
    """What a case computes, and its weight's dtype (None: that of x)."""

    spec: NormSpec
    weight: torch.dtype | None = None


VARIANTS = {
    "": CaseVariant(FP32_WEIGHT_MULTIPLY),  # what FlashInfer, quack and vLLM compute, so that the work is the same
    "one rounding": CaseVariant(FP32_WEIGHT_MULTIPLY),
    "llama": CaseVariant(LLAMA),
    "fp32 weight": CaseVariant(FP32_WEIGHT_MULTIPLY, torch.float32),
    "fp32 weight and result": CaseVariant(LLAMA, torch.float32),
    "1+w": CaseVariant(GEMMA),
    "weightless": CaseVariant(NormSpec(has_weight=False, round_before_weight="none", output="input")),
    "fp32 sum": CaseVariant(NormSpec(round_before_weight="none", output="input", sum="fp32")),
}
"""Variants other than "" are timed for our kernels alone: peers do not have them."""


@dataclass(frozen=True)
class Case:
    """`m` rows of `n` columns; for rms_norm_pair `m` tokens, each with a row of `n` columns for every head."""

    op: str
    mode: str
    dtype: torch.dtype
    m: int
    n: int
    variant: str = ""

    @property
    def spec(self) -> NormSpec:
        return VARIANTS[self.variant].spec

    @property
    def weight_dtype(self) -> torch.dtype | None:
        return (VARIANTS[self.variant].weight or self.dtype) if self.spec.has_weight else None

    @property
    def out_dtype(self) -> torch.dtype:
        return self.spec.output_dtype(self.dtype, self.weight_dtype)

    @property
    def bytes(self) -> int:
        """Bytes that must move, weights left out: each operand read once, each result written once."""
        if self.op in QUANTISED:
            sums = 3 * self.m * self.n * self.dtype.itemsize
            return sums + QUANTISED[self.op].bytes(self.m, self.n, self.dtype)
        elements = self.m * self.n * (sum(HEADS) if self.op == PAIR else 1)
        streams = 3 if self.op == FUSED else 1  # x, and for the fused op residual and sum
        return elements * (streams * self.dtype.itemsize + self.out_dtype.itemsize)


def operands(case: Case, sets: int, seed: int = 0) -> list[Tensors]:
    """(x,), (x, residual), or for the pair (q, k): views of a packed projection, as attention has them."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    new = lambda columns: torch.randn(case.m, columns, device=DEVICE, generator=generator).to(case.dtype)  # noqa: E731
    if case.op == PAIR:
        return [_query_and_key(new((HEADS[0] + 2 * HEADS[1]) * case.n), case.n) for _ in range(sets)]
    count = 2 if case.op in QUANTISED else PLAIN_OPS[case.op].operands
    return [tuple(new(case.n) for _ in range(count)) for _ in range(sets)]


def _query_and_key(packed: torch.Tensor, n: int) -> Tensors:
    heads = packed.view(packed.shape[0], -1, n)
    return heads[:, : HEADS[0]], heads[:, HEADS[0] : sum(HEADS)]


def weights_of(case: Case) -> tuple[torch.Tensor | None, ...]:
    """Parameters, as in a model."""
    count = 2 if case.op == PAIR else 1
    if case.weight_dtype is None:
        return (None,) * count
    generator = torch.Generator(DEVICE).manual_seed(1)
    centre = 0.0 if case.spec.weight_offset != "none" else 1.0
    drawn = [centre + 0.1 * torch.randn(case.n, device=DEVICE, generator=generator) for _ in range(count)]
    return tuple(torch.nn.Parameter(w.to(case.weight_dtype), requires_grad=False) for w in drawn)


def invoke(provider: Provider, inputs: Sequence[Any], weights: Sequence[Any]) -> tuple[Any, ...]:
    """(normed,), (normed, total) or (normed q, normed k) of one call; in place: the inputs, overwritten. Of ops that
    quantise all four results."""
    out = provider.call(*inputs, *weights, EPS)
    if provider.op in QUANTISED:
        return tuple(out)
    if provider.in_place:
        return tuple(inputs)
    return tuple(out[:2]) if isinstance(out, tuple | list) else (out,)


def _norm64(x64: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> torch.Tensor:
    normed = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + EPS)
    return normed if weight is None else normed * (weight.double() + float(spec.weight_offset != "none"))


def _wanted(case: Case, inputs: Tensors, weights: Sequence[Any]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """fp64 norms, and the sum that must come out bit for bit."""
    if case.op != FUSED and case.op not in QUANTISED:
        return [_norm64(x.double(), w, case.spec) for x, w in zip(inputs, weights, strict=True)], None
    x, residual = inputs
    total = x + residual
    exact = x.double() + residual.double() if case.spec.sum == "fp32" else total.double()
    return [_norm64(exact, weights[0], case.spec)], total


def check(provider: Provider, case: Case) -> str:
    """Empty where the provider's result is right on fresh data, else what is wrong with it."""
    torch._dynamo.reset()  # one graph for each shape: after eight shapes the ninth would be refused
    inputs, weights = operands(case, 1, seed=17)[0], weights_of(case)
    norms, want_total = _wanted(case, inputs, weights)
    fresh = tuple(x.clone() for x in inputs) if provider.in_place or case.op in QUANTISED else inputs
    results = invoke(provider, fresh, weights)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    if case.op in QUANTISED and want_total is not None:
        return quantised.wrong(case.op, results, norms[0], want_total)
    if len(results) != len(norms) + (want_total is not None):
        return f"returned {len(results)} tensors"
    if want_total is not None and not torch.equal(results[-1], want_total):
        return f"residual sum differs in {(results[-1] != want_total).float().mean().item():.2%} of elements"
    for normed, want in zip(results, norms, strict=False):
        if normed.shape != want.shape or normed.dtype != case.out_dtype:
            return f"returned {tuple(normed.shape)} {normed.dtype}"
        error = ((normed.double() - want).abs() / want.abs().clamp_min(2**-6)).max().item()
        if not error <= MAX_REL_ERROR[case.dtype]:
            return f"relative error {error:.3g} > {MAX_REL_ERROR[case.dtype]:.3g}"
    return ""


def _sets(case: Case) -> int:
    if case.mode != "cold":
        return 1
    return max(4, min(64, -(-timing.COLD_BYTES // case.bytes)))


def _launches(case: Case, step: Callable[[Tensors], Any]) -> tuple[Callable[[], list], int]:
    """The enqueueing function of a graph mode and how many launches it makes; `step(inputs)` -> results."""
    sets = operands(case, _sets(case))
    count = len(sets) if case.mode == "cold" else 50

    def rotate() -> list:
        return [step(inputs) for inputs in sets]

    def repeat() -> list:
        for _ in range(count - 1):
            step(sets[0])  # the results are dropped at once, so that the next call writes to the same memory
        return [step(sets[0])]

    def chain() -> list:
        inputs = sets[0]
        for _ in range(count):
            inputs = tuple(step(inputs))
        return list(inputs)

    return {"cold": rotate, "hot": repeat, "chain": chain}[case.mode], count


def measure(provider: Provider, case: Case, replays: int) -> timing.Timing:
    """Time a call on operands made for the case, on the device or in mode "host" on the host. replays: of the graph."""
    weights = weights_of(case)
    if case.mode == "host":
        inputs = operands(case, 1)[0]
        return timing.host(lambda: invoke(provider, inputs, weights))

    def step(inputs: Tensors) -> tuple[Any, ...]:
        results = invoke(provider, inputs, weights)
        # Quantised rows are no operand of the next norm: the sum is what it depends on.
        return (inputs[0], results[-1]) if case.mode == "chain" and case.op in QUANTISED else results

    launches, count = _launches(case, step)
    return timing.replay(launches, count, replays)


def measure_roofline(case: Case, replays: int) -> float | None:
    """Best time of the same traffic without the norm, over in-place and distinct outputs and several block sizes."""
    if case.mode not in ("cold", "hot") or case.variant:
        return None
    best = []
    for config in roofline.CONFIGS:
        for in_place in (True, False) if case.op == FUSED or case.op in QUANTISED else (False,):
            traffic = (
                partial(_quantised_traffic, QUANTISED[case.op].both) if case.op in QUANTISED else _TRAFFIC[case.op]
            )
            launches, count = _launches(case, partial(traffic, config=config, in_place=in_place))
            best.append(timing.replay(launches, count, max(5, replays // 2)).us)
    return min(best)


def _fused_traffic(inputs: Tensors, config: tuple[int, int], in_place: bool) -> Tensors:
    x, residual = inputs
    normed, total = inputs if in_place else map(torch.empty_like, inputs)
    roofline.fused_add_traffic(x, residual, normed, total, config)
    return normed, total


def _norm_traffic(inputs: Tensors, config: tuple[int, int], in_place: bool) -> Tensors:
    normed = torch.empty_like(inputs[0])
    roofline.norm_traffic(inputs[0], normed, config)
    return (normed,)


def _pair_traffic(inputs: Tensors, config: tuple[int, int], in_place: bool) -> Tensors:
    q, k = inputs
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    roofline.pair_traffic(q, k, q_out, k_out, config)
    return q_out, k_out


def _quantised_traffic(both: bool, inputs: Tensors, config: tuple[int, int], in_place: bool) -> Tensors:
    """Of the scales, which are a hundredth of the bytes, nothing."""
    x, residual = inputs
    rows, total = torch.empty_like(x, dtype=torch.int8), residual if in_place else torch.empty_like(x)
    normed = torch.empty_like(x) if both else x
    roofline.quantised_traffic(x, residual, rows, normed if both else None, total, config)
    return rows, normed, total


_TRAFFIC: dict[str, Callable[..., Tensors]] = {FUSED: _fused_traffic, PLAIN: _norm_traffic, PAIR: _pair_traffic}
