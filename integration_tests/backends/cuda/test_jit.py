"""NVRTC for real: machine code per architecture, PTX for devices it does not know, errors that a user can act on."""

from __future__ import annotations

import pytest
import torch

from rmsnorm_patch.backends.cuda import jit, nvrtc
from rmsnorm_patch.errors import KernelBuildError
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, T5, NormSpec
from rmsnorm_patch.ops.dispatch import BUILT_CAPABILITIES


def elf_architecture(code: bytes) -> int:
    """The sm number in a cubin's ELF flags (e_flags at offset 48; bits 8-15 since CUDA 13)."""
    flags = int.from_bytes(code[48:52], "little")
    return (flags >> 8) & 0xFF


@pytest.mark.parametrize("arch", BUILT_CAPABILITIES)
def test_machine_code_for_every_built_capability(cache_dir, build, compiles, arch):
    code = jit.machine_code(build(arch=arch))
    assert code.startswith(b"\x7fELF")
    assert elf_architecture(code) == arch
    assert b"scale_rows" in code


def test_unknown_newer_capability_gets_ptx_of_the_newest_known(cache_dir, build, compiles):
    newest = max(nvrtc.supported_architectures())
    code = jit.machine_code(build(arch=199))
    assert f".target sm_{newest}".encode() in code
    assert b".entry scale_rows" in code
    assert code.endswith(b"\0")  # the driver reads PTX up to the NUL


def test_arch_suffix_is_passed_on(build, config):
    assert build(arch=90, config=config(arch_suffix="a")).architecture((80, 90, 100)) == "sm_90a"
    assert build(arch=95).architecture((80, 90, 100)) == "compute_90"


def test_compile_error_shows_log_options_and_next_step(cache_dir, kernel_folder, build):
    source = kernel_folder / "cuda" / "scale_rows.cu"
    source.write_text("#error not today\n" + source.read_text())
    with pytest.raises(KernelBuildError) as caught:
        jit.machine_code(build(n=4096))
    message = str(caught.value)
    for part in ("scale_rows.cu", "not today", "-DN=4096", "--gpu-architecture=sm_90", "triton"):
        assert part in message
    assert not list(cache_dir.glob("*.artefact"))


def test_missing_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "_folders", lambda: [tmp_path])
    nvrtc.find.cache_clear()
    nvrtc._library.cache_clear()
    try:
        assert nvrtc.find() is None
        with pytest.raises(KernelBuildError, match="pip install nvidia-cuda-nvrtc"):
            nvrtc.compile_source("x.cu", "", {}, ())
    finally:
        nvrtc.find.cache_clear()
        nvrtc._library.cache_clear()


def test_broken_library_is_named(monkeypatch, tmp_path):
    (tmp_path / "libnvrtc.so.13").write_bytes(b"not a library")
    monkeypatch.setattr(nvrtc, "_folders", lambda: [tmp_path])
    nvrtc.find.cache_clear()
    nvrtc._library.cache_clear()
    try:
        with pytest.raises(KernelBuildError, match=str(tmp_path / "libnvrtc.so.13")):
            nvrtc.version()
    finally:
        nvrtc.find.cache_clear()
        nvrtc._library.cache_clear()


def test_headers_of_the_machine_are_not_seen(cache_dir, kernel_folder, build):
    """A kernel that needs an include path would build here and fail at a user's."""
    source = kernel_folder / "cuda" / "scale_rows.cu"
    source.write_text("#include <cuda_bf16.h>\n" + source.read_text())
    with pytest.raises(KernelBuildError, match="cuda_bf16"):
        jit.machine_code(build())


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("spec", "x", "weight", "expected"),
    [
        (LLAMA, BF16, BF16, {"X_T": 1, "W_T": 1, "OUT_T": 1, "ROUND_T": 1, "OFFSET": 0, "HAS_WEIGHT": 1}),
        (LLAMA, BF16, FP32, {"X_T": 1, "W_T": 0, "OUT_T": 0, "ROUND_T": 1}),
        (GEMMA, FP16, FP16, {"X_T": 2, "W_T": 2, "OUT_T": 2, "ROUND_T": 0, "OFFSET": 1}),
        (T5, FP32, BF16, {"X_T": 0, "W_T": 1, "OUT_T": 1, "ROUND_T": 1}),
        (T5, BF16, FP32, {"X_T": 1, "W_T": 0, "OUT_T": 0, "ROUND_T": 0}),
        (NormSpec(has_weight=False), BF16, None, {"W_T": 1, "OUT_T": 1, "HAS_WEIGHT": 0, "OFFSET": 0}),
        (NormSpec(has_weight=False), BF16, BF16, {"HAS_WEIGHT": 0}),
        (NormSpec(weight_offset="weight_dtype"), BF16, BF16, {"OFFSET": 2}),
        (NormSpec(sum="fp32"), BF16, BF16, {"SUM_F32": 1}),
        (NormSpec(width=48), BF16, BF16, {"N": 64, "WIDTH": 48, "WEIGHT_ROWS": 1}),
    ],
)
def test_constants_follow_the_spec(config, spec, x, weight, expected):
    request = jit.Build(config(), spec, True, 64, 1, x, weight, 16, 16, False, 90)
    assert {name: request.defines()[name] for name in expected} == expected


def test_grouped_norm_is_rows_of_one_group(config):
    request = jit.Build(config(), NormSpec(group=16), False, 16, 4, BF16, BF16, 16, 16, False, 90)
    defines = request.defines()
    assert (defines["N"], defines["WIDTH"], defines["WEIGHT_ROWS"]) == (16, 16, 4)
