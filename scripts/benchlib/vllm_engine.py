"""One vLLM engine and what is done to it, in the process of its own that scripts/bench_vllm.py starts."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmsnorm_patch.vllm_plugin.settings import (
    BLOCKS_VARIABLE,
    LINEAR_VARIABLE,
    NORM_ADD_VARIABLE,
    SILU_QUANTISED_VARIABLE,
)

from .vllm_shapes import SHAPES

DEPENDENT = "triton.enable_pdl"
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "stock": ("off", {}),
    "stock-dependent": ("off", {DEPENDENT: True}),
    "ir": ("ir", {}),
    "ir-dependent": ("ir", {DEPENDENT: True}),
    "ir-apart": ("ir", {}),
    "ir-adds-apart": ("ir", {}),
    "ir-silu-off": ("ir", {}),
    "ir-blocks-off": ("ir", {}),
    "ir-reorder": ("ir", {}),
    "ir-functional": ("ir", {}),
    "ir-heads": ("ir", {}),
    "oot": ("oot", {}),
    "oot-noir": ("oot", {}),
    "removed": ("off", {}),
    "removed-dependent": ("off", {DEPENDENT: True}),
}
"""Variant -> RMSNORM_PATCH_VLLM and what is set in Inductor's configuration."""
RECORDED = {"ir-silu": "ir", "ir-blocks": "ir"}
"""Variants of older records -> what they are called now. The "ir" beside them is what is "ir-silu-off" or
"ir-blocks-off" now: silu_and_mul and products of blocks were vLLM's by default."""
UNTIMED = {"triton.autotune_pointwise": False, "combo_kernels": True, "benchmark_combo_kernel": False}
"""Inductor's settings under which nothing is chosen by its time; kernels are combined as in vLLM's default."""
PREFILL = (16, 1024)
"""Prompts, tokens of each."""
REPLAYS = 40
LABEL = 90
"""Characters of a kernel's name in a listing."""


@dataclass(frozen=True)
class Setup:
    """How every engine of a run is set up and measured. untimed: Inductor chooses nothing by its time. decode: batch ->
    tokens generated for each sequence in one round."""

    eager: bool
    untimed: bool
    decode: dict[int, int]


class Engine:
    """The child's side: one LLM. graphs: those that the process replayed since they were cleared."""

    def __init__(self, shape: str, variant: str, setup: Setup, graphs: list[Any]) -> None:
        import torch
        from vllm import LLM, SamplingParams
        from vllm.v1.worker import workspace

        self.torch, self.sampling, self.graphs, self.setup = torch, SamplingParams, graphs, setup
        config, extra = SHAPES[shape]
        self.parallel = extra.get("tensor_parallel_size", 1) > 1
        folder = tempfile.mkdtemp()
        Path(folder, "config.json").write_text(json.dumps(config))
        os.environ["RMSNORM_PATCH_VLLM"] = VARIANTS[variant][0]
        with CHANGES.get(variant.removesuffix("-dependent"), nullcontext)():
            inductor = {**(UNTIMED if setup.untimed else {}), **VARIANTS[variant][1]}
            self.llm = self._start(LLM, folder, inductor, extra)
        self.workspace = workspace._manager

    def _start(self, llm: Any, folder: str, inductor: dict[str, bool], extra: dict[str, Any]) -> Any:
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
            enforce_eager=self.setup.eager,
            compilation_config={}
            if self.setup.eager
            else {"cudagraph_capture_sizes": sorted(self.setup.decode), "inductor_compile_config": inductor},
            disable_log_stats=True,
            **extra,
        )

    def answer(self, do: str, *args: Any) -> Any:
        """What the method `do` gives, with the engine's own scratch memory. vLLM has one of a process and makes it anew
        for each engine: graphs of an earlier one, whose experts compute in it, would read what was given back."""
        from vllm.v1.worker import workspace

        workspace._manager = self.workspace
        return getattr(self, do)(*args)

    def recapture(self, schedules: str) -> bool:
        """Capture the decode graphs again, elsewhere in memory, with our norms under `schedules`: "" for those of the
        tree, "plain", or a path of others. Returns whether every worker did. Parallel ones never do: vLLM registers
        an all-reduce's buffers at the first capture, and steps captured later take longer (docs/decisions/vllm.md)."""
        if self.parallel:
            return False
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
        tokens = self.setup.decode[batch]
        self.graphs.clear()
        rate = batch * tokens / self.generate(batch, 16, tokens)
        graphs = len(self.graphs) / tokens
        if self.parallel:  # the graphs are those of other processes
            steps = self.llm.collective_rpc(step_us_of, args=(batch,))
            return {"tokens_per_s": rate, "step_us": max(steps), "graphs_per_step": float(min(steps) > 0)}
        step = replayed_us(self.graphs[-1]) if self.graphs else 0.0
        return {"tokens_per_s": rate, "step_us": step, "graphs_per_step": graphs}

    def prefill(self) -> dict[str, float]:
        batch, length = PREFILL
        return {"tokens_per_s": batch * length / self.generate(batch, length, 1)}

    def kernels(self, batch: int) -> dict[str, list[float]]:
        """`exposed` of one decode step, of the 24 names that hold most of it; of several workers those of the first."""
        self.graphs.clear()
        self.generate(batch, 16, 8)
        if self.parallel:
            return self.llm.collective_rpc(kernels_of, args=(batch,))[0]  # type: ignore[no-any-return]
        return kernels_of_graph(self.graphs[-1])


def kernels_of_graph(graph: Any) -> dict[str, list[float]]:
    import torch

    steps = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    rows = exposed([(event.name, event.time_range.start, event.time_range.end) for event in events])
    order = sorted(rows, key=lambda name: -rows[name][2])[:24]
    return {label(name): [round(value / steps, 2) for value in rows[name]] for name in order}


def label(name: str) -> str:
    """A kernel's name; of a long one, which others may begin with too, its beginning and a mark of the whole."""
    if len(name) <= LABEL:
        return name
    return f"{name[: LABEL - 9]} {hashlib.sha256(name.encode()).hexdigest()[:8]}"


def replayed_us(graph: Any) -> float:
    """Device time of a graph, in microseconds, replayed back to back without the host in between."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        graph.replay()
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / REPLAYS


def step_us_of(worker: Any, batch: int) -> float:
    """`replayed_us` of a worker's full graph for this batch, asked of all workers at once; 0.0 where there is none."""
    graph = full_graph(worker, batch)
    return 0.0 if graph is None else replayed_us(graph)


def kernels_of(worker: Any, batch: int) -> dict[str, list[float]]:
    graph = full_graph(worker, batch)
    return {} if graph is None else kernels_of_graph(graph)


def graphs_of(worker: Any) -> Any:
    """What holds a worker's graphs; None where its runner keeps them elsewhere than vLLM 0.26's does."""
    return getattr(worker.model_runner, "cudagraph_manager", None)


def full_graph(worker: Any, batch: int) -> Any:
    """The graph of a worker for decode steps of this batch; None where it has none."""
    manager = graphs_of(worker)
    graphs = {} if manager is None else manager.graphs
    return next((graph for desc, graph in graphs.items() if desc.num_tokens == batch), None)


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
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    def forward(self: Any, x: Any, residual: Any = None) -> Any:
        return x if residual is None else (x, residual)

    standing = dict(op_registry_oot)  # the plugin's classes too
    for norm in (RMSNorm, GemmaRMSNorm):
        op_registry_oot.pop(norm.__name__, None)
        CustomOp.register_oot(type("Removed", (norm,), {"forward": forward}), name=norm.__name__)
    yield
    op_registry_oot.clear()
    op_registry_oot.update(standing)


@contextmanager
def changed(name: str, value: Any) -> Iterator[None]:
    """Set a constant of the plugin, and its version too: vLLM's compile cache must not take one graph for the other."""
    from rmsnorm_patch.vllm_plugin import calls

    before = getattr(calls, name), calls.VERSION
    setattr(calls, name, value)
    calls.VERSION = f"{calls.VERSION} {name}"
    yield
    setattr(calls, name, before[0])
    calls.VERSION = before[1]


@contextmanager
def set_to(variable: str, setting: str) -> Iterator[None]:
    """What the engines that start within find in a variable of the plugin's."""
    before = os.environ.get(variable, "")
    os.environ[variable] = setting
    yield
    os.environ[variable] = before


@contextmanager
def ir_hidden() -> Iterator[None]:
    """The engines that start within find a vLLM whose IR takes no provider, as one without the IR."""
    import vllm.kernels  # noqa: F401  vLLM's own providers are there
    from vllm.ir.op import IrOp

    register_impl = IrOp.register_impl
    del IrOp.register_impl
    yield
    IrOp.register_impl = register_impl


CHANGES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "removed": norms_removed,
    "ir-apart": lambda: set_to(LINEAR_VARIABLE, "off"),
    "ir-adds-apart": lambda: set_to(NORM_ADD_VARIABLE, "off"),
    "ir-silu-off": lambda: set_to(SILU_QUANTISED_VARIABLE, "off"),
    "ir-blocks-off": lambda: set_to(BLOCKS_VARIABLE, "off"),
    "ir-reorder": lambda: set_to(LINEAR_VARIABLE, "reorder"),
    "ir-heads": lambda: changed("COMPILER_HEAD", 0),
    "ir-functional": lambda: changed("IN_PLACE", False),
    "oot-noir": ir_hidden,
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
    False where its runner keeps its graphs elsewhere than vLLM 0.26's does, or has none.

    The graphs that stood stay alive with their memory, out of vLLM's reach: a graph that is destroyed takes the cuBLAS
    workspaces of the stream it was captured on with it (torch 2.14). The engine's piecewise graphs were captured on
    the same stream, and their split products write into these workspaces.
    """
    import random

    import torch

    manager = graphs_of(worker)
    full = {} if manager is None else {k: v for k, v in manager._capture_descs.items() if k.name == "FULL"}
    if not full:
        return False
    ballast = worker.__dict__.setdefault("ballast", [])  # it has to stay
    mebibytes = 2 * random.Random(len(ballast)).randint(6, 60)
    ballast.append(torch.empty(mebibytes << 20, dtype=torch.uint8, device=worker.device))
    every, manager._capture_descs = manager._capture_descs, full
    worker.__dict__.setdefault("stood", []).extend(manager.graphs.values())
    manager.graphs.clear()
    manager.pool = torch.cuda.graph_pool_handle()
    try:
        worker.model_runner.capture_model()
    finally:
        manager._capture_descs = every
    return True


@contextmanager
def scheduled(schedules: str) -> Iterator[None]:
    """Norms that this process binds within follow these schedules: a file or folder of others, or "plain" launches."""
    from rmsnorm_patch import ops
    from rmsnorm_patch.backends.cuda import launcher, registry
    from rmsnorm_patch.backends.cuda import schedules as selection

    if not schedules:
        yield
        return
    functions, kernels = launcher.functions, selection.registered_kernels

    ops.forget()
    if schedules == "plain":
        usual = functions()

        def plain(*values: int) -> int:  # the eighth says whether the device knows dependent launches
            return usual.new_kernel(*values[:7], 0, *values[8:])

        launcher.functions = lambda: replace(usual, new_kernel=plain)  # type: ignore[assignment]
    else:
        other = registry.replaced(kernels(), Path(schedules))
        selection.registered_kernels = lambda: other  # type: ignore[assignment]
    try:
        yield
    finally:
        launcher.functions, selection.registered_kernels = functions, kernels
        ops.forget()


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


def schedules_of(variant: str) -> str:
    """What its graphs are captured under, for `Engine.recapture`: "plain" of "ir@plain"."""
    return variant.partition("@")[2]


def serve(shape: str, variants: list[str], setup: Setup) -> None:
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
        engine = engines[variant] = Engine(shape, variant, setup, graphs)
        for batch in setup.decode:
            engine.generate(batch, 16, 4)
        engine.generate(*PREFILL, 1)
    print(json.dumps({"ready_s": round(time.perf_counter() - start, 1)}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        result = engines[base_of(command["variant"])].answer(command["do"], *command["args"])
        print(json.dumps(result), file=answers)
