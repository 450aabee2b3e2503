"""One vLLM engine in this process, driven by a JSON request in argv[1]; writes a JSON answer to argv[2].

Request: model (folder), enforce_eager, prompts (lists of token ids), max_tokens; and, where wanted, `engine` (further
LLM arguments), `where_known` (more of them, for releases that have such), `variables` (of the environment),
`vllm_version` (what vLLM shall say it is), `adapter` (folder of a LoRA adapter, of each prompt), `whole_compiler` (on
the CPU, compile as on a GPU), `allreduce_fusion` (then fuse norms with all-reduces, by default), `hide_ir` (no
providers for vLLM's IR ops), `forked_workers` (several workers are forks, where vLLM would start interpreters),
`batches` (further lists of prompts, each generated for by itself) and `changes` (generate once more after each:
"written" norm weights, in their memory, while the engine runs; "replaced" ones, by others in another memory; "loaded"
ones, by vLLM's loader, as trainers hand them over; "restored", all weights from the checkpoint; "slept", the engine put
to sleep and woken up).
Answer: tokens and logprobs of every prompt, and of those of each of the `batches`, the number of forwards while they
were generated, the lines of our call trace that belong to them and those from the start (where a CUDA graph's calls are
captured), the classes of the model's norms, and whether CUDA was initialised. On a GPU: which of our kernels the device
ran while the tokens were generated; on the CPU with the whole compiler: which ops ran, and how often.
With several workers, which are processes of their own, only tokens, logprobs and the lines of each worker.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import allreduce_fusion
import compiled_cpp
import fp8_products
import torch
import whole_compiler


def trace_lines() -> list[dict[str, Any]]:
    path = Path(os.environ["RMSNORM_PATCH_VLLM_TRACE"]) / f"{os.getpid()}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


KERNELS = (
    "rms_norm_rows",
    "rms_norm_partials",
    "rms_norm_stream",
    "rms_norm_pair",
    "rms_norm_quantised",
    "rms_norm_add",
    "silu_and_mul_quantised",
)


def told(outputs: list[Any]) -> dict[str, Any]:
    completions = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(completion.token_ids) for completion in completions],
        "logprobs": [
            [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
            for completion in completions
        ],
        "texts": [completion.text for completion in completions],
    }


def generate(
    llm: Any, prompts: list[Any], sampling: Any, watched: bool, **given: Any
) -> tuple[list[Any], dict[str, int], int]:
    """The outputs, kernel of ours -> launches of it, replays of a CUDA graph included, and all that the device ran; on
    the CPU op -> calls."""
    if not torch.cuda.is_available() and not watched:
        return llm.generate(prompts, sampling, use_tqdm=False, **given), {}, 0
    on_a_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_a_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        outputs = llm.generate(prompts, sampling, use_tqdm=False, **given)
        if on_a_gpu:
            torch.cuda.synchronize()
    rows = profile.key_averages()
    if on_a_gpu:
        ran = {row.key: row.count for row in rows if row.device_type == torch.autograd.DeviceType.CUDA}
        return outputs, {name: count for name, count in ran.items() if name in KERNELS}, sum(ran.values())
    return outputs, {row.key: row.count for row in rows if row.key.startswith(("aten::", "rmsnorm_patch::"))}, 0


def lines_of_workers() -> dict[str, list[dict[str, Any]]]:
    """Process id -> the lines it wrote."""
    folder = Path(os.environ["RMSNORM_PATCH_VLLM_TRACE"])
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}


def load_norms(worker: Any) -> None:
    """Weights from elsewhere, through the model's own loader."""
    model = worker.model_runner.model
    model.load_weights([(name, 0.75 * p.detach().clone()) for name, p in model.named_parameters() if "norm" in name])


def change(llm: Any, model: torch.nn.Module, how: str) -> None:
    if how == "loaded":
        llm.collective_rpc(load_norms)
    elif how == "restored":
        llm.collective_rpc("reload_weights")
    elif how == "slept":
        llm.sleep(level=1)
        llm.wake_up()
    else:
        change_norms(model, how)


def change_norms(model: torch.nn.Module, how: str) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name and how == "written":
            parameter.data.mul_(0.5)
        elif "norm" in name:
            parameter.data = parameter.data.flip(0)


def stand_in(request: dict[str, Any]) -> None:
    """What the request wants otherwise than this machine has it, before vLLM's engine is imported."""
    os.environ.update(request.get("variables", {}))
    import vllm

    if not torch.cuda.is_available():
        compiled_cpp.install()
    if "vllm_version" in request:
        vllm.__version__ = request["vllm_version"]
    if request.get("hide_ir"):
        whole_compiler.hide_ir()
    if request.get("forked_workers"):
        from vllm.v1.executor import multiproc_executor

        multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    if request.get("allreduce_fusion"):
        allreduce_fusion.install(whole_compiler)
    if request.get("whole_compiler"):
        whole_compiler.install()
        fp8_products.install()


def settings_of(request: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    known = {each.name for each in dataclasses.fields(EngineArgs)}
    return {
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 8 << 20,
        "dtype": request.get("dtype", "bfloat16"),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        **request.get("engine", {}),
        **{name: value for name, value in request.get("where_known", {}).items() if name in known},
    }


def adapter_of(request: dict[str, Any]) -> dict[str, Any]:
    """What `LLM.generate` is given with the prompts."""
    if "adapter" not in request:
        return {}
    from vllm.lora.request import LoRARequest

    return {"lora_request": LoRARequest("adapter", 1, request["adapter"])}


def main(request: dict[str, Any]) -> dict[str, Any]:
    stand_in(request)
    from vllm import LLM, SamplingParams

    settings = settings_of(request)
    llm = LLM(model=request["model"], enforce_eager=request["enforce_eager"], **settings)
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    if llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        return {**told(llm.generate(prompts, sampling, use_tqdm=False)), "workers": lines_of_workers()}
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    forwards = 0
    compute_logits = model.compute_logits

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return compute_logits(*args, **kwargs)

    model.compute_logits = counted
    at_start = trace_lines()
    watched, adapter = request.get("whole_compiler", False), adapter_of(request)
    outputs, kernels, launches = generate(llm, prompts, sampling, watched, **adapter)
    lines, counted_forwards, after = trace_lines()[len(at_start) :], forwards, dict[str, Any]()
    batches = []
    for batch in request.get("batches", ()):
        made, ran, _ = generate(llm, [{"prompt_token_ids": ids} for ids in batch], sampling, watched=False)
        batches.append({**told(made), "kernels": ran})
    for how in request.get("changes", ()):
        change(llm, model, how)
        after[how] = told(llm.generate(prompts, sampling, use_tqdm=False))
    gc.collect = lambda *_: 0  # an engine's end looks through all that vLLM imported, and the process ends with it
    return {
        **told(outputs),
        "after": after,
        "batches": batches,
        "forwards": counted_forwards,
        "trace": lines,
        "trace_at_start": at_start,
        "kernels": kernels,
        "launches": launches,
        "norms": sorted({type(m).__name__ for m in model.modules() if "RMSNorm" in type(m).__name__}),
        "priority": llm.llm_engine.vllm_config.kernel_config.ir_op_priority.rms_norm,
        "cuda_initialised": torch.cuda.is_initialized(),
    }


if __name__ == "__main__":
    answer = main(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(answer))
