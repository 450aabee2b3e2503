"""Tokens per second and device time of a decode step of a vLLM engine: stock, patched, and norms and adds removed.

    python scripts/bench_vllm.py --json out.json
    python scripts/bench_vllm.py --engines llama-8b:stock llama-8b:ir llama-8b-fp8:stock llama-8b-fp8:ir --rounds 5
    python scripts/bench_vllm.py --engines llama-8b:stock+ir+removed

Every engine is a process of its own with dummy weights, the default compile mode and CUDA graphs. All of them start at
once; then they are measured one at a time in alternating rounds, so that clocks and host noise hit all of them.

Where weights and activations happen to lie in the device's memory moves matrix products by 1 to 3 %, as much as all
norms together cost, and stays as it is for the life of an engine. Variants joined by "+" are engines of one process
with one set of weights, which takes a part of that away; their rows say "shared". Before every round but the first,
each engine captures its decode graphs again, with activations elsewhere in memory ("captures"): on an H200 that moves
a step by 0.1 %, so what two engines differ by is not where their activations lie. Judge over several starts.

Each engine also compiles for itself, and Inductor times candidates while it does. "--untimed" has it take its first
choice everywhere, so that two engines' other kernels are the same ones; vLLM's default lets it time.

"ir@FILE" is the engine "ir" with its graphs captured under another registry of schedules, "ir@plain" with norms that
are not launched dependently. The rest of such a step is the same kernels, so that 0.1 % is a difference.

Device time: the graph of the last decode step is replayed back to back between two CUDA events, without the host in
between. "removed" replaces every norm, with its residual add, by nothing: a ceiling with no right answer. Activations
collapse there, and matrix products run faster on them: it holds only where weights dominate, at batches up to 32.

Ideas that lost, to be measured again: "-dependent" launches the compiler's own kernels dependently too
(`triton.enable_pdl`), "ir-heads" serves the norms over q and k heads, which the plugin leaves to the compiler, and
"ir-functional" returns new tensors where the plugin writes into its inputs.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_record import digest, versions

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SMALL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
TINY = {**LLAMA_8B, "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "rms_norm_eps": 1e-6,
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-8b": (LLAMA_8B, {}),
    "llama-1b": ({**LLAMA_8B, **SMALL}, {}),
    "qwen3-8b": ({**LLAMA_8B, **QWEN3}, {}),
    "llama-8b-fp8": (LLAMA_8B, {"quantization": "fp8"}),
    "llama-8b-tp2": (LLAMA_8B, {"tensor_parallel_size": 2}),
    "tiny": (TINY, {}),
}
DEPENDENT = "triton.enable_pdl"
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "stock": ("off", {}),
    "stock-dependent": ("off", {DEPENDENT: True}),
    "ir": ("ir", {}),
    "ir-dependent": ("ir", {DEPENDENT: True}),
    "ir-functional": ("ir", {}),
    "ir-heads": ("ir", {}),
    "oot": ("oot", {}),
    "removed": ("off", {}),
    "removed-dependent": ("off", {DEPENDENT: True}),
}
"""Variant -> RMSNORM_PATCH_VLLM and what is set in Inductor's configuration."""
UNTIMED = {"triton.autotune_pointwise": False, "combo_kernels": True, "benchmark_combo_kernel": False}
"""Inductor's settings under which nothing is chosen by its time; kernels are combined as in vLLM's default."""
DECODE = {1: 128, 8: 128, 32: 96, 256: 48}
"""Batch -> tokens generated for each sequence in one round."""
PREFILL = (16, 1024)
"""Prompts, tokens of each."""
REPLAYS = 40
DEFAULT = [f"{shape}:{variant}" for shape in ("llama-8b", "llama-1b") for variant in ("stock", "ir", "removed")]


class Engine:
    """The child's side: one LLM. graphs: those that the process replayed since they were cleared."""

    def __init__(self, shape: str, variant: str, eager: bool, untimed: bool, graphs: list[Any]) -> None:
        import torch
        from vllm import LLM, SamplingParams

        self.torch, self.sampling, self.graphs = torch, SamplingParams, graphs
        config, extra = SHAPES[shape]
        folder = tempfile.mkdtemp()
        Path(folder, "config.json").write_text(json.dumps(config))
        os.environ["RMSNORM_PATCH_VLLM"] = VARIANTS[variant][0]
        with CHANGES.get(variant.removesuffix("-dependent"), nullcontext)():
            self.llm = self._start(LLM, folder, eager, {**(UNTIMED if untimed else {}), **VARIANTS[variant][1]}, extra)

    def _start(self, llm: Any, folder: str, eager: bool, inductor: dict[str, bool], extra: dict[str, Any]) -> Any:
        return llm(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=256,
            max_num_batched_tokens=max(PREFILL[0] * PREFILL[1], 2048),
            gpu_memory_utilization=0.01,
            kv_cache_memory_bytes=(2700 << 20) if self.torch.cuda.is_available() else (64 << 20),
            enable_prefix_caching=False,
            enforce_eager=eager,
            compilation_config={}
            if eager
            else {"cudagraph_capture_sizes": sorted(DECODE), "inductor_compile_config": inductor},
            disable_log_stats=True,
            **extra,
        )

    def recapture(self, schedules: str) -> bool:
        """Capture the decode graphs again, elsewhere in memory, with our norms under `schedules`: "" for those of the
        tree, "plain", or a registry's path. Returns whether every worker did."""
        with scheduled(schedules):
            return all(self.llm.collective_rpc(recapture))

    def sync(self) -> None:
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()

    def generate(self, batch: int, prompt: int, tokens: int) -> float:
        """Seconds for `batch` prompts of `prompt` tokens, `tokens` generated for each."""
        prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 1 for j in range(prompt)]} for i in range(batch)]
        sampling = self.sampling(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        self.sync()
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        self.sync()
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return seconds

    def decode(self, batch: int) -> dict[str, float]:
        tokens = DECODE[batch]
        self.graphs.clear()
        rate = batch * tokens / self.generate(batch, 16, tokens)
        graphs = len(self.graphs) / tokens
        return {"tokens_per_s": rate, "step_us": self.step_us(), "graphs_per_step": graphs}

    def prefill(self) -> dict[str, float]:
        batch, length = PREFILL
        return {"tokens_per_s": batch * length / self.generate(batch, length, 1)}

    def step_us(self) -> float:
        """Device time of the last decode graph, in microseconds; 0.0 without a graph."""
        if not self.graphs:
            return 0.0
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph = self.graphs[-1]
        for _ in range(5):
            graph.replay()
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end) / REPLAYS

    def kernels(self, batch: int) -> dict[str, list[float]]:
        """`exposed` of one decode step, of the 24 names that hold most of it."""
        self.graphs.clear()
        self.generate(batch, 16, 8)
        graph, steps = self.graphs[-1], 10
        with self.torch.profiler.profile(activities=[self.torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                graph.replay()
            self.torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == self.torch.autograd.DeviceType.CUDA]
        rows = exposed([(event.name, event.time_range.start, event.time_range.end) for event in events])
        order = sorted(rows, key=lambda name: -rows[name][2])[:24]
        return {name[:90]: [round(value / steps, 2) for value in rows[name]] for name in order}


def exposed(kernels: list[tuple[str, float, float]]) -> dict[str, list[float]]:
    """Of kernels (name, start, end) on one device, name -> [time in it, how often, time that it added].

    What a kernel added is from the latest end before it to its own: the gap in front of it counts, what ran beneath an
    earlier kernel does not. These add up to the whole, so two engines' steps compare kernel by kernel.
    """
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0.0])
    latest = min((start for _, start, _ in kernels), default=0.0)
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        row = rows[name]
        row[0] += end - start
        row[1] += 1
        row[2] += max(0.0, end - latest)
        latest = max(latest, end)
    return dict(rows)


@contextmanager
def norms_removed() -> Iterator[None]:
    from vllm.model_executor.custom_op import CustomOp, op_registry_oot
    from vllm.model_executor.layers.layernorm import RMSNorm

    class Removed(RMSNorm):
        def forward(self, x: Any, residual: Any = None) -> Any:
            return x if residual is None else (x, residual)

    CustomOp.register_oot(Removed, name="RMSNorm")
    yield
    del op_registry_oot["RMSNorm"]


@contextmanager
def changed(name: str, value: Any) -> Iterator[None]:
    """Set a constant of the plugin, and its version too: vLLM's compile cache must not take one graph for the other."""
    from rmsnorm_patch.vllm_plugin import arithmetic

    before = getattr(arithmetic, name), arithmetic.VERSION
    setattr(arithmetic, name, value)
    arithmetic.VERSION = f"{arithmetic.VERSION} {name}"  # type: ignore[assignment]
    yield
    setattr(arithmetic, name, before[0])
    arithmetic.VERSION = before[1]


CHANGES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "removed": norms_removed,
    "ir-heads": lambda: changed("COMPILER_HEAD", 0),
    "ir-functional": lambda: changed("IN_PLACE", False),
}


def keep_graphs() -> list[Any]:
    """A list that every CUDA graph of this process joins when it is replayed."""
    import torch

    graphs: list[Any] = []
    if torch.cuda.is_available():
        replay = torch.cuda.CUDAGraph.replay

        def kept(graph: Any) -> None:
            graphs.append(graph)
            replay(graph)

        torch.cuda.CUDAGraph.replay = kept  # type: ignore[method-assign]
    return graphs


def recapture(worker: Any) -> bool:
    """Capture a worker's full graphs into a pool of their own, behind an allocation of another size each time. Returns
    False where its runner keeps its graphs elsewhere than vLLM 0.26's does, or has none."""
    import random

    import torch

    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    full = {} if manager is None else {k: v for k, v in manager._capture_descs.items() if k.name == "FULL"}
    if not full:
        return False
    ballast = worker.__dict__.setdefault("ballast", [])  # it has to stay
    mebibytes = 2 * random.Random(len(ballast)).randint(6, 60)
    ballast.append(torch.empty(mebibytes << 20, dtype=torch.uint8, device=worker.device))
    every, manager._capture_descs = manager._capture_descs, full
    manager.graphs.clear()
    manager.pool = torch.cuda.graph_pool_handle()
    try:
        worker.model_runner.capture_model()
    finally:
        manager._capture_descs = every
    return True


@contextmanager
def scheduled(schedules: str) -> Iterator[None]:
    """Norms that this process binds within follow these schedules: another registry, or "plain" launches."""
    from rmsnorm_patch import cuda_backend, dispatch, launcher, ops, registry

    if not schedules:
        yield
        return
    functions, kernels = launcher.functions, dispatch._kernels

    def forget() -> None:
        cuda_backend.configs_for.cache_clear()
        cuda_backend._bound.cache_clear()
        ops._bound_of.cache_clear()
        ops._BOUND.clear()

    forget()
    if schedules == "plain":
        usual = functions()

        def plain(*values: int) -> int:  # the eighth says whether the device knows dependent launches
            return usual.new_kernel(*values[:7], 0, *values[8:])

        launcher.functions = lambda: replace(usual, new_kernel=plain)  # type: ignore[assignment]
    else:
        other = registry.read_registry(Path(schedules))
        dispatch._kernels = lambda: other  # type: ignore[assignment]
    try:
        yield
    finally:
        launcher.functions, dispatch._kernels = functions, kernels
        forget()


def share_weights() -> None:
    """Every model that this process loads from now on gets the parameters of the first."""
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    load, kept = Worker.load_model, {}

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        for name, parameter in self.model_runner.model.named_parameters():
            parameter.data = kept.setdefault(name, parameter.data)
        torch.cuda.empty_cache()

    Worker.load_model = load_model


def base_of(variant: str) -> str:
    """The engine that a variant is measured in: "ir" of "ir@plain"."""
    return variant.partition("@")[0]


def serve(shape: str, variants: list[str], eager: bool, untimed: bool) -> None:
    """Child: answer each command line with one JSON line on the descriptor that stdout was."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes to the log
    start = time.perf_counter()
    graphs = keep_graphs()
    if len(set(map(base_of, variants))) > 1:
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # under the setting of the process; each engine then has its own
        share_weights()
    engines = {}
    for variant in dict.fromkeys(map(base_of, variants)):
        engine = engines[variant] = Engine(shape, variant, eager, untimed, graphs)
        for batch in DECODE:
            engine.generate(batch, 16, 4)
        engine.generate(*PREFILL, 1)
    print(json.dumps({"ready_s": round(time.perf_counter() - start, 1)}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(engines[base_of(command["variant"])], command["do"])(*command["args"])
        print(json.dumps(result), file=answers)


class Child:
    """The parent's side of a process with one engine, or with several that share their weights."""

    def __init__(self, name: str, options: list[str], log: Path) -> None:
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
        }
        self.log = log
        command = [sys.executable, __file__, "--serve", name, "--decode", json.dumps(DECODE), *options]
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
        schedules = variant.partition("@")[2]
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


def start(names: list[str], options: list[str]) -> list[Child]:
    folder = Path(tempfile.mkdtemp())
    children = [Child(name, options, folder / (re.sub(r"[^\w.@+-]", "_", name) + ".log")) for name in names]
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


def measure(children: list[Child], rounds: int, deadline: float, save: Any) -> dict[str, Any]:
    """Alternating rounds."""
    samples: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    engines = [(child, variant) for child in children for variant in child.variants]
    for number in range(rounds):
        for child, variant in engines if number % 2 == 0 else engines[::-1]:
            again = child.capture(variant, bool(number))
            process = "shared" if len(child.variants) > 1 else "own"
            for batch in (*DECODE, None):
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
            if name == "step_us":
                row["step_us_rounds"] = [round(value, 1) for value in found]
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
    order = list(VARIANTS)
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
    parser.add_argument("--decode", type=json.loads, help='{"1": 128}: batch -> tokens of a round; default all batches')
    parser.add_argument("--seconds", type=float, default=3600, help="start no new round after this time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        DECODE.clear()
        DECODE.update({int(batch): tokens for batch, tokens in options.decode.items()})
    if options.serve:
        shape, variants = options.serve.split(":")
        serve(shape, variants.split("+"), options.eager, options.untimed)
        return
    for name in options.engines:
        shape, _, variants = name.partition(":")
        if shape not in SHAPES or not set(map(base_of, variants.split("+"))) <= set(VARIANTS):
            parser.error(f"--engines: got {name!r}; shapes: {', '.join(SHAPES)}; variants: {', '.join(VARIANTS)}")
        for schedules in [variant.partition("@")[2] for variant in variants.split("+")]:
            if schedules not in ("", "plain") and not Path(schedules).is_file():
                parser.error(f"--engines: got {name!r}; {schedules!r} is no file; allowed: a registry's path, 'plain'")

    def save(result: dict[str, Any]) -> None:
        if options.json:  # the digest lets scripts/gpu_record.py refuse rows of other code
            options.json.write_text(json.dumps({"digest": digest(), **result}, indent=1))

    deadline = time.monotonic() + options.seconds
    children = start(options.engines, ["--eager"] * options.eager + ["--untimed"] * options.untimed)
    try:
        result = measure(children, options.rounds, deadline, save)
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
