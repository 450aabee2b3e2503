"""Which kernel serves which device, dtype and shape; registries, tuning files and variables with mistakes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from rmsnorm_patch.backends import rule_table
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
order = 1
name = "rows"
source = "rows.cu"
entry = "rows"
ops = ["rms_norm"]
capability = [80]
tree = "lanes-{vec}"
reason = "rows in registers"
columns = ["n", "m", "chunks_per_thread", "rows_per_cta", "STAGE", "reason"]
rules = [
    [[1, 4096], [1, 64], 1, "-", 4, "few"],
    [[1, 4096], "-", 4, 2, 4, "-"],
]
[reasons]
few = "few rows"
"""


@pytest.fixture
def registry(tmp_path: Path):
    """`registry(text, old, new)`: the kernel of a file of schedules with one replacement, alone."""

    def read(text: str = REGISTRY, old: str = "", new: str = ""):
        assert old in text
        folder = tmp_path / "schedules"
        folder.mkdir(exist_ok=True)
        (folder / "rows.toml").write_text(text.replace(old, new, 1) if old else text)
        return read_registry(folder)

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
        '[[1, 4096], "-", 4',
        '[[1, 2], "-", 4',
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
        ("schema = 1", "schema = 2", "schema"),
        ("schema = 1", "schema = 1\nkernals = 3", "kernals"),
        ("order = 1", "", "order"),
        ('name = "rows"', 'name = "other"', "name"),
        ('ops = ["rms_norm"]', 'ops = ["layer_norm"]', "ops"),
        ("capability = [80]", 'capability = "sm_80"', "capability"),
        ("capability = [80]", "capability = [90, 80]", "capability"),
        ('entry = "rows"', "", "entry"),
        ("[1, 4096]", "[0, 4096]", "rules[0].n"),
        ("[1, 64], 1,", "[1, 64], 0,", "rules[0].chunks_per_thread"),
        ("[1, 64], 1,", '[1, 64], "-",', "rules[0]"),
        ("[1, 64], 1,", "[1, 64],", "rules[0]"),
        ("[1, 64], 1,", "[1, 64], true,", "rules[0].chunks_per_thread"),
        ('1, "-", 4, "few"', '1, "-", 4, "many"', "rules[0].reason"),
        ('1, "-", 4, "few"', '1, "-", 4.5, "few"', "rules[0].STAGE"),
        ('1, "-", 4, "few"', '1, "-", 4, "-"', "reasons"),
        ('"rows_per_cta"', '"vec_bytes"', "rules[1].vec_bytes"),
        ('"rows_per_cta"', '"warps"', "rules[1].warps"),
        ('"rows_per_cta"', '"itemsize"', "rules[1].itemsize"),
        ('"rows_per_cta"', '"n"', "columns"),
        ('few = "few rows"', "few = 1", "reasons"),
    ],
)
def test_mistake_in_schedules_names_file_and_key(registry, tmp_path, old, new, key):
    text = REGISTRY.replace('4, 2, 4, "-"', '4, 3, 4, "-"') if new in ('"vec_bytes"', '"itemsize"') else REGISTRY
    with pytest.raises(KernelBuildError) as caught:
        registry(text, old, new)
    assert caught.value.site == f"{tmp_path / 'schedules' / 'rows.toml'}: {key}"
    assert caught.value.supported


def test_unreadable_schedules_are_named(tmp_path):
    with pytest.raises(KernelBuildError, match="no schedules"):
        read_registry(tmp_path)
    (tmp_path / "rows.toml").write_text("[[kernel]")
    with pytest.raises(KernelBuildError, match=r"rows\.toml"):
        read_registry(tmp_path)


def test_two_kernels_are_not_tried_at_once(registry, tmp_path):
    registry()
    folder = tmp_path / "schedules"
    other = REGISTRY.replace('name = "rows"', 'name = "other"')
    (folder / "other.toml").write_text(other)
    with pytest.raises(KernelBuildError, match=r"rows\.toml: order: got 1; supported: another than other's"):
        read_registry(folder)
    (folder / "other.toml").write_text(other.replace("order = 1", "order = 2"))
    assert [kernel.name for kernel in read_registry(folder)] == ["rows", "other"]


COLUMNS = (1, 2, 7, 8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 320, 384, 512, 576, 768, 1000, 1024, 1536, 1537, 2048,
           2560, 2880, 3072, 3584, 4096, 4097, 5120, 6144, 7168, 8192, 12288, 16384, 16392, 20480, 32768, 65536, 131072,
           262144, 262146)  # fmt: skip
SELECTED = "4cc42edc56b622d6d21ccff5c2099c79e79deb569e5027c39e4191230df2eaae"
"""Of every schedule below. Who changes a rule changes this too, and times the shapes that the rule takes."""


def test_every_selected_schedule_is_the_one_that_was_measured():
    digest = hashlib.sha256()
    for op in (*PLAIN_OPS, "rms_norm_pair"):
        for dtype in (BF16, FP32, torch.float16):
            for n in COLUMNS:
                for capability in (75, 80, 86, 89, 90, 100, 103, 120, 130):
                    for device in (None, "NVIDIA H100 80GB HBM3", "NVIDIA H200"):
                        for config in schedules(op, dtype, n, capability, device):
                            digest.update(repr(config).encode())
                        digest.update(b";")
    assert digest.hexdigest() == SELECTED


def test_shipped_schedules_read_as_tables(repository):
    """One line a rule, no wider than a screen; what is shipped is in the place where it is looked for."""
    folders = ("cuda/schedules", "triton/schedules", "tuned")
    files = [file for folder in folders for file in (repository / "kernels" / folder).glob("*")]
    assert len(files) > 8
    for file in files:
        lines = file.read_text().splitlines()
        start, end = lines.index("rules = ["), lines.index("]")
        assert lines[start + 1].startswith("#"), file
        assert all(line.startswith("    [") and line.endswith("],") for line in lines[start + 2 : end]), file
        assert max(map(len, lines)) <= 120, file


def tuned_file(folder: Path, **changes: object) -> Path:
    """What is tuned for an H200: one rule, whose cells `changes` replaces or adds; None takes a column out."""
    cells = {"kernel": "rows", "n": [4096, 4096], "m": [65], "chunks_per_thread": 2, "reason": "x", **changes}
    cells = {column: cell for column, cell in cells.items() if cell is not None}
    file = folder / "nvidia_h200.toml"
    lines = ["schema = 1", 'device = "NVIDIA H200"', f"columns = {json.dumps([*cells])}"]
    file.write_text("\n".join([*lines, f"rules = [{json.dumps([*cells.values()])}]", "[reasons]", 'x = "measured"']))
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
        ({"threads": 64}, "rules[0].threads"),
        ({"cluster": 3}, "rules[0].cluster"),
        ({"chunks_per_thread": None}, "rules[0]"),
        ({"n": "all"}, "rules[0].n"),
        ({"n": None}, "rules[0].n"),
        ({"ops": ["softmax"]}, "rules[0].ops"),
        ({"itemsize": [3]}, "rules[0].itemsize"),
        ({"reason": "y"}, "rules[0].reason"),
    ],
)
def test_tuning_mistake_names_file_key_and_allowed(tmp_path, changes, key):
    file = tuned_file(tmp_path, **changes)
    with pytest.raises(KernelBuildError) as caught:
        read_tuned("NVIDIA H200", tmp_path)
    assert caught.value.site == f"{file}: {key}"
    assert caught.value.supported


def test_broken_tuning_file_is_named(tmp_path):
    (tmp_path / "nvidia_h200.toml").write_text("{")
    with pytest.raises(KernelBuildError, match=r"nvidia_h200\.toml"):
        read_tuned("NVIDIA H200", tmp_path)


def test_tuning_that_changes_the_tree_for_some_row_counts_is_refused(registry, tmp_path):
    tuned_file(tmp_path, vec_bytes=8, chunks_per_thread=2)
    overrides = read_tuned("NVIDIA H200", tmp_path)
    with pytest.raises(KernelBuildError, match="lanes-4, lanes-8"):
        schedules("rms_norm", BF16, 4096, 90, kernels=registry(), overrides=overrides)


def test_shipped_tuning_files_are_well_formed():
    folder = kernels_dir() / "tuned"
    for file in folder.glob("*.toml"):
        device = rule_table.tomllib.loads(file.read_text())["device"]
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
