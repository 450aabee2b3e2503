"""Milliseconds of a decode step of SGLang engines with dummy weights and CUDA graphs, stock against patched.

    python scripts/bench_sglang.py --shape llama-1b llama-8b --json records/sglang/nvidia-h200.json

Each engine is a process of its own. They start in the order stock, patched, patched, stock, so that a clock that drifts
hits both.

The JSON: {"digest" of the kernels and launch code, "device", "versions", "date", "commit", "rows"}. A row: {"shape",
"batch", "ms": {variant: median of all rounds}, "spread": {variant: [least, most]}, "ratio_to_stock": stock's median
over patched's, "served": functions of SGLang that the patched engine's log names}.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_record  # noqa: E402
from benchlib import sglang_engine  # noqa: E402
from benchlib.stamp import stamp  # noqa: E402
from benchlib.vllm_engine import SHAPES  # noqa: E402

from rmsnorm_patch.bench.versions import versions  # noqa: E402

ORDER = ("stock", "patched", "patched", "stock")
STEPS = {1: 128, 8: 128, 32: 96}
"""Batch -> tokens generated for each sequence in one round."""


def rows_of(shape: str, rounds: int, batches: list[int]) -> list[dict]:
    config, engine = SHAPES[shape]
    samples: dict[tuple[str, str], list[float]] = {}
    served: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        steps = {str(batch): STEPS[batch] for batch in batches}
        arguments = {**engine, "model_path": name, "load_format": "dummy", "cuda_graph_bs_decode": batches}
        job = {"engine": arguments, "prompts": [], "new_tokens": 0, "steps": steps, "rounds": rounds}
        for variant in ORDER:
            out, log = sglang_engine.answer(job, variant == "patched", folder)
            print(f"{shape} {variant}: ready in {out['ready_s']:.0f} s, {out['step_ms']}", flush=True)
            served |= set(re.findall(r"rmsnorm_patch: (\w+) of \d+ columns is served", log))
            for batch, times in out["step_ms"].items():
                samples.setdefault((batch, variant), []).extend(times)
    rows = []
    for batch in steps:
        times = {variant: samples[batch, variant] for variant in ("stock", "patched")}
        ms = {variant: statistics.median(values) for variant, values in times.items()}
        rows.append(
            {
                "shape": shape,
                "batch": int(batch),
                "ms": {variant: round(value, 4) for variant, value in ms.items()},
                "spread": {variant: [round(min(v), 4), round(max(v), 4)] for variant, v in times.items()},
                "ratio_to_stock": round(ms["stock"] / ms["patched"], 4),
                "served": sorted(served),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-1b"])
    parser.add_argument("--batch", nargs="+", type=int, choices=sorted(STEPS), default=sorted(STEPS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench_sglang: needs a CUDA device")
    rows = [row for shape in args.shape for row in rows_of(shape, args.rounds, args.batch)]
    found = {"digest": gpu_record.digest(), "device": torch.cuda.get_device_name(), **stamp()}
    found |= {"versions": versions("sglang", "sglang-kernel"), "rows": rows}
    print(json.dumps(rows, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
