"""`compiled="joined"`: Inductor's pass, who puts it there and takes it away, and what compiled models then compute."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn as nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch import PatchConflict, UnsupportedInput
from rmsnorm_patch.fused.linear_norm import captured
from rmsnorm_patch.fused.linear_norm.kernel import MOST_ROWS
from rmsnorm_patch.ops import sources
from rmsnorm_patch.rewrite import inductor

pytestmark = pytest.mark.filterwarnings("ignore")
N, K = 64, 96
IDS = torch.arange(3, 17).view(2, 7)


class Layer(nn.Module):
    """What Inductor computes itself here is exact, so that the bits are eager's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(K, N, bias=False), LlamaRMSNorm(N)

    def forward(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.norm(residual * 2 + self.proj(rows))


@pytest.fixture(autouse=True)
def outcomes(monkeypatch: pytest.MonkeyPatch, compiled_cpp: None) -> Iterator[list[captured.Outcome]]:
    """Of each graph, the CPU's too. Nothing comes from a cache, and nothing is left in Inductor's configuration."""
    monkeypatch.setenv("RMSNORM_PATCH_COMPILE", "op")
    told: list[captured.Outcome] = []
    captured.on_settled.append(told.append)
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        yield told
    torch._dynamo.reset()
    captured.on_settled.remove(told.append)
    gc.collect()
    try:
        assert config.joint_custom_pre_pass is None
    finally:
        config.joint_custom_pre_pass = None


def layer() -> Layer:
    torch.manual_seed(0)
    made = Layer().to(torch.bfloat16).eval()
    nn.init.normal_(made.norm.weight)
    return made


def given(seed: int = 0, m: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, m // 2, n, generator=generator).to(torch.bfloat16) for n in (K, N))  # type: ignore[return-value]


@torch.no_grad()
def compiled(model: nn.Module, mode: str | None = "reduce-overhead", m: int = 6) -> torch.Tensor:
    result: torch.Tensor = torch.compile(model, mode=mode, fullgraph=True)(*given(m=m))
    return result


@torch.no_grad()
def test_a_captured_graph_has_eager_bits(outcomes: list[captured.Outcome]) -> None:
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    compute = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    want = [model(*given(seed)) for seed in range(3)]
    got, code = run_and_get_code(lambda: [compute(*given(seed)) for seed in range(3)])
    assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True))
    assert [outcome.joined for outcome in outcomes] == [1]
    assert "\n".join(code).count("linear_fused_add_rms_norm_.default(") == 1


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "layers", "alone"),
    [
        ("llama", 1, 1),
        pytest.param("llama", 2, 1, marks=pytest.mark.long),
        pytest.param("qwen3", 1, 3, marks=pytest.mark.long),
    ],
)
def test_every_norm_behind_a_product_of_a_model(
    small_model: Callable[..., PreTrainedModel],
    outcomes: list[captured.Outcome],
    model_type: str,
    layers: int,
    alone: int,
) -> None:
    """Llama's first norm reads the embedding; Qwen3's queries and keys are no sums."""
    model = small_model(model_type, torch.bfloat16, num_hidden_layers=layers)
    want = model(IDS, use_cache=False).logits
    rmsnorm_patch.apply(model, compiled="joined")
    got = torch.compile(model, mode="reduce-overhead", fullgraph=True)(IDS, use_cache=False).logits
    outcome = outcomes.pop()
    assert (outcome.joined, dict(outcome.left)) == (2 * layers, {"no add stands in front": alone})
    assert ((got - want).norm() / want.norm()) < 0.02


@pytest.mark.slow
@pytest.mark.long
@torch.no_grad()
def test_with_default_settings_the_code_is_stocks(
    small_model: Callable[..., PreTrainedModel], compiled_code: ModuleType, outcomes: list[captured.Outcome]
) -> None:
    """A whole model; `test_code_of_stock_where_nothing_is_joined` asks it of a layer."""
    model = small_model("qwen3", torch.bfloat16, num_hidden_layers=1)
    call = lambda: torch.compile(model, fullgraph=True)(IDS, use_cache=False).logits  # noqa: E731
    want, stock = compiled_code.compiled_anew(call)
    rmsnorm_patch.apply(model, compiled="joined")
    got, code = compiled_code.compiled_anew(call)
    assert [dict(outcome.left) for outcome in outcomes] == [{"the graph is not captured": 5}]
    assert torch.equal(got, want)
    assert code == stock


@pytest.mark.parametrize(
    ("mode", "m", "why"),
    [(None, 6, "the graph is not captured"), ("reduce-overhead", 300, f"more than {MOST_ROWS} rows")],
    ids=["None-6", "reduce-overhead-300"],
)
def test_code_of_stock_where_nothing_is_joined(
    mode: str | None, m: int, why: str, compiled_code: ModuleType, outcomes: list[captured.Outcome]
) -> None:
    model = layer()
    want, stock = compiled_code.compiled_anew(lambda: compiled(model, mode, m))
    rmsnorm_patch.apply(model, compiled="joined")
    got, code = compiled_code.compiled_anew(lambda: compiled(model, mode, m))
    assert outcomes == [captured.Outcome(0, Counter({why: 1}))]
    assert code == stock
    assert torch.equal(got, want)


def test_the_code_is_another_where_a_norm_is_joined_or_changed(compiled_code: ModuleType) -> None:
    model = layer()
    codes = [compiled_code.compiled_anew(lambda: compiled(model))[1]]
    rmsnorm_patch.apply(model, compiled="joined")
    codes += [compiled_code.compiled_anew(lambda: compiled(model))[1]]
    rmsnorm_patch.revert(model)
    model.norm.variance_epsilon *= 2
    codes += [compiled_code.compiled_anew(lambda: compiled(model))[1]]
    assert len(set(codes)) == 3


def test_names_and_comments_are_no_code(compiled_code: ModuleType) -> None:
    """Triton's, of which no code is made here."""
    code = (
        "# kernel path: /a/b.py\ntriton_red_fused_add_mean_0 = async_compile.triton('triton_red_fused_add_mean_0', 2)"
    )
    program = compiled_code.program(code)
    assert program == compiled_code.program(code.replace("_add_mean", "").replace("/b", "/c"))
    for old, new in (("red", "per"), ("mean_0", "mean_1"), ("2)", "3)")):
        assert program != compiled_code.program(code.replace(old, new))


def test_nothing_compiled_is_no_code(compiled_code: ModuleType) -> None:
    with pytest.raises(AssertionError, match="nothing was compiled"):
        compiled_code.compiled_anew(lambda: layer()(*given()))


@pytest.mark.parametrize("mode", ["reduce-overhead", None])
def test_without_being_asked_nothing_is_joined(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMSNORM_PATCH_COMPILE")
    model = layer()
    want = compiled(model, mode)
    rmsnorm_patch.apply(model)
    assert config.joint_custom_pre_pass is None
    assert torch.equal(compiled(model, mode), want)


@pytest.mark.parametrize("variable", ["", "decomposed"])
def test_where_no_op_would_run_the_model_traces_its_own_arithmetic(
    variable: str, monkeypatch: pytest.MonkeyPatch, outcomes: list[captured.Outcome]
) -> None:
    """On a CPU by default, and everywhere by the variable."""
    monkeypatch.setenv("RMSNORM_PATCH_COMPILE", variable)
    model = layer()
    want = compiled(model)
    rmsnorm_patch.apply(model, compiled="joined")
    assert torch.equal(compiled(model), want)
    assert outcomes == []


@torch.no_grad()
def test_a_failure_leaves_a_right_graph_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: torch.fx.Graph, norm: torch.fx.Node) -> str:
        raise KeyError("val")

    monkeypatch.setattr(captured, "_product_behind", fail)
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    with caplog.at_level("WARNING", logger=captured.logger.name):
        assert torch.equal(compiled(model), model(*given()))
    assert "rmsnorm_patch: norms of a graph stay apart: KeyError: 'val'" in caplog.messages


def test_in_training_mode_and_for_a_gradient(outcomes: list[captured.Outcome]) -> None:
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    torch.compile(model, mode="reduce-overhead", fullgraph=True)(*given()).sum().backward()
    assert model.proj.weight.grad is not None
    compiled(model.train())
    assert outcomes == []


def test_an_exported_program_has_the_arithmetic() -> None:
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    with torch.no_grad():
        for strict in (True, False):
            exported = torch.export.export(model, given(), strict=strict)
            assert "joinable" not in str(exported.graph)


# who puts the pass there, and who takes it away


def test_applied_and_reverted() -> None:
    model, other = layer(), layer()
    rmsnorm_patch.apply(model, compiled="joined")
    rmsnorm_patch.apply(other, compiled="joined")
    assert config.joint_custom_pre_pass.before is None
    rmsnorm_patch.revert(model)
    assert config.joint_custom_pre_pass is not None
    rmsnorm_patch.revert(other)
    assert config.joint_custom_pre_pass is None
    with rmsnorm_patch.patched(model, compiled="joined"):
        assert config.joint_custom_pre_pass is not None
    assert config.joint_custom_pre_pass is None


def test_a_model_that_is_dropped() -> None:
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    del model
    gc.collect()
    assert config.joint_custom_pre_pass is None


def test_copies_and_pickles_count_for_themselves(outcomes: list[captured.Outcome]) -> None:
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    copied, saved = copy.deepcopy(model), pickle.dumps(model)
    rmsnorm_patch.revert(model)
    assert config.joint_custom_pre_pass is not None
    compiled(copied)
    del copied
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert config.joint_custom_pre_pass is None
    loaded = pickle.loads(saved)
    assert config.joint_custom_pre_pass is not None
    compiled(loaded)
    assert [outcome.joined for outcome in outcomes] == [1, 1]
    torch._dynamo.reset()


def test_an_apply_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no")

    model = layer()
    monkeypatch.setattr(inductor, "install", fail)
    with pytest.raises(rmsnorm_patch.UnsupportedModel, match="OSError: no"):
        rmsnorm_patch.apply(model, compiled="joined")
    assert type(model.norm) is LlamaRMSNorm
    assert not inductor._LIVE


@pytest.mark.parametrize("where", ["before", "behind"])
def test_the_last_of_the_others_is_dropped_while_a_model_is_patched(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection may run in the middle of it, before or behind what puts the pass there."""
    others = [inductor.Joining()]
    install = inductor.install

    def collecting() -> None:
        if where == "before":
            others.clear()
        install()
        others.clear()

    monkeypatch.setattr(inductor, "install", collecting)
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    assert not others
    assert config.joint_custom_pre_pass is not None
    rmsnorm_patch.revert(model)
    assert config.joint_custom_pre_pass is None


def test_a_model_is_patched_by_another_thread_while_the_last_of_the_others_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other thread may have seen the pass, which is then taken away."""
    first, others, uninstall = [inductor.Joining()], [], inductor.uninstall

    def meanwhile() -> None:
        if not others:
            thread = threading.Thread(target=lambda: others.append(inductor.Joining()))
            thread.start()
            thread.join()
        uninstall()

    monkeypatch.setattr(inductor, "uninstall", meanwhile)
    first.clear()
    assert len(others) == 1
    assert config.joint_custom_pre_pass is not None
    others[:] = [None]
    assert config.joint_custom_pre_pass is None


def test_a_thread_that_compiles(outcomes: list[captured.Outcome]) -> None:
    """What Inductor is configured with holds in one thread alone in newer versions of torch."""
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")

    def run() -> None:
        with config.patch(force_disable_caches=True):
            compiled(model)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [outcome.joined for outcome in outcomes] == [1]


class Noting(CustomGraphPass):
    def __init__(self) -> None:
        self.joinable: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.joinable.append(sum("joinable" in str(node.target) for node in graph.nodes))

    def uuid(self) -> str:
        return "noting"


def test_a_pass_that_stood_there_runs_first_and_comes_back() -> None:
    noting, model = Noting(), layer()
    config.joint_custom_pre_pass = noting
    rmsnorm_patch.apply(model, compiled="joined")
    compiled(model)
    assert noting.joinable == [1]
    assert config.joint_custom_pre_pass.uuid() == ("rmsnorm_patch", sources.digest(), "noting")
    rmsnorm_patch.revert(model)
    assert config.joint_custom_pre_pass is noting
    config.joint_custom_pre_pass = None


def test_a_pass_that_is_put_there_later_stays() -> None:
    noting, model = Noting(), layer()
    rmsnorm_patch.apply(model, compiled="joined")
    config.joint_custom_pre_pass = noting
    compiled(model)  # puts ours behind it
    assert noting.joinable == [1]
    config.joint_custom_pre_pass = noting
    rmsnorm_patch.revert(model)
    assert config.joint_custom_pre_pass is noting
    config.joint_custom_pre_pass = None


def test_nothing_is_cached_with_a_pass_that_has_no_key() -> None:
    config.joint_custom_pre_pass = lambda graph: None
    model = layer()
    rmsnorm_patch.apply(model, compiled="joined")
    assert config.joint_custom_pre_pass.uuid() is None
    rmsnorm_patch.revert(model)
    config.joint_custom_pre_pass = None


def test_graphs_of_other_models_are_as_they_were(outcomes: list[captured.Outcome]) -> None:
    stock, patched = layer(), layer()
    want = compiled(stock)
    rmsnorm_patch.apply(patched, compiled="joined")
    torch._dynamo.reset()
    assert torch.equal(compiled(stock), want)
    assert outcomes == []


# what is said


def test_the_plan_says_so() -> None:
    model = layer()
    plan = rmsnorm_patch.plan(model, compiled="joined")
    line = "compiled: in captured graphs those of 1 norms that read an add take over the split product in front of it"
    assert line in str(plan).splitlines()
    assert line in plan.explain().splitlines()
    assert plan.to_dict()["compiled"] == "joined"
    assert "compiled:" not in str(rmsnorm_patch.plan(model))


def test_other_settings_are_a_conflict() -> None:
    model = layer()
    report = rmsnorm_patch.apply(model, compiled="joined")
    assert rmsnorm_patch.apply(model, compiled="joined") == report
    with pytest.raises(PatchConflict, match=r"compiled='joined'; supported: one set"):
        rmsnorm_patch.apply(model)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_backend_without_that_kernel(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedInput, match=f"compiled: got 'joined' with backend='{backend}'"):
        rmsnorm_patch.plan(layer(), backend=backend, compiled="joined")
    monkeypatch.setenv("RMSNORM_PATCH_BACKEND", "reference")
    with pytest.raises(UnsupportedInput, match="compiled: got 'joined' with backend='reference'"):
        rmsnorm_patch.apply(layer(), compiled="joined")


def test_an_inductor_without_a_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_PLACE", "a_place_that_is_not_there")
    with pytest.raises(UnsupportedInput, match="whose Inductor has no a_place_that_is_not_there"):
        rmsnorm_patch.apply(layer(), compiled="joined")
