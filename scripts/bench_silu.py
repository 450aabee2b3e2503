"""Time silu_and_mul with quantised rows alone: our kernels beside vLLM's ops, Inductor and a copy of the same bytes.

    python scripts/bench_silu.py --json out.json

N is the width of an MLP: x is [M, 2 * N] of bf16. Each provider is held against fp64 first. A row of the JSON:
{"scheme", "mode", "m", "n", "us": {provider: median}, "spread", "failed"}. "vllm" is one op where vLLM has one
("static", "block"), else its two. Few rows are timed "hot", in a chain of launches over one set of operands; many are
timed "cold", from memory. Without a GPU the providers are checked and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rmsnorm_patch.bench import roofline, timing
from rmsnorm_patch.bench.providers.norms import compiled, vllm_op
from rmsnorm_patch.fused.silu_quantised import kernel
from rmsnorm_patch.numerics.quantisation import GROUP, QuantSpec, new_scales
from rmsnorm_patch.numerics.silu import Silu, silu_and_mul_quantised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
SCALE = 0.02
LEAST = 1 / (448 * 512)
SCHEMES: dict[str, tuple[Silu, QuantSpec]] = {
    "static": ("rounded", QuantSpec("fp8_static")),
    "token": ("fp32", QuantSpec("fp8_token", "fp32", "native")),
    "block": ("product", QuantSpec("fp8_block", "fp32")),
    "block-columns": ("product", QuantSpec("fp8_block", "fp32", layout="column_major")),
    "int8": ("fp32", QuantSpec("int8_token", "rounded", "separate")),
}
"""As engines have them by default, so far as these were read."""
FP8 = torch.float8_e4m3fn

Call = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""x -> (rows, scales); scales are of no meaning where the scale is given."""


def operands(m: int, n: int, sets: int) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    return [torch.randn(m, 2 * n, device=DEVICE, generator=generator).to(DTYPE) for _ in range(sets)]


def given_to(quant: QuantSpec) -> torch.Tensor | None:
    return torch.full((1,), SCALE, device=DEVICE) if quant.scheme == "fp8_static" else None


def _fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448.0, 448.0).to(FP8)


def inductor(scheme: str) -> Call:
    """As vLLM's native arithmetic stands in a compiled graph. int8's quantisation is an op there, never compiled."""
    given = given_to(SCHEMES[scheme][1])

    def body(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = x.shape[-1] // 2
        values = torch.nn.functional.silu(x[..., :n]) * x[..., n:]
        if given is not None:
            return _fp8(values.float() * given.reciprocal()), given
        if scheme == "token":
            scale = (values.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=LEAST)
            return _fp8(values.float() * scale.reciprocal()), scale
        grouped = values.unflatten(-1, (-1, GROUP))
        scale = (grouped.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=LEAST)
        return _fp8(grouped / scale).flatten(-2), scale.squeeze(-1)

    return compiled(body)


def vllm(scheme: str) -> Call:
    """ImportError or AttributeError where its library is not here or has no such op."""
    _, quant = SCHEMES[scheme]
    given, multiply = given_to(quant), vllm_op("silu_and_mul")
    whole = {"static": "silu_and_mul_quant", "block": "silu_and_mul_per_block_quant"}.get(scheme.partition("-")[0], "")
    op = vllm_op(whole or {"token": "dynamic_per_token_scaled_fp8_quant", "int8": "dynamic_scaled_int8_quant"}[scheme])

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.new_empty(x.shape[0], x.shape[1] // 2, dtype=quant.dtype)
        scales = new_scales(rows, quant)
        if scheme == "static":
            op(rows, x, given)
        elif whole:
            op(rows, x, scales, GROUP, None, quant.layout != "row_major")
        else:
            values = x.new_empty(rows.shape)
            multiply(values, x)
            op(rows, values, scales, None)
        return rows, scales

    return call


def providers(scheme: str) -> tuple[dict[str, Call], dict[str, str]]:
    """By name, and why others are missing."""
    silu, quant = SCHEMES[scheme]
    given = given_to(quant)
    found: dict[str, Call] = {"reference": lambda x: silu_and_mul_quantised(x, silu, quant, given)}
    missing = {}
    if DEVICE == "cuda":
        from rmsnorm_patch.fused.silu_quantised import portable

        ours = kernel.bound(silu, quant, given is not None, True)
        triton = portable.bound(silu, quant, True)
        found = {"ours": lambda x: ours(x, given), "ours_triton": lambda x: triton(x, given)}
        makers = {"vllm": vllm} | ({} if scheme in ("int8", "block-columns") else {"inductor": inductor})
        for name, make in makers.items():
            try:
                found[name] = make(scheme)
            except (ImportError, AttributeError, OSError) as error:
                missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def wrong(call: Call, scheme: str, x: torch.Tensor) -> str:
    """What is wrong with a result; "" where no element is more than a step from the exact one."""
    quant = SCHEMES[scheme][1]
    rows, scales = call(x)
    gate, up = x.double().chunk(2, -1)
    exact = gate / (1 + torch.exp(-gate)) * up
    if rows.shape != exact.shape or rows.dtype != quant.dtype:
        return f"returned {tuple(rows.shape)} {rows.dtype}"
    if quant.scheme == "fp8_static":
        whole = torch.full_like(exact[:, :1], SCALE)
    else:
        size = GROUP if quant.scheme == "fp8_block" else exact.shape[-1]
        whole = scales.double().reshape(exact.shape[0], -1).repeat_interleave(size, -1)
    step = 0.0 if quant.dtype == torch.int8 else 2.0**-4
    allowed = exact.abs() * (step + 2.0**-6) + whole * (0.51 if quant.dtype == torch.int8 else 2.0**-9)
    beyond = (rows.double() * whole - exact).abs() > allowed
    return f"{beyond.double().mean().item():.2%} of elements are beyond half a step" if beyond.any() else ""


def bytes_of(scheme: str, m: int, n: int) -> int:
    return m * (2 * n * DTYPE.itemsize + n + 4 * SCHEMES[scheme][1].groups(n))


def measure(call: Call, scheme: str, m: int, n: int, mode: str, replays: int) -> timing.Timing:
    count = max(4, min(64, timing.COLD_BYTES // bytes_of(scheme, m, n))) if mode == "cold" else 1
    sets, repeats = operands(m, n, count), 1 if mode == "cold" else 50
    launches = lambda: [call(x) for _ in range(repeats) for x in sets]  # noqa: E731
    return timing.replay(launches, count * repeats, replays)


def copy(m: int, n: int) -> list[Call]:
    """Reads of x and writes of a byte an element, one call for each configuration."""

    def made(config: tuple[int, int]) -> Call:
        def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = torch.empty(m, n, dtype=torch.int8, device=x.device)
            roofline.norm_traffic(x.view(torch.int32), rows, config)
            return rows, rows

        return call

    return [made(config) for config in roofline.CONFIGS]


def run(scheme: str, m: int, n: int, replays: int) -> dict[str, Any]:
    torch._dynamo.reset()
    mode = "cold" if m >= 1024 else "hot"
    us, spread = {}, {}
    found, failed = providers(scheme)
    for name, call in found.items():
        fault = wrong(call, scheme, operands(m, n, 1)[0])
        if fault:
            failed[name] = fault
        elif DEVICE == "cuda":
            taken = measure(call, scheme, m, n, mode, replays)
            us[name], spread[name] = round(taken.us, 4), [round(taken.low, 4), round(taken.high, 4)]
    if DEVICE == "cuda" and mode == "cold":
        us["copy"] = round(min(measure(call, scheme, m, n, mode, replays).us for call in copy(m, n)), 4)
    return {"scheme": scheme, "mode": mode, "m": m, "n": n, "us": us, "spread": spread, "failed": failed}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256, 4096, 16384])
    parser.add_argument("--columns", type=int, nargs="+", default=[14336], help="of a row's results")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    rows = []
    with torch.no_grad():
        for scheme in options.scheme:
            for n in options.columns:
                for m in options.rows:
                    row = run(scheme, m, n, options.replays)
                    rows.append(row)
                    times = "  ".join(f"{name} {t:.2f}" for name, t in sorted(row["us"].items(), key=lambda kv: kv[1]))
                    print(f"{scheme:13} {row['mode']:4} {m:>5} x {n}: {times} {row['failed'] or ''}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
