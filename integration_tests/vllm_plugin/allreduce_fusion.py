"""vLLM's fusion of a norm with the all-reduce in front of it, on the CPU, and on by default as on a Hopper GPU that has
FlashInfer. Its pass and patterns are real; in the place of FlashInfer's kernel stands an op that reduces and norms.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LARGEST = 64 << 20
"""Bytes of a fused all-reduce between two ranks, as on an H100."""


def turn_on() -> None:
    """By default, where nobody says otherwise."""
    from vllm.config import vllm as config
    from vllm.config.compilation import PassConfig

    PassConfig.flashinfer_max_size = lambda self, world_size: LARGEST
    for level in (config.OPTIMIZATION_LEVEL_02, config.OPTIMIZATION_LEVEL_03):
        level["compilation_config"]["pass_config"]["fuse_allreduce_rms"] = True


def install(whole_compiler: Any) -> None:
    """Before the module `whole_compiler` is installed, which turns off the fusions that are left to it."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms.cpu import CpuPlatform

    turn_on()
    whole_compiler.FUSIONS = tuple(name for name in whole_compiler.FUSIONS if name != "fuse_allreduce_rms")
    CpuPlatform.use_custom_op_collectives = classmethod(lambda cls: True)
    in_place = CpuCommunicator.all_reduce
    CpuCommunicator.all_reduce = lambda self, rows: in_place(self, rows.clone())  # out of place, as the op is declared
    for name in ("rms_quant_fusion", "matcher_utils"):  # as text: to import them looks the ops up
        spec = find_spec(f"vllm.compilation.passes.fusion.{name}")
        assert spec is not None
        assert spec.origin is not None
        whole_compiler.name_ops_in(Path(spec.origin).read_text())
    from vllm.compilation.passes import pass_manager
    from vllm.compilation.passes.fusion import allreduce_rms_fusion as fusion

    pass_manager.AllReduceFusionPass = fusion.AllReduceFusionPass
    fusion.flashinfer_comm = SimpleNamespace(AllReduceFusionPattern=SimpleNamespace(kARResidualRMSNorm=0))
    fusion.get_fi_ar_workspace = lambda **_: True
    fusion.get_fi_ar_quant_workspace = lambda **_: None
    fusion.destroy_fi_ar_workspace = lambda: None
    fusion.flashinfer_trtllm_fused_allreduce_norm = torch.ops.rmsnorm_patch_tests.reduced_and_normed.default


@torch.library.custom_op(
    "rmsnorm_patch_tests::reduced_and_normed", mutates_args=("allreduce_in", "residual", "norm_out")
)
def reduced_and_normed(
    allreduce_in: torch.Tensor,
    residual: torch.Tensor,
    rms_gamma: torch.Tensor,
    rms_eps: float,
    world_size: int,
    launch_with_pdl: bool,
    fp32_acc: bool,
    max_token_num: int,
    pattern_code: int,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    weight_bias: float = 0.0,
) -> None:
    """The norm and the sum into `norm_out` and `allreduce_in`; without the former into `allreduce_in`, `residual`."""
    from vllm.distributed import get_tp_group

    reduced = get_tp_group()._all_reduce_out_place(allreduce_in)
    total = reduced.float() + residual.float()
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + rms_eps) * (rms_gamma.float() + weight_bias)
    norm_to, sum_to = (allreduce_in, residual) if norm_out is None else (norm_out, allreduce_in)
    norm_to.copy_(normed)
    sum_to.copy_(total)


@reduced_and_normed.register_fake
def _(*_: Any, **__: Any) -> None:
    return None
