"""A row's bits follow from the row: schedules of one length add its squares in one order, whatever comes with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda.registry import UNBOUNDED
from rmsnorm_patch.backends.cuda.schedules import registered_kernels, schedules
from rmsnorm_patch.errors import KernelBuildError
from rmsnorm_patch.numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE, PLAIN_OPS, RMS_NORM
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec
from rmsnorm_patch.ops.dispatch import BUILT_CAPABILITIES, choose
from rmsnorm_patch.vllm_plugin.decision import SPECS

LENGTHS = (64, 100, 128, 256, 576, 768, 1024, 1536, 2048, 2880, 3072, 3584, 4096, 5120, 5125, 6144, 7168, 8192, 16384)
ROWS = 16384
TUNED = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("op", PLAIN_OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_order_for_all_numbers_of_rows(op: str, dtype: torch.dtype) -> None:
    """Several schedules serve a length, of other threads, clusters and rows a block. What fixes the order is the same
    in all: lanes trees by their chunk; other trees by threads, chunks and cluster, so that there is one schedule."""
    several = 0
    for capability in BUILT_CAPABILITIES:
        for device in (None, TUNED):
            for n in LENGTHS:
                found = schedules(op, dtype, n, capability, device)
                ends = [0, *(config.m[1] for config in found)]
                assert ends[-1] == UNBOUNDED
                assert [config.m[0] for config in found] == [end + 1 for end in ends[:-1]]  # each M has one
                served = [config for config in found if config.m[0] <= ROWS]
                assert len({(config.tree, config.vec, dict(config.defines)["TREE_THREADS"]) for config in served}) == 1
                if dict(served[0].defines)["TREE_THREADS"]:
                    assert len({(config.threads_per_row, config.cluster) for config in served}) == 1
                several += len({(config.threads_per_row, config.cluster) for config in served}) > 1
    assert several > 50  # else this says nothing


def test_a_registry_of_two_orders_is_refused() -> None:
    kernels = registered_kernels()
    rows = next(kernel for kernel in kernels if kernel.name == "rms_norm_rows")
    other = replace(rows, tree="threads-{vec}-{threads_per_row}")
    with pytest.raises(KernelBuildError, match="one reduction tree for all M"):
        schedules("rms_norm", torch.bfloat16, 4096, 90, None, tuple(other if k is rows else k for k in kernels))


@pytest.mark.parametrize("n", LENGTHS)
def test_the_backend_does_not_follow_the_rows(n: int) -> None:
    for op in PLAIN_OPS:
        chosen = {choose(op, LLAMA, torch.bfloat16, torch.bfloat16, m, n, 90).backend for m in (1, 2, 64, 513, ROWS)}
        assert len(chosen) == 1


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


NUMERICS = [LLAMA, FP32_WEIGHT_MULTIPLY, GEMMA, *SPECS.values()]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize(
    ("spec", "n"), [*((spec, 111) for spec in dict.fromkeys(spec.variant for spec in NUMERICS)), (NUMERICS[3], 512)]
)
def test_a_row_alone_and_in_batches_in_the_interpreter(spec: NormSpec, n: int) -> None:
    """Batches of 2, 8 and 64 in another order, sums included: the kernels that serve where CUDA's do not."""
    generator = torch.Generator().manual_seed(n)
    x, residual = torch.randn(2, 64, n, generator=generator).to(torch.bfloat16)
    weight = torch.randn(n, generator=generator).to(torch.bfloat16)
    norm, fused, in_place = (ops.bind(op.name, spec, "triton") for op in (RMS_NORM, FUSED_ADD, FUSED_ADD_IN_PLACE))

    def results(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given, kept = x[rows], residual[rows]
        found = (norm(given, weight, 1e-6), *fused(given, kept, weight, 1e-6))
        if spec.output_dtype(x.dtype, weight.dtype) == x.dtype:
            in_place(given, kept, weight, 1e-6)
            found += (given, kept)
        return found

    alone = [results(torch.tensor([row])) for row in (0, 1, 7)]
    for size in (2, 8, 64):
        order = torch.randperm(size, generator=generator)
        together = results(order)
        for row, expected in zip((0, 1, 7), alone, strict=True):
            if row < size:
                at = int((order == row).nonzero())
                assert all(torch.equal(whole[at], one[0]) for whole, one in zip(together, expected, strict=True))
