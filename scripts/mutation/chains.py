"""What a probe is, and probes of kernels that start behind a kernel that is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Probe(NamedTuple):
    """One judged call. rows: the schedule's. call: says what is wrong, "" if nothing. capability: whose schedules are
    taken, 0 for the device's own."""

    rows: int
    call: Callable[[], str]
    name: str
    capability: int = 0


def in_a_chain(step: Callable[[Any], Any], start: Any) -> str:
    """Calls of which each reads what the one in front has written, queued behind a device that lags: each must wait for
    the kernel in front as it does where nothing is under way."""
    import torch

    def ran(apart: bool) -> Any:
        state = start.clone()
        for _ in range(12):
            state = step(state)
            if apart:
                torch.cuda.synchronize()
        return state

    expected = ran(apart=True)
    for _ in range(6):
        torch.cuda._sleep(2_000_000)
        found = ran(apart=False)
        if not torch.equal(found, expected):
            return f"{int((found != expected).sum())} elements differ behind a kernel that is under way"
    return ""


def chains(op: str) -> Iterator[Probe]:
    import torch

    from rmsnorm_patch import ops
    from rmsnorm_patch.fused.gated_norm import op as gated
    from rmsnorm_patch.fused.linear_norm import kernel as partials
    from rmsnorm_patch.fused.norm_add.op import bind_norm_add
    from rmsnorm_patch.fused.norm_quantised.op import quant_args
    from rmsnorm_patch.fused.query_key_norm import kernel as pair
    from rmsnorm_patch.fused.query_key_norm.rotated import bind_rms_norm_rotated
    from rmsnorm_patch.numerics.gating import GateSpec
    from rmsnorm_patch.numerics.quantisation import QuantSpec
    from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, LLAMA

    def call(m: int, n: int) -> str:
        torch.manual_seed(1)
        x, other = (torch.randn(m, n, device="cuda").bfloat16() for _ in range(2))
        weight = torch.rand(n, device="cuda").bfloat16() + 0.5

        def quantised(state: torch.Tensor) -> torch.Tensor:
            rest = (weight, None, "fp8_token", 1e-6, *ops.spec_args(LLAMA, "cuda"), *quant_args(QuantSpec("fp8_token")))
            torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(other, state, *rest)
            return state

        def rotated(state: torch.Tensor) -> torch.Tensor:
            heads, keys = state.view(1, m, -1, 128), other.view(1, m, -1, 128)[:, :, :1]
            angles = other[:, :128].cos()[None], other[:, :128].sin()[None]
            made = bind_rms_norm_rotated(LLAMA)(heads, keys, weight[:128], weight[:128], 1e-6, *angles, 2)
            return made[0].transpose(1, 2).reshape(m, n)

        def parts(state: torch.Tensor) -> torch.Tensor:
            partials.bound(LLAMA, 2)(pieces, state, weight, 1e-6, normed)
            return state

        pieces, normed = torch.randn(2, m, n, device="cuda"), torch.empty_like(x)
        step: Callable[[Any], Any] = {
            "norm": lambda state: ops.bind_fused_add_rms_norm(LLAMA, "cuda")(state, other, weight, 1e-6)[0],
            "add": lambda state: bind_norm_add(LLAMA, "cuda")(state, other, weight, 1e-6),
            "gated": lambda state: gated.bind(FP32_WEIGHT_MULTIPLY, GateSpec("silu", "norm_first"), "cuda")(
                state, other, weight, 1e-6
            ),
            "pair": lambda state: pair.bind_rms_norm_pair(LLAMA)(state, other[:8], weight, weight, 1e-6)[0],
            "rotated": rotated,
            "quantised": quantised,
            "parts": parts,
        }[op]
        return in_a_chain(step, x)

    capability = 0
    if op == "streamed":
        op, sizes, capability = "norm", ((64, 131072),), 80
    else:
        sizes = {"pair": ((4000, 512),), "rotated": ((4000, 512),), "parts": ((16, 8192),)}.get(
            op, ((600, 8192), (8, 4096))
        )
    for m, n in sizes:
        rows = m + 8 if op == "pair" else m
        yield Probe(rows, lambda m=m, n=n: call(m, n), f"{op} behind {op} {m} {n}", capability)
