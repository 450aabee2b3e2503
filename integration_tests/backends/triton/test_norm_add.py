"""The Triton kernel of an add behind a norm, compiled for devices that are not here: its product keeps its rounding."""

from __future__ import annotations

import re
from typing import Any

import ahead
import pytest
import torch
from triton.backends.compiler import GPUTarget

from rmsnorm_patch.backends.triton.backend import Layout
from rmsnorm_patch.fused.norm_add import portable
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec

FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")


def compiled(target: GPUTarget, spec: NormSpec, dtype: torch.dtype, n: int) -> tuple[Layout, Any]:
    layout = Layout("rms_norm", spec, dtype, n, dtype, ahead.known(target))
    constants = portable.constants(layout, spec, True) | {"NESTED": False}
    return layout, ahead.compiled(target, portable.MODULE, layout, constants, dtype)


@pytest.mark.parametrize(
    "spec", [LLAMA, GEMMA, FP32_WEIGHT_MULTIPLY, FP32_SUM], ids=["llama", "gemma", "one rounding", "fp32 sum"]
)
@pytest.mark.parametrize("dtype", ahead.NAMES, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_no_product_is_contracted_with_the_sum(arch: int, dtype: torch.dtype, spec: NormSpec) -> None:
    """Every element of a thread is added to the residual by an add whose rounding is named, and no FMA joins values of
    16 bits but for a product of its own, whose term is -0."""
    n = 1024
    layout, made = compiled(GPUTarget("cuda", arch, 32), spec, dtype, n)
    ptx = made.asm["ptx"]
    schedule = layout.schedule
    elements = schedule.rows * schedule.block * schedule.chunks // (32 * schedule.num_warps)
    assert len(re.findall(r"\badd\.rn\.f32\b", ptx)) >= elements
    zeros = {name for name, value in re.findall(r"mov\.b(?:16|32)\s+(%\w+), (-?\w+);", ptx) if value in NEGATIVE_ZEROS}
    for fma in re.findall(r"fma\.rn\.(?:b?f16(?:x2)?)\s+([^;]+);", ptx):
        assert fma.split(", ")[-1] in zeros, fma


NEGATIVE_ZEROS = ("-32768", "32768", "0x8000", "-2147450880", "0x80008000", "2147516416")


def test_it_compiles_for_amd() -> None:
    _, made = compiled(GPUTarget("hip", "gfx942", 64), LLAMA, torch.float32, 1024)
    assert "s_endpgm" in made.asm["amdgcn"]
