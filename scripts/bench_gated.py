"""Time gated norms alone: our kernels beside the modules of transformers, eager and compiled, with their real shapes.

    python scripts/bench_gated.py --json out.json

Rows are tokens, for Qwen3-Next a row for each of 32 value heads. Each provider is held against the module first. A row
of the JSON: {"model", "mode", "tokens", "m", "n", "group", "us": {provider: median}, "spread", "failed"}. Modes are
those of `rmsnorm-patch bench-kernels`; without a GPU the providers are checked and nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from rmsnorm_patch.bench import timing
from rmsnorm_patch.fused.gated_norm import op
from rmsnorm_patch.numerics.tolerances import GATED
from rmsnorm_patch.proof.difference import compare
from rmsnorm_patch.scan.norms import infer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
EPS = 1e-6

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A module of transformers as a published checkpoint has it. rows: for a token. packed: columns of the projection
    that the gate is a part of."""

    module: str
    arguments: dict[str, int]
    n: int
    rows: int = 1
    packed: int | None = None


SHAPES = {
    "qwen3_next": Shape("qwen3_next.Qwen3NextRMSNormGated", {}, 128, rows=32),
    "mamba2": Shape("mamba2.MambaRMSNormGated", {"group_size": 1024}, 8192, packed=18560),
    "bamba": Shape("bamba.BambaRMSNormGated", {"group_size": 8192}, 8192, packed=16768),
}


def module_of(shape: Shape) -> nn.Module:
    folder, _, name = shape.module.partition(".")
    cls: Any = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    missing = shape.arguments.keys() - inspect.signature(cls).parameters.keys()
    if missing:
        raise SystemExit(f"bench_gated: {name} takes no {', '.join(missing)}; install transformers 5.24 or newer")
    norm: nn.Module = cls(shape.n, **shape.arguments, eps=EPS)
    torch.manual_seed(0)
    norm.weight = nn.Parameter(torch.rand(shape.n).add(0.5).to(DTYPE), requires_grad=False)
    return norm.to(DEVICE).eval()


def operands(shape: Shape, tokens: int, sets: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    new = lambda m, n: torch.randn(m, n, device=DEVICE, generator=generator).to(DTYPE)  # noqa: E731
    m = tokens * shape.rows
    return [(new(m, shape.n), new(m, shape.packed or shape.n)[:, : shape.n]) for _ in range(sets)]


def providers(norm: nn.Module) -> dict[str, Call]:
    """By name; "eager" is the module's own forward."""
    match = infer_norm(norm)
    assert match.spec is not None, match.reason
    assert match.gating is not None, match.reason
    weight: Any = norm.weight
    found: dict[str, Call] = {"eager": norm}
    if DEVICE == "cuda":
        ours, portable = (op.bind(match.spec, match.gating, backend) for backend in ("cuda", "triton"))
        found["ours"] = lambda x, gate: ours(x, gate, weight, EPS)
        found["ours_triton"] = lambda x, gate: portable(x, gate, weight, EPS)
        found["inductor"] = torch.compile(norm, dynamic=False)
    else:
        reference = op.bind(match.spec, match.gating, "reference")
        found["ours"] = lambda x, gate: reference(x, gate, weight, EPS)
    return found


def wrong(call: Call, norm: nn.Module, x: torch.Tensor, gate: torch.Tensor, exact: bool) -> str:
    """What is wrong with a result; "" where it is the module's within what a kernel may differ by. A compiler that
    drops roundings is no reference, and need not be near."""
    got, want = call(x, gate), norm(x, gate)
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"returned {tuple(got.shape)} {got.dtype}"
    violations = compare(got, want).violations(GATED[DTYPE], DTYPE)
    return "; ".join(violations) if exact else ""


def measure(call: Call, shape: Shape, tokens: int, mode: str, replays: int) -> timing.Timing:
    if mode == "host":
        x, gate = operands(shape, tokens, 1)[0]
        return timing.host(lambda: call(x, gate))
    bytes_of_set = 3 * tokens * shape.rows * shape.n * DTYPE.itemsize
    count = max(4, min(64, timing.COLD_BYTES // bytes_of_set)) if mode == "cold" else 1
    sets, repeats = operands(shape, tokens, count), 1 if mode == "cold" else 50
    launches = lambda: [call(x, gate) for _ in range(repeats) for x, gate in sets]  # noqa: E731
    return timing.replay(launches, count * repeats, replays)


def run(model: str, mode: str, tokens: int, replays: int) -> dict[str, Any]:
    torch._dynamo.reset()
    shape = SHAPES[model]
    norm = module_of(shape)
    us, spread, failed = {}, {}, {}
    for name, call in providers(norm).items():
        fault = wrong(call, norm, *operands(shape, tokens, 1)[0], exact=name != "inductor")
        if fault:
            failed[name] = fault
        elif DEVICE == "cuda":
            taken = measure(call, shape, tokens, mode, replays)
            us[name], spread[name] = round(taken.us, 4), [round(taken.low, 4), round(taken.high, 4)]
    shapes = {"m": tokens * shape.rows, "n": shape.n, "group": shape.arguments.get("group_size")}
    return {"model": model, "mode": mode, "tokens": tokens, **shapes, "us": us, "spread": spread, "failed": failed}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--mode", nargs="+", choices=("cold", "hot", "host"), default=["hot", "cold", "host"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 4096])
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    rows = []
    with torch.no_grad():
        for model in options.model:
            for mode, tokens in ((mode, tokens) for mode in options.mode for tokens in options.tokens):
                if (mode == "cold") is (tokens < 1024) or (mode == "host" and tokens > 8):
                    continue  # few rows lie in the L2, many come from memory, and a host is timed on short work
                row = run(model, mode, tokens, options.replays)
                rows.append(row)
                times = "  ".join(f"{name} {t:.2f}" for name, t in sorted(row["us"].items(), key=lambda kv: kv[1]))
                print(f"{model} {mode:4} {tokens:>5} tokens, {row['m']} x {row['n']}: {times} {row['failed'] or ''}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
