"""Tokens per second and device time of a decode step of a vLLM engine: stock, patched, and norms and adds removed.

    python scripts/bench_vllm.py --json out.json
    python scripts/bench_vllm.py --engines llama-8b:stock llama-8b:ir llama-8b-fp8:stock llama-8b-fp8:ir --rounds 5
    python scripts/bench_vllm.py --engines llama-8b:stock+ir+removed
    python scripts/bench_vllm.py --engines llama-8b-token:stock+ir --kernels 1 256 --rounds 4 --json out.json

Every engine is a process of its own with dummy weights, the default compile mode and CUDA graphs. All of them start at
once; then they are measured one at a time in alternating rounds, so that clocks and host noise hit all of them.

Where operands lie in the device's memory moves matrix products by as much as all norms together cost, and stays as it
is for the life of an engine (docs/decisions/vllm_measured.md). Variants joined by "+" are engines of one process with
one set of weights, which takes a part of that away; their rows say "shared". Before every round but the first, each
engine captures its decode graphs again, with activations elsewhere in memory ("captures"). Judge over several starts.
What was captured before stays in memory beside it: each round takes some more, unless --keep-graphs leaves the first
in place.

Each engine also compiles for itself, and Inductor times candidates while it does. "--untimed" has it take its first
choice everywhere, so that two engines' other kernels are the same ones; vLLM's default lets it time.

Quantised engines have the scheme behind the shape: "-static", "-token" and "-block" have fp8 products (the last as vLLM
chooses them, or of one library: "-block-deepgemm", "-block-cutlass"), "-int8" and "-w4a16" others, and "-fp8" is
quantised at load. One scheme at a time fits on a GPU of 80 GB. "qwen3-moe-fp8" has experts: 12 of the 48 layers of a
Qwen3-30B-A3B. "-invariant" gives a request the same bits in every batch (VLLM_BATCH_INVARIANT).

"ir@PATH" is the engine "ir" with its graphs captured under other schedules, one kernel's file or a folder of them;
"ir@plain" with norms that are not launched dependently. The rest of such a step is the same kernels, so that small
differences count.

Device time: the graph of the last decode step is replayed back to back between two CUDA events, without the host in
between. "removed" replaces every norm, with its residual add, by nothing: a ceiling with no right answer. Activations
collapse there, and matrix products run faster on them: it holds only where weights dominate, at batches up to 32.

Ideas that lost, to be measured again: "-dependent" launches the compiler's own kernels dependently too
(`triton.enable_pdl`), "ir-heads" serves the norms over q and k heads, which the plugin leaves to the compiler, and
"ir-functional" returns new tensors where the plugin writes into its inputs. "ir-apart" is the plugin without its taking
over what is left of split products (RMSNORM_PATCH_VLLM_LINEAR=off), "ir-adds-apart" without its taking adds into the
norms in front of them (RMSNORM_PATCH_VLLM_NORM_ADD=off). "ir-silu-off" leaves silu_and_mul to vLLM
(RMSNORM_PATCH_VLLM_SILU_QUANTISED=off), beside "ir" in one process: llama-8b-token:stock+ir+ir-silu-off.
"ir-blocks-off" leaves rows plain for FlashInfer and DeepGEMM (RMSNORM_PATCH_VLLM_BLOCKS=off):
llama-8b-block:stock+ir+ir-blocks-off. Records have "ir-silu" and "ir-blocks" from when these were off by default: such
an engine is "ir" now, and the "ir" beside it one of those two.
"ir-reorder" has splits of its own, which change bits (RMSNORM_PATCH_VLLM_LINEAR=reorder); as this is the setting of a
process, no engine "ir" can share it. "oot-noir" is route oot with vLLM's IR hidden: what a vLLM without it gets.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchlib.vllm_engine import RECORDED, VARIANTS, Setup, base_of, schedules_of, serve
from benchlib.vllm_shapes import ENVIRONMENT, SHAPES
from gpu_record import digest

from rmsnorm_patch.bench.versions import versions

DECODE = {1: 128, 8: 128, 32: 96, 256: 48}
"""Batch -> tokens generated for each sequence in one round."""
DEFAULT = [f"{shape}:{variant}" for shape in ("llama-8b", "llama-1b") for variant in ("stock", "ir", "removed")]


class Child:
    """The parent's side of a process with one engine, or with several that share their weights."""

    def __init__(self, name: str, setup: Setup, log: Path) -> None:
        self.shape, variants = name.split(":")
        self.name, self.variants = name, variants.split("+")
        routes = {VARIANTS[base_of(variant)][0] for variant in self.variants}
        environment = {
            **os.environ,
            "RMSNORM_PATCH_VLLM": max(routes, key=lambda route: route != "off"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_CACHE_ROOT": tempfile.mkdtemp(),
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process asks for CUDA devices before it forks
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            **ENVIRONMENT.get(self.shape, {}),
        }
        self.log = log
        command = [sys.executable, __file__, "--serve", name, "--decode", json.dumps(setup.decode)]
        command += ["--eager"] * setup.eager + ["--untimed"] * setup.untimed
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment
        )

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{self.name} ended; its log:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def ask(self, variant: str, do: str, *args: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"variant": variant, "do": do, "args": args}) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self.read()

    def capture(self, variant: str, anew: bool) -> bool:
        """Have the variant's graphs captured again, if it is to be anew or another of the same engine may have its own
        there. Returns whether they were; raises RuntimeError where a variant needs it and the engine cannot."""
        schedules = schedules_of(variant)
        alone = sum(base_of(other) == base_of(variant) for other in self.variants) == 1
        if alone and not anew and not schedules:
            return False
        again = bool(self.ask(variant, "recapture", schedules))
        if schedules and not again:
            raise RuntimeError(f"{self.name}: {variant} needs graphs that can be captured again: no --eager, vLLM 0.26")
        return again

    def selected(self) -> list[str]:
        """What each worker wrote about the plugin."""
        lines = self.log.read_text().splitlines()
        return [line.split("rmsnorm_patch: ", 1)[1] for line in lines if "rmsnorm_patch: " in line]


def start(names: list[str], setup: Setup) -> list[Child]:
    folder = Path(tempfile.mkdtemp())
    children = [Child(name, setup, folder / (re.sub(r"[^\w.@+-]", "_", name) + ".log")) for name in names]
    ready = []
    for child in children:
        try:
            print(f"{child.name} ready in {child.read()['ready_s']} s; {child.selected()}", flush=True)
            ready.append(child)
        except RuntimeError as error:
            print(error, flush=True)
    return ready


Key = tuple[str, str, str, str]
"""Shape, variant, whose process ("own" or "shared"), case."""


def measure(
    children: list[Child],
    batches: list[int],
    rounds: int,
    deadline: float,
    save: Callable[[dict[str, Any]], None],
    keep_graphs: bool = False,
) -> dict[str, Any]:
    """Alternating rounds. keep_graphs: those of the start serve all of them."""
    samples: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    engines = [(child, variant) for child in children for variant in child.variants]
    for number in range(rounds):
        for child, variant in engines if number % 2 == 0 else engines[::-1]:
            again = child.capture(variant, anew=number > 0 and not keep_graphs)
            process = "shared" if len(child.variants) > 1 else "own"
            for batch in (*batches, None):
                result = child.ask(variant, "prefill") if batch is None else child.ask(variant, "decode", batch)
                if result.get("step_us"):
                    result["captures"] = again or number == 0
                case = "prefill" if batch is None else f"decode-{batch}"
                for key, value in result.items():
                    samples[child.shape, variant, process, case][key].append(value)
        save(rows_of(samples))
        if time.monotonic() > deadline:
            break
    return rows_of(samples)


def rows_of(samples: dict[Key, dict[str, list[float]]]) -> dict[str, Any]:
    rows: dict[Key, dict[str, Any]] = {}
    for key, values in samples.items():
        shape, variant, process, case = key
        row = rows[key] = {"shape": shape, "variant": variant, "process": process, "case": case}
        for name, found in values.items():
            if name == "captures":
                row[name] = sum(found)
                continue
            row[name] = round(statistics.median(found), 3)
            row[f"{name}_range"] = [round(min(found), 3), round(max(found), 3)]
            if name in ("step_us", "tokens_per_s"):
                row[f"{name}_rounds"] = [round(value, 1) for value in found]
        row["rounds"] = len(values["tokens_per_s"])
    for (shape, variant, process, case), row in rows.items():
        stock, removed = rows.get((shape, "stock", process, case)), rows.get((shape, "removed", process, case))
        if stock is None or variant == "stock":
            continue
        row["speedup"] = round(row["tokens_per_s"] / stock["tokens_per_s"], 4)
        if row.get("step_us") and removed is not None and not variant.startswith("removed"):
            ceiling = stock["step_us"] - removed["step_us"]
            row["share_recovered"] = round((stock["step_us"] - row["step_us"]) / ceiling, 3)
    return {"rows": list(rows.values())}


def table(result: dict[str, Any]) -> str:
    lines = ["| shape | process | case | variant | tokens/s | vs stock | step us | share |", "|---" * 8 + "|"]
    order = [*VARIANTS, *RECORDED]
    place = lambda r: (r["shape"], r["process"], r["case"], order.index(base_of(r["variant"])), r["variant"])  # noqa: E731
    for row in sorted(result["rows"], key=place):
        lines.append(
            f"| {row['shape']} | {row['process']} | {row['case']} | {row['variant']} | {row['tokens_per_s']:.1f} "
            f"{row['tokens_per_s_range']} | {row.get('speedup', '')} | {row.get('step_us', '')} "
            f"{row.get('step_us_range', '')} | {row.get('share_recovered', '')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=DEFAULT, metavar="SHAPE:VARIANT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="enforce_eager: no compilation, no graphs")
    parser.add_argument("--untimed", action="store_true", help="Inductor chooses nothing by its time")
    parser.add_argument("--kernels", type=int, nargs="*", default=[], help="batches whose kernels are listed")
    parser.add_argument("--decode", type=json.loads, default=DECODE, help='batch -> tokens of a round, as {"1": 128}')
    parser.add_argument("--seconds", type=float, default=3600, help="start no new round after this time")
    parser.add_argument("--keep-graphs", action="store_true", help="do not capture again before a round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    decode = {int(batch): tokens for batch, tokens in options.decode.items()}
    setup = Setup(options.eager, options.untimed, decode)
    if options.serve:
        shape, variants = options.serve.split(":")
        serve(shape, variants.split("+"), setup)
        return
    for name in options.engines:
        shape, _, variants = name.partition(":")
        if shape not in SHAPES or not set(map(base_of, variants.split("+"))) <= set(VARIANTS):
            parser.error(f"--engines: got {name!r}; shapes: {', '.join(SHAPES)}; variants: {', '.join(VARIANTS)}")
        if {"ir", "ir-reorder"} <= set(map(base_of, variants.split("+"))):
            parser.error(f"--engines: got {name!r}; 'ir' and 'ir-reorder' have one setting a process: give one of them")
        for schedules in map(schedules_of, variants.split("+")):
            if schedules not in ("", "plain") and not Path(schedules).exists():
                parser.error(
                    f"--engines: got {name!r}; {schedules!r} is no file or folder; allowed: schedules, 'plain'"
                )

    def save(result: dict[str, Any]) -> None:
        if options.json:  # the digest lets scripts/gpu_record.py refuse rows of other code
            options.json.write_text(json.dumps({"digest": digest(), **result}, indent=1))

    deadline = time.monotonic() + options.seconds
    children = start(options.engines, setup)
    try:
        result = measure(children, list(decode), options.rounds, deadline, save, options.keep_graphs)
        result["versions"] = versions()
        result["selected"] = {child.name: child.selected() for child in children}
        result["kernels"] = {}
        for child in children if options.kernels else ():
            for variant in child.variants:
                child.capture(variant, anew=False)
                for batch in options.kernels:
                    result["kernels"][f"{child.shape}:{variant}:{batch}"] = child.ask(variant, "kernels", batch)
        save(result)
        print(table(result))
    finally:
        for child in children:
            child.process.stdin.close()  # type: ignore[union-attr]
        waiting = threading.Timer(60, lambda: [child.process.kill() for child in children])
        waiting.start()
        for child in children:
            child.process.wait()
        waiting.cancel()


if __name__ == "__main__":
    main()
