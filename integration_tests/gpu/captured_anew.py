"""Graphs that stand while others of their stream are captured and end, in a process of its own: a fault spoils its
device.

    python integration_tests/gpu/captured_anew.py products|norms|joined keep|elsewhere|drop
    python integration_tests/gpu/captured_anew.py engine keep|drop FOLDER

products: torch alone; norms: our kernels alone; joined: the op that takes over split products; engine: vLLM's.
keep: the graphs in whose place others come stay alive, as in scripts/bench_vllm.py. drop: they end. elsewhere: they
were captured on another stream, and end. The last line is "same" where what stands gives the bits of before, else
"other bits"; an illegal address ends the process.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rmsnorm_patch import ops
from rmsnorm_patch.fused.linear_norm import kernel
from rmsnorm_patch.fused.linear_norm import op as linear_norm_op
from rmsnorm_patch.numerics.spec import NormSpec

ROWS = (1, 8, 32)
EPS = 1e-5
N, K = 4096, 14336
"""Of Llama-8B's down projection, which cuBLAS splits along K at few rows."""


def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)


def captured(call: Callable[[], torch.Tensor], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Called once on the capture stream first, as vLLM does: the stream's workspace lies in no graph's pool then."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result


def products() -> Callable[[], torch.Tensor]:
    rows, matrix = rand(max(ROWS), K), rand(N, K, scale=K**-0.5)
    return lambda: torch.cat([torch.mm(rows[:m], matrix.t()) for m in ROWS])


def norms() -> Callable[[], torch.Tensor]:
    spec, (m, parts) = fp32_sum(), (max(ROWS), 4)
    x, residual, weight, pieces = rand(m, N), rand(m, N), rand(N), rand(parts, m, N).float()
    fused = ops.bind_fused_add_rms_norm_(spec)
    in_parts = kernel.bound(spec, parts) if kernel.serves(spec, x.dtype, N, x.get_device()) else None

    def call() -> torch.Tensor:
        results = [x.clone(), residual.clone()]
        fused(*results, weight, EPS)
        if in_parts is not None:
            total, normed = residual.clone(), torch.empty_like(residual)
            in_parts(pieces, total, weight, EPS, normed)
            results += [total, normed]
        return torch.cat(results)

    return call


def joined() -> Callable[[], torch.Tensor]:
    rows, residual, weight = rand(max(ROWS), K), rand(max(ROWS), N), rand(N)
    matrix = rand(N, K, scale=K**-0.5)
    op = getattr(torch.ops.rmsnorm_patch, linear_norm_op.NAME)

    def call() -> torch.Tensor:
        results = []
        for m in ROWS:
            total = residual[:m].clone()
            results += [op(rows[:m], matrix, total, weight, EPS, *ops.spec_args(fp32_sum())), total]
        return torch.cat(results)

    return call


def fp32_sum() -> NormSpec:
    return NormSpec(eps=0.0, round_before_weight="none", output="input", sum="fp32")


def released() -> None:
    """Memory that nobody holds goes back to the driver, and what is asked for next is not zero."""
    ops.forget()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.full((64 << 20,), 255, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()


def graphs(make: Callable[[], Callable[[], torch.Tensor]], how: str) -> bool:
    stream = torch.cuda.Stream()
    call = make()
    standing, result = captured(call, stream)
    standing.replay()
    before = result.clone()
    other = make()  # what the graphs read is theirs alone to lose: the operands stay
    others = [captured(other, torch.cuda.Stream() if how == "elsewhere" else stream)]
    if how != "keep":
        others.clear()
    released()
    result.zero_()
    standing.replay()
    torch.cuda.synchronize()
    return torch.equal(before, result)


def engine(keep: bool, folder: str) -> bool:
    """One engine: the tokens of before, three captures of its full graphs later. A prompt of 16 tokens goes through the
    piecewise graphs, which stood."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_FLASHINFER_SAMPLER="0", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CACHE_ROOT", tempfile.mkdtemp())
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from benchlib import vllm_engine
    from vllm import LLM, SamplingParams

    sizes: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 32, "kv_cache_memory_bytes": 64 << 20}
    sizes["gpu_memory_utilization"] = 0.05
    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 8, 32]},
        **sizes,
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": [(7 * j + shift) % 200 + 1 for j in range(16)]} for shift in (0, 3)]

    def tokens() -> list[list[int]]:
        outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
        return [list(output.outputs[0].token_ids) for output in outputs]

    before, same = tokens(), True
    for _ in range(3):
        assert all(llm.collective_rpc(vllm_engine.recapture))
        if not keep:
            llm.collective_rpc(lambda worker: worker.stood.clear())
        released()
        same = same and tokens() == before
    return same


KINDS = {"products": products, "norms": norms, "joined": joined}

if __name__ == "__main__":
    what, how, *rest = sys.argv[1:]
    found = engine(how == "keep", *rest) if what == "engine" else graphs(KINDS[what], how)
    print("same" if found else "other bits")
