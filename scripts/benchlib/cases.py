"""Operands of a case, its fp64 truth, and the launches of each timing mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import roofline, timing
from .providers import Provider

EPS = 1e-6
FUSED = "fused_add_rms_norm"

MAX_REL_ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-19}
"""Largest |got - fp64| / max(|fp64|, row scale): two roundings of the output dtype (ulp/2 each, 2**-8 relative for
bf16), or for fp32 the rounding of a sum of up to 2**18 squares."""


@dataclass(frozen=True)
class Case:
    op: str
    mode: str
    dtype: torch.dtype
    m: int
    n: int


def operands(case: Case, sets: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator("cuda").manual_seed(seed)
    new = lambda: torch.randn(case.m, case.n, device="cuda", generator=generator).to(case.dtype)  # noqa: E731
    if case.op == FUSED:
        return [(new(), new()) for _ in range(sets)]
    return [(new(), None) for _ in range(sets)]


def weight_of(case: Case) -> torch.nn.Parameter:
    """A parameter, as in a model: only such a weight may be read before the previous kernel has finished, so a plain
    tensor times a launch without the dependent-launch attribute (1 x 4096 in a chain: 1.69 us in place of 1.04)."""
    generator = torch.Generator("cuda").manual_seed(1)
    weight = 1 + 0.1 * torch.randn(case.n, device="cuda", generator=generator)
    return torch.nn.Parameter(weight.to(case.dtype), requires_grad=False)


def invoke(provider: Provider, x, residual, weight):
    """(normed, total) of one call; an in-place provider leaves them in (x, residual)."""
    if provider.op != FUSED:
        return provider.call(x, weight, EPS), None
    out = provider.call(x, residual, weight, EPS)
    return (x, residual) if provider.in_place else (out[0], out[1])


def check(provider: Provider, case: Case) -> str:
    """Empty where the provider's result is right on fresh data, else what is wrong with it."""
    torch._dynamo.reset()  # one graph for each shape: after eight shapes the ninth would be refused
    (x, residual), weight = operands(case, 1, seed=17)[0], weight_of(case)
    total64 = x.double() if residual is None else (x + residual).double()
    want = total64 * torch.rsqrt(total64.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()
    want_sum = None if residual is None else x + residual
    normed, total = invoke(provider, x.clone(), None if residual is None else residual.clone(), weight)
    torch.cuda.synchronize()
    if normed.shape != want.shape or normed.dtype != case.dtype:
        return f"returned {tuple(normed.shape)} {normed.dtype}"
    if want_sum is not None and not torch.equal(total, want_sum):
        return f"residual sum differs in {(total != want_sum).float().mean().item():.2%} of elements"
    error = ((normed.double() - want).abs() / want.abs().clamp_min(2**-6)).max().item()
    return "" if error <= MAX_REL_ERROR[case.dtype] else f"relative error {error:.3g} > {MAX_REL_ERROR[case.dtype]:.3g}"


def _sets(case: Case) -> int:
    if case.mode != "cold":
        return 1
    per_set = roofline.bytes_moved(case.op, case.m, case.n, case.dtype)
    return max(4, min(64, -(-timing.COLD_BYTES // per_set)))


def _launches(case: Case, step: Callable) -> tuple[Callable[[], list], int]:
    """The enqueueing function of a graph mode and how many launches it makes; `step(x, r)` -> (normed, total)."""
    sets = operands(case, _sets(case))
    count = len(sets) if case.mode == "cold" else 50

    def rotate() -> list:
        return [step(x, r) for x, r in sets]

    def repeat() -> list:
        x, r = sets[0]
        return [step(x, r) for _ in range(count)]

    def chain() -> list:
        x, r = sets[0]
        for _ in range(count):
            x, total = step(x, r)
            r = total if total is not None else r
        return [x, r]

    return {"cold": rotate, "hot": repeat, "chain": chain}[case.mode], count


def measure(provider: Provider, case: Case, replays: int) -> timing.Timing:
    weight = weight_of(case)
    if case.mode == "host":
        (x, r) = operands(case, 1)[0]
        return timing.host(lambda: invoke(provider, x, r, weight))
    if case.mode == "kernel":
        case_sets = operands(case, 12)
        return timing.kernel_only([lambda x=x, r=r: invoke(provider, x, r, weight) for x, r in case_sets])
    launches, count = _launches(case, lambda x, r: invoke(provider, x, r, weight))
    return timing.replay(launches, count, replays)


def measure_roofline(case: Case, replays: int) -> float | None:
    """Best time of the same traffic without the norm, over in-place and distinct outputs and several block sizes."""
    if case.mode not in ("cold", "hot"):
        return None
    best = []
    for config in roofline.CONFIGS:
        for in_place in (True, False) if case.op == FUSED else (False,):

            def step(x, r, config=config, in_place=in_place):
                normed = x if in_place else torch.empty_like(x)
                total = r if in_place else (None if r is None else torch.empty_like(r))
                if r is None:
                    roofline.norm_traffic(x, normed, config)
                else:
                    roofline.fused_add_traffic(x, r, normed, total, config)
                return normed, total

            launches, count = _launches(case, step)
            best.append(timing.replay(launches, count, max(5, replays // 2)).us)
    return min(best)
