"""Products of quantised rows for vLLM on the CPU, which has its own for the newest processors alone. Of fp8 rows they
are opaque ops, behind vLLM's own quantisation, as CUTLASS's products stand in a graph on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch


@torch.library.custom_op("rmsnorm_patch_tests::product", mutates_args=())
def product(
    rows: torch.Tensor, matrix: torch.Tensor, row_scales: torch.Tensor, scales: torch.Tensor, block: int
) -> torch.Tensor:
    """rows: [M, K]; matrix: [K, N]; row_scales: one, [M, 1] or [M, K / block]; scales: one, [N, 1] or, of blocks,
    [N / block, K / block]."""
    left, right = rows.float(), matrix.float()
    if block:
        left = left * row_scales.repeat_interleave(block, 1)[:, : rows.shape[1]]
        whole = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
        right = right * whole[: matrix.shape[1], : matrix.shape[0]].t()
    else:
        left, right = left * row_scales, right * scales.reshape(1, -1)
    return (left @ right).to(torch.bfloat16)


@product.register_fake
def _(rows: Any, matrix: Any, row_scales: Any, scales: Any, block: Any) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], matrix.shape[1], dtype=torch.bfloat16)


def _quantised(matrix: torch.Tensor, scale: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """For vLLM's loader, which gives the matrices that it merges one scale."""
    return (matrix.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def install() -> None:
    from vllm import _custom_ops
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class Able:
        @classmethod
        def is_supported(cls, compute_capability: Any = None) -> tuple[bool, None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, None]:
            return True, None

    class Product(Able, FP8ScaledMMLinearKernel):  # type: ignore[misc]
        def apply_scaled_mm(self, *, A: Any, B: Any, As: Any, Bs: Any, output_shape: Any, **_: Any) -> Any:
            return product(A, B, As, Bs, 0).view(*output_shape)

    class BlockProduct(Able, Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> Any:
            return product(A, B.t(), As, Bs, self.weight_group_shape.col)

    class OpaqueBlockProduct(Able, Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
        """vLLM's op for FlashInfer and DeepGEMM, which quantises for itself."""

        apply_input_quant = False

        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> Any:
            return torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(A, B, Bs, 128, True)

    if opaque := os.environ.get("TESTS_OPAQUE_BLOCKS"):
        import block_libraries

        # A Hopper's choice, which the decision asks for.
        block_libraries.of_vllm().FlashInferFp8DeepGEMMDynamicBlockScaledKernel.is_supported = Able.is_supported
        BlockProduct = OpaqueBlockProduct  # type: ignore[misc]
        if opaque == "whole":  # a library's answer on a GPU, of which there is none
            from rmsnorm_patch.vllm_plugin.passes import block_products

            block_products._declined = lambda *_: "its library does not take rows that are quantised before"
    _custom_ops.scaled_fp8_quant = _quantised
    # Where a processor has AMX, vLLM's int8 product quantises its rows itself, as on no GPU.
    cpu.check_cpu_sgl_kernel = lambda *shape: False
    linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU].insert(0, Product)
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].insert(0, BlockProduct)
