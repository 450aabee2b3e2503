"""What the vLLM benchmark makes of the times that it took."""

from __future__ import annotations

import enum
import gc
import os
import sys
import types
import weakref

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rmsnorm_patch.backends.cuda import launcher, schedules
from rmsnorm_patch.kernel_files import kernels_dir
from rmsnorm_patch.vllm_plugin import settings


@pytest.fixture(scope="module")
def bench_vllm(script):
    return script("bench_vllm")


@pytest.fixture(scope="module")
def vllm_engine(script):
    return script("benchlib.vllm_engine")


@pytest.fixture(scope="module")
def shapes(script):
    return script("benchlib.vllm_shapes")


def test_what_each_kernel_adds_to_a_step_is_the_step(vllm_engine):
    step = [("product", 0.0, 10.0), ("norm", 9.0, 12.0), ("product", 13.0, 20.0), ("hidden", 14.0, 15.0)]
    rows = vllm_engine.exposed(step[::-1])
    assert rows == {"product": [17.0, 2, 18.0], "norm": [3.0, 1, 2.0], "hidden": [1.0, 1, 0.0]}
    assert sum(added for _, _, added in rows.values()) == 20.0


def test_kernels_whose_names_begin_alike_are_told_apart(vllm_engine):
    alike = [f"void cutlass::device_kernel<{'x' * 200}{tile}>()" for tile in (64, 128)]
    labels = {vllm_engine.label(name) for name in (*alike, "norm")}
    assert len(labels) == 3
    assert "norm" in labels
    assert all(len(label) <= 90 for label in labels)


def test_every_scheme_has_its_shapes(shapes):
    for scheme, quantisation in shapes.CONFIGS.items():
        for name in ("llama-8b", "tiny"):
            config, extra = shapes.SHAPES[f"{name}-{scheme}"]
            assert (config["quantization_config"], extra) == (quantisation, {})
            assert config["hidden_size"] == shapes.SHAPES[name][0]["hidden_size"]
    assert "quantization_config" not in shapes.LLAMA_8B
    assert set(shapes.ENVIRONMENT) <= set(shapes.SHAPES)


@pytest.mark.parametrize("shape", ["gemma3-4b", "glm4-9b", "olmo2-1b"])
def test_sandwich_shapes_are_configs_that_transformers_reads(shapes, shape):
    fields = dict(shapes.SHAPES[shape][0])
    (architecture,) = fields["architectures"]
    config = AutoConfig.for_model(**fields)
    assert architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[fields["model_type"]]
    assert all(getattr(config, name) == value for name, value in fields.items() if name != "torch_dtype")


def test_a_variable_is_set_while_an_engine_starts(vllm_engine, monkeypatch):
    monkeypatch.delenv(vllm_engine.NORM_ADD_VARIABLE, raising=False)
    with vllm_engine.CHANGES["ir-adds-apart"]():
        assert settings.read_norm_add() == "off"
    assert settings.read_norm_add() == "auto"
    monkeypatch.delenv(vllm_engine.SILU_QUANTISED_VARIABLE, raising=False)
    with vllm_engine.CHANGES["ir-silu-off"]():
        assert settings.read_silu_quantised() == "off"
    assert settings.read_silu_quantised() == "auto"
    monkeypatch.delenv(vllm_engine.BLOCKS_VARIABLE, raising=False)
    with vllm_engine.CHANGES["ir-blocks-off"]():
        assert settings.read_blocks() == "off"
    assert settings.read_blocks() == "auto"


def test_rows_of_a_record_with_variants_of_before_are_a_table(bench_vllm, vllm_engine):
    """Under the names that they were measured by; nobody can ask for such an engine any more."""
    row = {"shape": "llama-8b-block", "process": "shared", "case": "decode-1", "tokens_per_s": 1.0}
    names = ["ir-silu", "stock", "ir-blocks", "ir"]
    rows = [{**row, "variant": name, "tokens_per_s_range": [1.0, 1.0]} for name in names]
    lines = bench_vllm.table({"rows": rows}).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == ["stock", "ir", "ir-silu", "ir-blocks"]
    assert not set(vllm_engine.RECORDED) & set(vllm_engine.VARIANTS)
    assert set(vllm_engine.RECORDED.values()) <= set(vllm_engine.VARIANTS)


def test_a_shape_with_experts_is_a_configuration_of_transformers(shapes):
    config, extra = shapes.SHAPES["qwen3-moe-fp8"]
    made = AutoConfig.for_model(**{name: value for name, value in config.items() if name != "architectures"})
    assert (made.num_experts, made.num_experts_per_tok, made.head_dim) == (128, 8, 128)
    assert extra == {"quantization": "fp8"}


def test_shapes_have_a_process_of_their_own_setting_and_tiny_twins(shapes):
    for name in ("llama-8b", "tiny"):
        assert shapes.SHAPES[f"{name}-invariant"] is shapes.SHAPES[name]
        assert shapes.ENVIRONMENT[f"{name}-invariant"] == {"VLLM_BATCH_INVARIANT": "1"}
    tiny, gemma = (shapes.SHAPES[name][0] for name in ("tiny-gemma3", "gemma3-4b"))
    assert {key for key in gemma if tiny[key] == gemma[key]} > {"model_type", "architectures", "hidden_activation"}
    assert tiny["hidden_size"] == shapes.TINY["hidden_size"]


def test_a_row_is_a_median_over_captures_and_knows_its_share_of_the_ceiling(bench_vllm):
    def times(*steps: float) -> dict[str, list[float]]:
        return {"tokens_per_s": [1e6 / step for step in steps], "step_us": list(steps), "captures": [1] * len(steps)}

    made = {"stock": times(100, 104, 102), "ir": times(99, 97, 98), "removed": times(92, 94, 96)}
    samples = {("llama-8b", variant, "shared", "decode-1"): values for variant, values in made.items()}
    stock, ours, removed = bench_vllm.rows_of(samples)["rows"]
    assert (stock["step_us"], stock["step_us_range"], stock["captures"]) == (102, [100, 104], 3)
    assert stock["step_us_rounds"] == [100, 104, 102]
    assert stock["tokens_per_s_rounds"] == [10000, 9615.4, 9803.9]
    assert (ours["share_recovered"], ours["speedup"]) == (0.5, round(102 / 98, 4))
    assert "share_recovered" not in removed


@pytest.mark.parametrize(
    ("engines", "told"),
    [
        ("tiny:ir+ir-reorder", "'ir' and 'ir-reorder' have one setting a process"),
        ("tiny:ir@plain+ir-reorder", "'ir' and 'ir-reorder' have one setting a process"),
        ("tiny:fast", "variants: stock"),
        ("tiny:ir@nowhere.toml", "'nowhere.toml' is no file"),
    ],
)
def test_engines_that_cannot_be_are_refused(bench_vllm, monkeypatch, capsys, engines, told):
    monkeypatch.setattr(sys, "argv", ["bench_vllm.py", "--engines", engines])
    with pytest.raises(SystemExit):
        bench_vllm.main()
    assert told in capsys.readouterr().err


def test_products_are_set_while_an_engine_starts(vllm_engine, monkeypatch):
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_LINEAR", "auto")
    for variant, setting in (("ir-apart", "off"), ("ir-reorder", "reorder")):
        with vllm_engine.CHANGES[variant]():
            assert os.environ["RMSNORM_PATCH_VLLM_LINEAR"] == setting
        assert os.environ["RMSNORM_PATCH_VLLM_LINEAR"] == "auto"


def test_other_schedules_hold_while_graphs_are_captured(vllm_engine, tmp_path):
    def clusters() -> set[int]:
        configs = schedules.schedules("fused_add_rms_norm_", torch.bfloat16, 4096, 90, None)
        return {config.cluster for config in configs}

    rules = (kernels_dir() / "cuda" / "schedules" / "fused_add_rows.toml").read_text()
    other = tmp_path / "fused_add_rows.toml"
    other.write_text(rules.replace('"-", 4,   40,', '"-", 1,   40,'))
    usual = clusters()
    for path in (other, tmp_path):  # one kernel's, or a folder's; the tree's of all others
        with vllm_engine.scheduled(str(path)):
            assert clusters() == {1} != usual
            assert schedules.schedules("rms_norm", torch.bfloat16, 4096, 90, None)
        assert clusters() == usual


def test_plain_launches_hold_while_graphs_are_captured(vllm_engine, monkeypatch):
    made: list[tuple[int, ...]] = []

    def other(*values: object) -> None:
        raise AssertionError("only kernels are made here")

    functions = launcher.Functions(lambda *values: made.append(values), other, other, other, "python", "this test")
    monkeypatch.setattr(launcher, "functions", lambda: functions)
    arguments = (1, 2, 4096, 8, 1, 4, 128, 1, 16, 16, 0)
    with vllm_engine.scheduled("plain"):
        launcher.functions().new_kernel(*arguments)
    launcher.functions().new_kernel(*arguments)
    assert made == [(*arguments[:7], 0, *arguments[8:]), arguments]


class Steps:
    """Stands where a process with an engine would, and keeps what it was told."""

    shape, variants = "tiny", ("stock", "ir")

    def __init__(self) -> None:
        self.told = []

    def capture(self, variant, anew):
        self.told.append((variant, anew))
        return anew

    def ask(self, variant, do, *args):
        return {"tokens_per_s": 1.0, "step_us": 2.0} if do == "decode" else {"tokens_per_s": 3.0}


@pytest.mark.parametrize(("keep", "captures"), [(False, 3), (True, 1)])
def test_graphs_are_captured_anew_before_a_round_unless_they_are_kept(bench_vllm, keep, captures):
    child = Steps()
    found = bench_vllm.measure([child], [1], 3, float("inf"), lambda result: None, keep)
    behind_the_first = not keep
    assert child.told == [
        *[("stock", False), ("ir", False), ("ir", behind_the_first), ("stock", behind_the_first)],
        *[("stock", behind_the_first), ("ir", behind_the_first)],
    ]
    assert {row["captures"] for row in found["rows"] if row["case"] == "decode-1"} == {captures}
    assert {row["rounds"] for row in found["rows"]} == {3}


class Mode(enum.Enum):
    """Those of vLLM's CUDAGraphMode that are captured."""

    PIECEWISE = 1
    FULL = 2


class Graph:
    """Stands where a CUDA graph would: it can be looked for, and its end be seen."""


class Runner:
    """Stands where vLLM's runner would, and captures what its manager describes."""

    def __init__(self) -> None:
        self.cudagraph_manager = types.SimpleNamespace(
            _capture_descs={mode: [1, 8] for mode in Mode}, graphs={}, pool="global"
        )
        self.captured: list[tuple[set[str], object]] = []

    def capture_model(self) -> None:
        manager = self.cudagraph_manager
        assert not manager.graphs
        self.captured.append(({mode.name for mode in manager._capture_descs}, manager.pool))
        for descs in manager._capture_descs.values():
            manager.graphs.update({desc: Graph() for desc in descs})


def test_graphs_outlive_those_captured_in_their_place(vllm_engine, monkeypatch):
    """A graph that ends takes the cuBLAS workspaces of its capture stream with it, those of piecewise graphs too."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    runner = Runner()
    worker = types.SimpleNamespace(model_runner=runner, device="cpu")
    manager, every = runner.cudagraph_manager, dict(runner.cudagraph_manager._capture_descs)
    runner.capture_model()
    stood = []
    for _ in range(3):
        stood += [weakref.ref(graph) for graph in manager.graphs.values()]
        assert vllm_engine.recapture(worker)
        assert manager._capture_descs == every
    gc.collect()
    assert len(stood) == 6
    assert all(graph() is not None for graph in stood)
    assert not {id(graph()) for graph in stood} & {id(graph) for graph in manager.graphs.values()}
    assert [modes for modes, _ in runner.captured[1:]] == [{"FULL"}] * 3
    assert len({id(pool) for _, pool in runner.captured}) == 4


def test_a_runner_without_full_graphs_is_left_as_it_is(vllm_engine):
    runner = Runner()
    del runner.cudagraph_manager._capture_descs[Mode.FULL]
    worker = types.SimpleNamespace(model_runner=runner, device="cpu")
    assert not vllm_engine.recapture(worker)
    assert not vllm_engine.recapture(types.SimpleNamespace(model_runner=types.SimpleNamespace()))
    assert runner.captured == []
    assert vars(worker).keys() == {"model_runner", "device"}
