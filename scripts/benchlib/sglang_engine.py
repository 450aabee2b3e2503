"""One SGLang engine in a process of its own, with our plugin or without it: its answers, and how long steps take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
GROUP = "sglang.srt.plugins"
ENGINE = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "disable_radix_cache": True,
    "skip_tokenizer_init": True,
    "random_seed": 0,
    "log_level": "info",
}
"""Arguments of every engine: Triton's attention, so that what is timed needs no kernel that is built first."""
SECONDS = 900


def answer(job: dict[str, Any], patched: bool, folder: Path) -> tuple[dict[str, Any], str]:
    """Start an engine in `folder`; (its answer, its log). RuntimeError with the log's end where it fails. The log is
    `folder`/engine.log, with the time of each line, also of an engine that somebody ends.

    job: {"engine": further arguments of `sglang.Engine`, "prompts": token ids, "new_tokens": of each, "steps": {batch:
    tokens of a round}, "rounds": count}. The answer: {"tokens", "logprobs": of each prompt, "step_ms": {batch: [one for
    each round]}, "ready_s"}. A round is the time of all new tokens but the first, over their number.
    """
    site = folder / "site"
    info = site / "rmsnorm_patch-0.dist-info"  # the entry point of a checkout that nobody installed
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rmsnorm_patch\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["RMSNORM_PATCH_SGLANG"] = "auto" if patched else "off"
    words = [sys.executable, __file__, str(folder), json.dumps(job)]
    path = folder / "engine.log"
    with path.open("w") as file:
        done = subprocess.run(words, env=environment, stdout=file, stderr=file, timeout=SECONDS, check=False)
    log = path.read_text(errors="replace")
    if done.returncode:
        raise RuntimeError(f"the engine ended with {done.returncode}: {log[-6000:]}")
    return json.loads((folder / "out.json").read_text()), log


def generate(engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int, logprobs: bool = False) -> list[Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return engine.generate(input_ids=[list(p) for p in prompts], sampling_params=sampling, return_logprob=logprobs)


def step_ms(engine: Any, batch: int, new_tokens: int) -> float:
    """Milliseconds of a decode step: prefill and first token are timed alone, and taken off."""
    prompts = [[3 + (7 * row + column) % 200 for column in range(64)] for row in range(batch)]

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        generate(engine, prompts, count)
        return time.perf_counter() - begun

    return 1e3 * (seconds(new_tokens) - seconds(1)) / (new_tokens - 1)


def main() -> None:
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    begun = time.perf_counter()
    import sglang

    engine = sglang.Engine(**ENGINE, **job["engine"])
    ready = time.perf_counter() - begun
    made = generate(engine, job["prompts"], job["new_tokens"], logprobs=True) if job["prompts"] else []
    steps: dict[str, list[float]] = {}
    for batch, tokens in job["steps"].items():
        step_ms(engine, int(batch), tokens)
        steps[batch] = [step_ms(engine, int(batch), tokens) for _ in range(job["rounds"])]
    out = {
        "tokens": [one["output_ids"] for one in made],
        "logprobs": [[row[0] for row in one["meta_info"]["output_token_logprobs"]] for one in made],
        "step_ms": steps,
        "ready_s": ready,
    }
    (folder / "out.json").write_text(json.dumps(out))
    engine.shutdown()


if __name__ == "__main__":
    main()
