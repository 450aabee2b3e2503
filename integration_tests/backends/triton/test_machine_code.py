"""The Triton kernels compiled ahead of time for GPUs that are not here, and what their machine code looks like."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ahead
import pytest
import torch
from ahead import cuobjdump, usage
from triton.backends.compiler import GPUTarget

from rmsnorm_patch.backends.triton.backend import Layout
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec

NVIDIA = [80, 89, 90, 100, 103, 120]
AMD = ["gfx942", "gfx950"]
OPS = ["rms_norm", "fused_add_rms_norm"]
FORMS = pytest.mark.parametrize("form", ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.slow])])


def build(
    target: GPUTarget,
    op: str,
    n: int,
    spec: NormSpec = LLAMA,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = torch.bfloat16,
    nested: bool = False,
    in_place: bool = False,
    dependent: bool = True,
    anew: bool = False,
) -> Any:
    """The kernel as `triton_backend` would launch it, compiled for `target`."""
    layout = Layout(op, spec, dtype, n, weight_dtype, ahead.known(target, dependent))
    constants = {**layout.constants, "NESTED": nested}
    if op != "rms_norm":
        constants.update(ROUND_SUM=spec.sum == "rounded", IN_PLACE=in_place)
    types = {"weight_ptr": weight_dtype or dtype, "y_ptr": layout.out_dtype}
    named = {name: f"*{ahead.NAMES[pointed]}" for name, pointed in types.items()}
    return ahead.compiled(target, op, layout, constants, dtype, named, anew)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=str)
def test_products_may_be_fused_whatever_the_default_is(
    target: GPUTarget, op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of squares has a rounding less for it, so a default would change bits."""
    codes = []
    for default in ("1", "0"):
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / default))
        compiled = build(target, op, 1024, anew=True)
        assert compiled.metadata.enable_fp_fusion
        codes.append(compiled.asm["cubin" if target.backend == "cuda" else "amdgcn"])
    assert codes[0] == codes[1]


def cuda(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)


def widths(sass: str, instruction: str) -> set[str]:
    return set(re.findall(rf"\b{instruction}\.E\S*", sass))


LENGTHS = (64, 5120, 16384, 24576, 49152, 65536, 131072)


@FORMS
@pytest.mark.parametrize("capability", NVIDIA)
@pytest.mark.parametrize("op", OPS)
def test_nvidia_code_has_no_spills_and_moves_sixteen_bytes(op: str, capability: int, form: str) -> None:
    """The short form: two of the lengths for each capability but sm_90, which has all."""
    drawn = random.Random(f"{op} {capability}").sample(LENGTHS, 2)
    for n in LENGTHS if form == "long" or capability == 90 else drawn:
        compiled = build(cuda(capability), op, n)
        registers, stack, local = (usage(compiled, name) for name in ("REG", "STACK", "LOCAL"))
        assert (stack, local) == (0, 0), n
        assert registers * 32 * compiled.metadata.num_warps <= 65536, (n, registers)
        sass = cuobjdump(compiled, "-sass")
        assert widths(sass, "LDG") == {"LDG.E.128"}, n
        assert widths(sass, "STG") == {"STG.E.128"}, n


@pytest.mark.parametrize("op", OPS)
def test_only_prefetches_stand_above_the_dependency_wait(op: str) -> None:
    """Nothing is read there, not even the weight: the kernel in front may have written it."""
    plain = op == "rms_norm"
    asked_for = {  # by length: rows, weight
        128: (False, plain),
        1024: (False, True),
        4096: (False, plain),
        5125: (False, plain),
        16384: (True, plain),
        20489: (True, plain),
        131072: (False, plain),
    }
    for n, (rows, weight) in asked_for.items():
        for capability in (90, 120) if n == 4096 else (90,):
            compiled = build(cuda(capability), op, n)
            assert compiled.metadata.launch_pdl
            above, below = compiled.asm["ptx"].split("griddepcontrol.wait;")
            assert not re.search(r"\b(ld\.(?!param)|st\.)", above), (n, capability)
            assert above.count("cp.async.bulk.prefetch.L2") == rows * (1 if plain else 2) + weight, n
            assert "cp.async.bulk.prefetch" not in below
            assert "griddepcontrol.launch_dependents" in below
            above, below = cuobjdump(compiled, "-sass").split("ACQBULK")
            assert not re.search(r"\b(LD|ST)[GSL]\b", above), (n, capability)
            assert "LDG" in below
    old = cuobjdump(build(cuda(80), op, 16384), "-sass")
    assert not re.search("ACQBULK|PREEXIT|UBLKPF", old)
    assert not build(cuda(80), op, 16384).metadata.launch_pdl


@pytest.mark.parametrize("op", OPS)
def test_a_plain_launch_knows_no_dependency(op: str) -> None:
    compiled = build(cuda(90), op, 4096, dependent=False)
    assert not compiled.metadata.launch_pdl
    assert not re.search("ACQBULK|PREEXIT|UBLKPF", cuobjdump(compiled, "-sass"))


@pytest.mark.parametrize("op", OPS)
def test_rows_stay_packed_and_leave_room_for_two_programs(op: str) -> None:
    """Kept as fp32 they take 111 registers at 32768 (plain), and one program fits on a multiprocessor."""
    for n in (16384, 20480, 24576) if op != "rms_norm" else (16384, 20480, 24576, 32768):
        compiled = build(cuda(90), op, n)
        registers = usage(compiled, "REG")
        assert 2 * -(-registers // 8) * 8 * 32 * compiled.metadata.num_warps <= 65536, (n, registers)


@pytest.mark.parametrize("op", OPS)
def test_nothing_but_the_reduction_goes_through_shared_memory(op: str) -> None:
    """Nothing for a row that a warp has to itself; else a sum of each warp, and a second one where the compiler sends
    the result back. A weight in another layout than the rows costs two barriers a chunk."""
    for n, most in ((128, 0), (1024, 2), (5122, 2), (5125, 2), (8192, 2), (16384, 2)):
        sass = cuobjdump(build(cuda(90), op, n), "-sass")
        for instruction in (r"BAR\.SYNC", "STS", "LDS"):
            assert len(re.findall(rf"\b{instruction}\b", sass)) <= most, (n, instruction)


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_axis_compiles(capability: int) -> None:
    half, single = torch.bfloat16, torch.float32
    for spec, dtype, weight_dtype in (
        (GEMMA, half, half),
        (T5, half, single),
        (LLAMA, torch.float16, half),
        (FP32_WEIGHT_MULTIPLY, single, single),
        (replace(LLAMA, weight_offset="weight_dtype", sum="fp32"), half, half),
        (replace(LLAMA, has_weight=False), half, None),
        (replace(LLAMA, width=100), half, half),
        (replace(LLAMA, group=128), half, half),
    ):
        for in_place in (False, True):
            compiled = build(
                cuda(capability), "fused_add_rms_norm", 1024, spec, dtype, weight_dtype, nested=True, in_place=in_place
            )
            assert "LOCAL:0" in cuobjdump(compiled, "--dump-resource-usage"), spec


def test_q_norm_rows_of_a_split_projection_load_sixteen_bytes() -> None:
    for n in (64, 128, 256):
        sass = cuobjdump(build(cuda(90), "rms_norm", n, nested=True), "-sass")
        assert "LDG.E.128" in widths(sass, "LDG"), n
        assert widths(sass, "STG") == {"STG.E.128"}, n


def test_unaligned_rows_are_loaded_by_what_their_length_allows() -> None:
    for n, width in ((5124, "LDG.E.64"), (5122, "LDG.E"), (5125, "LDG.E.U16")):
        sass = cuobjdump(build(cuda(90), "rms_norm", n), "-sass")
        assert widths(sass, "LDG") == {width}, n


@pytest.mark.parametrize("architecture", AMD)
@pytest.mark.parametrize("op", OPS)
def test_amd_code_has_no_spills_and_moves_sixteen_bytes(op: str, architecture: str) -> None:
    for n in (1024, 5120, 16384, 32768, 65536):
        compiled = build(GPUTarget("hip", architecture, 64), op, n)
        assert compiled.asm["hsaco"].startswith(b"\x7fELF")
        assembly = compiled.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s*0\b", assembly), n
        moves = set(re.findall(r"\b(?:buffer|global)_(?:load|store)_(\w+)", assembly))
        assert moves == {"dwordx4"}, n
        assert compiled.metadata.num_warps * 64 <= 1024
