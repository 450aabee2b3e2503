"""Compile what the timing will need, in many processes at once, into the caches on disk.

Inductor, Triton, quack and our kernels find their machine code there afterwards. FlashInfer's CuTe kernels have no
such cache and compile in the timing process. Nothing is timed here: Inductor's own choice between its candidate
configurations is kept out of the cache, so that it is made later, on an idle GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from . import cases, providers
from .suites import Todo

NOT_WARMED = ("eager", "F.rms_norm", "vllm", "flashinfer")
ONCE = "flashinfer_cuda"
"""Built by one process: it is one library for all shapes, and the others would only wait for its lock."""


def start(jobs: int, arguments: Sequence[str]) -> int:
    """Run the command of these arguments `jobs` times as a compiler of one slice each, and wait.

    Returns how many ended early: the timing compiles what they left.
    """
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "rmsnorm_patch", *arguments, "--warm-slice", f"{index}/{jobs}"],
            env=environment,
            stdout=sys.stderr,
        )
        for index in range(jobs)
    ]
    return sum(process.wait() != 0 for process in running)


def portion(todo: Sequence[Todo], index: int, jobs: int) -> list[Todo]:
    """Cases of one row length stay together: most kernels are for a length, whatever the number of rows."""
    groups: dict[tuple, dict[tuple, Todo]] = {}
    for item in todo:
        case = item.case
        group = groups.setdefault((case.op, case.dtype, case.n, case.variant), {})
        group.setdefault((case.m, item.only), item)
    largest_first = sorted(groups.values(), key=len, reverse=True)
    return [item for group in largest_first[index::jobs] for item in group.values()]


def compile_slice(todo: Sequence[Todo], index: int, jobs: int) -> None:
    torch._inductor.config.autotune_local_cache = False
    for item in portion(todo, index, jobs):
        present, _ = providers.load(item.case.op, item.case.spec, bool(item.case.variant))
        for provider in present:
            wanted = not item.only or provider.name in item.only
            if wanted and provider.name not in NOT_WARMED and (provider.name != ONCE or index == 0):
                _compile(provider, item.case)
        torch.cuda.empty_cache()


def _compile(provider: providers.Provider, case: cases.Case) -> None:
    torch._dynamo.reset()
    try:
        cases.invoke(provider, cases.operands(case, 1)[0], cases.weights_of(case))
        torch.cuda.synchronize()
    except Exception:  # the timing meets it again and writes the reason into the row
        return
