"""Which kernel serves which device, dtype and shape; registries, tuning files and variables with mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rmsnorm_patch.backends.cuda.registry import gpu_slug, read_registry, read_tuned
from rmsnorm_patch.backends.cuda.schedules import schedules
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.kernel_files import kernels_dir
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec
from rmsnorm_patch.ops import dispatch
from rmsnorm_patch.ops.dispatch import BUILT_CAPABILITIES, choose

BF16, FP32 = torch.bfloat16, torch.float32
LENGTHS = (1, 7, 64, 111, 128, 256, 513, 769, 1024, 2048, 2880, 3584, 4096, 5120, 5125, 7168, 8192, 16384, 24449, 32768)
LONG = (65536, 131072, 262144)
OPS = tuple(PLAIN_OPS)
REGISTRY = """
schema = 1
[[kernel]]
name = "rows"
source = "rows.cu"
entry = "rows"
ops = ["rms_norm"]
capability = [80]
tree = "lanes-{vec}"
reason = "rows in registers"
[[kernel.rule]]
n = [1, 4096]
m = [1, 64]
chunks_per_thread = 1
reason = "few rows"
[[kernel.rule]]
n = [1, 4096]
chunks_per_thread = 4
rows_per_cta = 2
"""


@pytest.fixture
def registry(tmp_path: Path):
    """`registry(text, old, new)`: the kernels of a registry file with one replacement."""

    def read(text: str = REGISTRY, old: str = "", new: str = ""):
        assert old in text
        file = tmp_path / "registry.toml"
        file.write_text(text.replace(old, new, 1) if old else text)
        return read_registry(file)

    return read


@pytest.mark.parametrize("arch", BUILT_CAPABILITIES)
@pytest.mark.parametrize("op", OPS)
def test_every_capability_and_shape_has_a_kernel(arch, op):
    for dtype in (BF16, torch.float16, FP32):
        for n in LENGTHS + LONG:
            for m in (1, 17, 256, 4096, 100_000):
                choice = choose(op, LLAMA, dtype, dtype, m, n, arch)
                assert choice.backend == "cuda", (dtype, n, m, choice.reason)
                assert choice.reason
                config = choice.config
                assert 1 <= config.threads <= 1024
                assert config.threads_per_row * config.vec * config.cluster >= 1
                assert config.cluster <= 8 or arch >= 90


@pytest.mark.parametrize("arch", BUILT_CAPABILITIES)
def test_one_reduction_tree_for_all_row_counts(arch):
    for op in OPS:
        for dtype in (BF16, FP32):
            for n in LENGTHS + LONG:
                found = schedules(op, dtype, n, arch)
                assert found
                assert len({config.tree for config in found}) == 1


@pytest.mark.parametrize("arch", BUILT_CAPABILITIES)
def test_lanes_tree_has_its_lanes(arch):
    """The tree adds 32 chunks at a time. With fewer lanes than a row has chunks the groups would be smaller, and rows
    of 512 columns once had two results, for few and for many rows, under one name of tree."""
    for op in (*OPS, "rms_norm_pair"):
        for dtype in (BF16, FP32):
            for n in (*range(8, 2048, 104), 512, 1024, 1032):
                for config in schedules(op, dtype, n, arch):
                    if ("TREE_THREADS", 0) in config.defines:
                        assert config.threads_per_row >= min(32, -(-n // config.vec)), (op, n, config)


def test_no_clusters_before_hopper():
    for arch in (80, 89):
        for n in LENGTHS + LONG:
            assert all(config.cluster == 1 for config in schedules("fused_add_rms_norm", BF16, n, arch))


def test_few_and_many_rows_differ_in_schedule_only(registry):
    few, many = schedules("rms_norm", BF16, 4096, 90, kernels=registry())
    assert (few.m, many.m[1] > 10**15) == ((1, 64), True)
    assert (few.threads, many.threads) == (512, 256)
    assert few.tree == many.tree == "lanes-8"


def test_two_trees_for_one_shape_are_refused(registry):
    kernels = registry(REGISTRY, "lanes-{vec}", "threads-{threads_per_row}")
    with pytest.raises(KernelBuildError, match="threads-128, threads-512") as caught:
        schedules("rms_norm", BF16, 4096, 90, kernels=kernels)
    assert "one reduction tree" in caught.value.supported


def test_gap_in_row_counts_means_no_kernel(registry):
    kernels = registry(
        REGISTRY,
        "[[kernel.rule]]\nn = [1, 4096]\nchunks_per_thread = 4",
        "[[kernel.rule]]\nn = [1, 2]\nchunks_per_thread = 4",
    )
    assert schedules("rms_norm", BF16, 4096, 90, kernels=kernels) == ()


def test_unknown_newer_capability_names_itself_and_what_was_proved():
    choice = choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, (13, 0))
    assert choice.backend == "cuda"
    assert "sm_130" in choice.reason
    assert "sm_120" in choice.reason


def test_capability_between_known_ones_uses_the_older_rules():
    choice = choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, (8, 7))
    assert choice.backend == "cuda"
    assert "rules of sm_80" in choice.reason


def test_too_old_capability_goes_to_triton_with_the_numbers():
    choice = choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, (7, 5))
    assert choice.backend == "triton"
    assert "needs sm_80 or newer, device has sm_75" in choice.reason


def test_too_long_rows_go_to_triton_with_the_numbers():
    choice = choose("rms_norm", LLAMA, BF16, BF16, 8, 300_001, 90)
    assert choice.backend == "triton"
    assert "N <= 262144" in choice.reason
    assert "N=300001" in choice.reason


def test_without_triton_it_is_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    choice = choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 75)
    assert choice.backend == "reference"
    assert "Triton is not installed" in choice.reason


def test_missing_compiler_goes_to_triton_with_the_reason():
    choice = choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 90, cuda_unavailable="NVRTC is not installed")
    assert (choice.backend, choice.reason) == ("triton", "Triton: NVRTC is not installed")


def test_cpu_is_the_reference():
    choice = choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, device=torch.device("cpu"))
    assert (choice.backend, choice.config) == ("reference", None)


def test_forced_backends():
    assert choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 90, backend="triton").backend == "triton"
    assert choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 90, backend="reference").backend == "reference"
    with pytest.raises(KernelBuildError, match="device has sm_75"):
        choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 75, backend="cuda")
    with pytest.raises(KernelBuildError, match="not an NVIDIA GPU"):
        choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, None, backend="cuda")


def test_grouped_norm_is_chosen_by_its_group():
    spec = NormSpec(group=128)
    assert choose("rms_norm", spec, BF16, BF16, 8, 1_048_576, 90).config == (
        choose("rms_norm", LLAMA, BF16, BF16, 8, 128, 90).config
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_other_dtypes_list_the_supported_ones(dtype):
    for x, weight, name in ((dtype, BF16, "x"), (BF16, dtype, "weight")):
        with pytest.raises(UnsupportedInput, match=r"float32.*bfloat16.*float16") as caught:
            choose("rms_norm", LLAMA, x, weight, 8, 4096, 90)
        assert name in caught.value.site


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("schema = 1", "schema = 2", "registry.schema"),
        ("schema = 1", "schema = 1\nkernals = 3", "registry.kernals"),
        ('ops = ["rms_norm"]', 'ops = ["layer_norm"]', "registry.kernel[0].ops"),
        ("capability = [80]", 'capability = "sm_80"', "registry.kernel[0].capability"),
        ("capability = [80]", "capability = [90, 80]", "registry.kernel[0].capability"),
        ('entry = "rows"', "", "registry.kernel[0].entry"),
        ("n = [1, 4096]", "n = [0, 4096]", "registry.kernel[0].rule[0].n"),
        ("chunks_per_thread = 1", "chunks_per_thread = 0", "registry.kernel[0].rule[0].chunks_per_thread"),
        ("chunks_per_thread = 1", "", "registry.kernel[0].rule[0]"),
        ("chunks_per_thread = 1", "chunks_per_thread = 1\nvec_bytes = 24", "registry.kernel[0].rule[0].vec_bytes"),
        ("chunks_per_thread = 1", "chunks_per_thread = 1\nwarps = 4", "registry.kernel[0].rule[0].warps"),
        ("chunks_per_thread = 1", "chunks_per_thread = 1\ndefines = { x = 1 }", "registry.kernel[0].rule[0].defines"),
        ("chunks_per_thread = 1", "chunks_per_thread = 1\nitemsize = [8]", "registry.kernel[0].rule[0].itemsize"),
        ("chunks_per_thread = 1", "chunks_per_thread = true", "registry.kernel[0].rule[0].chunks_per_thread"),
    ],
)
def test_registry_mistake_names_file_and_key(registry, tmp_path, old, new, key):
    with pytest.raises(KernelBuildError) as caught:
        registry(REGISTRY, old, new)
    assert caught.value.site == f"{tmp_path / 'registry.toml'}: {key}"
    assert caught.value.supported


def test_unreadable_registry_is_named(tmp_path):
    (tmp_path / "registry.toml").write_text("[[kernel]")
    with pytest.raises(KernelBuildError, match=r"registry\.toml"):
        read_registry(tmp_path / "registry.toml")


def tuned_file(folder: Path, **changes: object) -> Path:
    override = {"kernel": "rows", "n": [4096, 4096], "m": [65], "set": {"chunks_per_thread": 2}, "reason": "measured"}
    content = {"schema": 1, "device": "NVIDIA H200", "overrides": [{**override, **changes}]}
    file = folder / "nvidia_h200.json"
    file.write_text(json.dumps(content))
    return file


def test_tuned_constants_replace_the_rules(registry, tmp_path):
    tuned_file(tmp_path)
    overrides = read_tuned("NVIDIA H200", tmp_path)
    few, many = schedules("rms_norm", BF16, 4096, 90, kernels=registry(), overrides=overrides)
    assert (few.threads_per_row, few.reason) == (512, "few rows")
    assert (many.threads_per_row, many.rows_per_cta, many.reason) == (256, 2, "measured")
    _, elsewhere = schedules("rms_norm", BF16, 2048, 90, kernels=registry(), overrides=overrides)
    assert elsewhere.threads_per_row == 64


def test_other_gpus_have_no_tuning(tmp_path):
    tuned_file(tmp_path)
    assert read_tuned("NVIDIA GeForce RTX 5090", tmp_path) == ()
    assert gpu_slug("NVIDIA GeForce RTX 5090") == "nvidia_geforce_rtx_5090"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"set": {"threads": 64}}, "tuned.overrides[0].set.threads"),
        ({"set": {"cluster": 3}}, "tuned.overrides[0].set.cluster"),
        ({"set": None}, "tuned.overrides[0].set"),
        ({"n": "all"}, "tuned.overrides[0].n"),
        ({"ops": ["softmax"]}, "tuned.overrides[0].ops"),
        ({"itemsize": [3]}, "tuned.overrides[0].itemsize"),
        ({"speed": 1}, "tuned.overrides[0].speed"),
    ],
)
def test_tuning_mistake_names_file_key_and_allowed(tmp_path, changes, key):
    file = tuned_file(tmp_path, **changes)
    with pytest.raises(KernelBuildError) as caught:
        read_tuned("NVIDIA H200", tmp_path)
    assert caught.value.site == f"{file}: {key}"
    assert caught.value.supported


def test_broken_tuning_file_is_named(tmp_path):
    (tmp_path / "nvidia_h200.json").write_text("{")
    with pytest.raises(KernelBuildError, match=r"nvidia_h200\.json"):
        read_tuned("NVIDIA H200", tmp_path)


def test_tuning_that_changes_the_tree_for_some_row_counts_is_refused(registry, tmp_path):
    tuned_file(tmp_path, set={"vec_bytes": 8, "chunks_per_thread": 2})
    overrides = read_tuned("NVIDIA H200", tmp_path)
    with pytest.raises(KernelBuildError, match="lanes-4, lanes-8"):
        schedules("rms_norm", BF16, 4096, 90, kernels=registry(), overrides=overrides)


def test_shipped_tuning_files_are_well_formed():
    folder = kernels_dir() / "tuned"
    for file in folder.glob("*.json"):
        device = json.loads(file.read_text())["device"]
        assert file.stem == gpu_slug(device)
        assert read_tuned(device)


def test_backend_variable(monkeypatch):
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    assert dispatch.requested_backend() == "auto"
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    assert dispatch.requested_backend() == dispatch.requested_backend("auto") == "triton"
    assert dispatch.requested_backend("cuda") == "cuda"
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "Cuda")
    with pytest.raises(UnsupportedInput, match="auto, reference, triton, cuda") as caught:
        dispatch.requested_backend()
    assert caught.value.site == dispatch.BACKEND_VARIABLE
    assert "'Cuda'" in caught.value.got


def test_backend_variable_decides_for_auto(monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    assert choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 90).backend == "triton"
    assert choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 90, backend="cuda").backend == "cuda"
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "fastest")
    with pytest.raises(UnsupportedInput, match="fastest"):
        choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, 90)
