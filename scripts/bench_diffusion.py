"""Milliseconds of one denoising step of a diffusion transformer, stock against patched, on random weights.

    python scripts/bench_diffusion.py --model ltx --json out.json
    python scripts/bench_diffusion.py --model wan --frames 21 --height 60 --width 104

Both variants share one model: it is patched and reverted between rounds, which alternate in order. The step's result
is compared before it is timed. frames, height, width: of the latent video.

The JSON: {"model", "device", "tokens", "layers", "ms": {variant: median}, "spread": {variant: [least, most]},
"speedup": stock over patched, "difference": relative distance of the results}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rmsnorm_patch

MAX_DIFFERENCE = 0.03
"""Relative Frobenius distance of bf16 results that differ in rounding alone; another eps or weight is far above."""


def ltx(
    args: argparse.Namespace, device: str, dtype: torch.dtype
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """LTX-Video's own sizes: 32 heads of 64."""
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(num_layers=args.layers or 28)
    tokens = args.frames * args.height * args.width
    model = model.to(device, dtype).eval()
    given = {
        "hidden_states": torch.randn(1, tokens, 128, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 128, 4096, device=device, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, 128, device=device, dtype=torch.bool),
        "timestep": torch.tensor([500], device=device),
        "num_frames": args.frames,
        "height": args.height,
        "width": args.width,
    }
    return model, lambda: model(**given, return_dict=False)[0]


def wan(
    args: argparse.Namespace, device: str, dtype: torch.dtype
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Wan 2.1's 1.3B sizes: 12 heads of 128, 30 layers."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=args.layers or 30)
    model = model.to(device, dtype).eval()
    given = {
        "hidden_states": torch.randn(1, 16, args.frames, args.height, args.width, device=device, dtype=dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=device, dtype=dtype),
    }
    return model, lambda: model(**given, return_dict=False)[0]


MODELS = {"ltx": ltx, "wan": wan}


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_ms(call: Callable[[], torch.Tensor], repeats: int) -> float:
    call()
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    sync()
    return 1e3 * (time.perf_counter() - start) / repeats


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, call = MODELS[args.model](args, device, torch.bfloat16)
    want = call().float()
    with rmsnorm_patch.patched(model) as report:
        difference = ((call().float() - want).norm() / want.norm()).item()
        print(report.counts(), flush=True)
    if not difference <= MAX_DIFFERENCE:
        raise SystemExit(f"bench_diffusion: patched differs from stock by {difference:.3g} > {MAX_DIFFERENCE}")
    samples: dict[str, list[float]] = {"stock": [], "patched": []}
    for turn in range(args.rounds):
        for variant in ("stock", "patched") if turn % 2 == 0 else ("patched", "stock"):
            if variant == "patched":
                with rmsnorm_patch.patched(model):
                    samples[variant].append(step_ms(call, args.repeats))
            else:
                samples[variant].append(step_ms(call, args.repeats))
    medians = {variant: statistics.median(values) for variant, values in samples.items()}
    found = {
        "model": args.model,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "tokens": args.frames * args.height * args.width // (1 if args.model == "ltx" else 4),
        "layers": args.layers,
        "ms": {variant: round(value, 3) for variant, value in medians.items()},
        "spread": {variant: [round(min(v), 3), round(max(v), 3)] for variant, v in samples.items()},
        "speedup": round(medians["stock"] / medians["patched"], 4),
        "difference": difference,
    }
    print(json.dumps(found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="ltx")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--height", type=int, default=16)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5, help="steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
