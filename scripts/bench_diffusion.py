"""Milliseconds of one denoising step of a diffusion transformer, stock against patched, on random weights.

    python scripts/bench_diffusion.py --model ltx --json records/diffusion/nvidia-h200.json
    python scripts/bench_diffusion.py --model wan --frames 5 --height 60 --width 104 --modes eager

Each variant is a copy of one model. Its result is held against eager stock's before anything is timed. Rounds visit the
variants in turn, forwards and then backwards. Weights are cast as diffusers casts those of a checkpoint. frames,
height, width: of the latent video. Compiled are the repeated blocks, as diffusers does it (`compile_repeated_blocks`);
mode "with ops" keeps our ops in the graphs (RMSNORM_PATCH_COMPILE=op).

The JSON: {"digest" of the kernels and launch code, "device", "versions", "date", "commit", "rows"}. A row: {"model",
"mode": "eager" | "compiled" | "with ops", "tokens", "layers", "sites": the plan's by kind and action, "ms": {variant:
median of the rounds}, "spread": {variant: [least, most]}, "ratio_to_stock": {variant: stock's median over its own},
"difference": {variant: relative distance from eager stock's result}}. Rows of the same file, code and device are kept,
those of the same model and mode replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_record  # noqa: E402
from benchlib.stamp import stamp  # noqa: E402

import rmsnorm_patch  # noqa: E402
from rmsnorm_patch import ops  # noqa: E402
from rmsnorm_patch.bench.versions import versions  # noqa: E402

MAX_DIFFERENCE = 0.03
"""Relative Frobenius distance of bf16 results that differ in rounding alone; another eps or weight is far above."""
MODES = ("eager", "compiled", "with ops")
Step = Callable[[torch.nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Video:
    """Latent sizes: (frames, height, width), and how many latents make a token."""

    frames: int
    height: int
    width: int
    patch: int = 1

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width // self.patch


def ltx(layers: int | None, video: Video, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Step]:
    """LTX-Video's own sizes: 32 heads of 64."""
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(num_layers=layers or 28)
    given = {
        "hidden_states": torch.randn(1, video.tokens, 128, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 128, 4096, device=device, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, 128, device=device, dtype=torch.bool),
        "timestep": torch.tensor([500], device=device),
        "num_frames": video.frames,
        "height": video.height,
        "width": video.width,
    }
    return model, lambda made: made(**given, return_dict=False)[0]


def wan(layers: int | None, video: Video, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Step]:
    """Wan 2.1's 1.3B sizes: 12 heads of 128, 30 layers."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=layers or 30)
    given = {
        "hidden_states": torch.randn(1, 16, video.frames, video.height, video.width, device=device, dtype=dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=device, dtype=dtype),
    }
    return model, lambda made: made(**given, return_dict=False)[0]


MODELS = {"ltx": (ltx, Video(13, 16, 24)), "wan": (wan, Video(5, 60, 104, patch=4))}
"""Builder, and the latent video where none is given: 97 frames of 512 x 768, and 17 of 480 x 832."""


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Parameters in `dtype`, those that the class keeps in fp32 left so, as `from_pretrained(torch_dtype=)` does."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_ms(model: torch.nn.Module, step: Step, repeats: int) -> float:
    step(model)
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        step(model)
    sync()
    return 1e3 * (time.perf_counter() - start) / repeats


def variants_of(
    model: torch.nn.Module, mode: str, compiler: str | Step
) -> tuple[dict[str, torch.nn.Module], dict[str, int]]:
    """The model by variant, and the sites that patching fused, by kind."""
    torch._dynamo.reset()  # a graph of the same code would serve again, whether it has our ops or not
    made = {"stock": copy.deepcopy(model), "patched": copy.deepcopy(model)}
    counts = rmsnorm_patch.apply(made["patched"]).counts()
    for variant in made.values():
        if mode != "eager":
            variant.compile_repeated_blocks(backend=compiler, dynamic=False)
    return made, counts


def check(made: dict[str, torch.nn.Module], mode: str, step: Step, want: torch.Tensor) -> dict[str, float]:
    """Relative distance of each variant's result; over the limit ends the run. Graphs are made here."""
    differences = {}
    for name, model in made.items():
        with graphs_keep_ops(mode == "with ops"):
            differences[name] = ((step(model).float() - want).norm() / want.norm()).item()
        if not differences[name] <= MAX_DIFFERENCE:
            raise SystemExit(f"bench_diffusion: {name} differs by {differences[name]:.3g} > {MAX_DIFFERENCE}")
    return differences


@contextlib.contextmanager
def graphs_keep_ops(asked: bool) -> Iterator[None]:
    """Graphs that are traced meanwhile have our ops, or the model's arithmetic."""
    before = os.environ.get(ops.COMPILE_VARIABLE)
    os.environ[ops.COMPILE_VARIABLE] = "op" if asked else ""
    try:
        yield
    finally:
        os.environ.pop(ops.COMPILE_VARIABLE)
        if before is not None:
            os.environ[ops.COMPILE_VARIABLE] = before


def alternate(made: dict[str, torch.nn.Module], step: Step, rounds: int, repeats: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        for name in list(made) if turn % 2 == 0 else list(made)[::-1]:
            samples[name].append(step_ms(made[name], step, repeats))
    return samples


@torch.no_grad()
def rows_of(name: str, args: argparse.Namespace, device: str) -> list[dict]:
    build, video = MODELS[name]
    sizes = (args.frames or video.frames, args.height or video.height, args.width or video.width)
    video = Video(*sizes, video.patch)
    torch.manual_seed(0)
    with torch.device(device):
        model, step = build(args.layers, video, device, torch.bfloat16)
    cast(model, torch.bfloat16)
    want = step(model).float()
    rows = []
    for mode in args.modes:
        made, counts = variants_of(model, mode, args.compiler)
        differences = check(made, mode, step, want)
        samples = alternate(made, step, args.rounds, args.repeats)
        medians = {variant: statistics.median(values) for variant, values in samples.items()}
        rows.append(
            {
                "model": name,
                "mode": mode,
                "tokens": video.tokens,
                "layers": args.layers,
                "sites": counts,
                "ms": {variant: round(value, 3) for variant, value in medians.items()},
                "spread": {variant: [round(min(v), 3), round(max(v), 3)] for variant, v in samples.items()},
                "ratio_to_stock": {variant: round(medians["stock"] / value, 4) for variant, value in medians.items()},
                "difference": differences,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        del made
    return rows


def merged(path: Path, found: dict) -> dict:
    """`found` with the rows of the file that it does not replace; another code's or device's are dropped."""
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if any(before.get(key) != found[key] for key in ("digest", "device")):
        return found
    fresh = {(row["model"], row["mode"]) for row in found["rows"]}
    return {**found, "rows": [r for r in before["rows"] if (r["model"], r["mode"]) not in fresh] + found["rows"]}


def run(args: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for name in args.model for row in rows_of(name, args, device)]
    gpu = torch.cuda.get_device_name() if device == "cuda" else device
    found = {"digest": gpu_record.digest(), "device": gpu, "versions": versions("diffusers"), **stamp(), "rows": rows}
    if args.json:
        found = merged(args.json, found)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), default=["ltx"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--repeats", type=int, default=5, help="steps per round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    parser.add_argument("--json", type=Path)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
