"""The numerics that the vLLM plugin claims to replace, against vLLM's own ops on this GPU."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("vllm", reason="vLLM is not installed here")


def _inputs(rows: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, residual = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return x, residual, torch.randn(n, device="cuda", dtype=torch.bfloat16)


def _differing(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got != want).float().mean().item()


@pytest.mark.parametrize(("rows", "n"), [(1, 4096), (33, 4096), (257, 2048)])
def test_eager_numerics_are_those_of_vllms_cuda_op(rows: int, n: int) -> None:
    import vllm._custom_ops  # noqa: F401  loads the library behind torch.ops._C

    from rmsnorm_patch import ops
    from rmsnorm_patch.vllm_plugin.decision import SPECS

    x, residual, weight = _inputs(rows, n)
    want = torch.empty_like(x)
    torch.ops._C.rms_norm(want, x, weight, 1e-5)
    assert _differing(ops.bind_rms_norm(SPECS["rmsnorm_patch_c"])(x, weight, 1e-5), want) < 1e-3
    normed, total = ops.bind_fused_add_rms_norm(SPECS["rmsnorm_patch_c"])(x, residual, weight, 1e-5)
    torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual)
    assert _differing(normed, x) < 1e-3


@pytest.mark.parametrize(("rows", "n"), [(1, 4096), (33, 4096), (257, 2048)])
def test_compiled_numerics_are_those_of_inductor(rows: int, n: int) -> None:
    from vllm import ir

    from rmsnorm_patch import ops
    from rmsnorm_patch.vllm_plugin.decision import SPECS

    x, residual, weight = _inputs(rows, n)
    native = torch.compile(ir.ops.fused_add_rms_norm.impls["native"].impl_fn)
    want, want_total = native(x, residual, weight, 1e-5)
    normed, total = ops.bind_fused_add_rms_norm(SPECS["rmsnorm_patch"])(x, residual, weight, 1e-5)
    assert torch.equal(total, want_total)
    assert _differing(normed, want) < 1e-3
