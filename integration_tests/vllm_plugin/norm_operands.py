"""What each norm of a vLLM engine is given and gives: `norm_operands.py REQUEST`.

Request: model (folder), numerics (of RMSNORM_PATCH_VLLM_NUMERICS), enforce_eager, prompts (lists of token ids),
max_tokens and file. The file gets the tensors of every call of a norm, as safetensors: "<call>.<path>.<name>", names x,
residual, normed and total. Compiled graphs run no module, and calls of our op are taken instead, without a path:
"<call>..<name>".
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import torch
from safetensors.torch import save_file

from rmsnorm_patch import ops


class Calls:
    """Tensors of the calls, by the keys of the file."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, path: str, given: tuple[torch.Tensor, ...], result: Any) -> None:
        results = result if isinstance(result, tuple) else (result,)
        names = ("x", "residual")[: len(given)] + ("normed", "total")[: len(results)]
        named = dict(zip(names, (*given, *results), strict=True))
        for name, tensor in named.items():
            self.tensors[f"{self.count:06d}.{path}.{name}"] = tensor.clone().contiguous()
        self.count += 1

    def of_modules(self, model: torch.nn.Module) -> None:
        """vLLM may write results over operands, so operands are copied before the call."""
        given: dict[torch.nn.Module, tuple[torch.Tensor, ...]] = {}
        for path, module in model.named_modules():
            if "RMSNorm" in type(module).__name__:
                module.register_forward_pre_hook(
                    lambda module, args: given.update({module: tuple(x.clone() for x in args if x is not None)})
                )
                module.register_forward_hook(
                    lambda module, args, result, path=path: self.add(path, given.pop(module), result)
                )

    def of_ops(self) -> Any:
        """Returns the method that stood there before."""
        bound = ops.Bound.run

        def call(op: ops.Bound, *args: Any) -> Any:
            tensors = args[:-2]
            given = tuple(tensor.clone() for tensor in tensors)
            result = bound(op, *args)
            self.add("", given, tensors if op.op.endswith("_") else result)
            return result

        ops.Bound.run = call
        return bound


def run(request: dict[str, Any]) -> None:
    os.environ["RMSNORM_PATCH_VLLM_NUMERICS"] = request["numerics"]
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=request["model"],
        enforce_eager=request["enforce_eager"],
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=8 << 20,
        dtype="bfloat16",
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    calls = Calls()
    bound = ops.Bound.run
    if request["enforce_eager"]:
        calls.of_modules(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model)
    else:
        calls.of_ops()
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, logprobs=1)
    llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
    ops.Bound.run = bound
    save_file(calls.tensors, request["file"])
    gc.collect = lambda *_: 0  # as in engine.py


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
