"""Applying twice, reverting, failing half way, sharing, and bad calls."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch import PatchConflict, UnsupportedInput, UnsupportedModel
from rmsnorm_patch.patch_state import STATE, original_class
from rmsnorm_patch.rewrite import classes, handover, layers, norms
from rmsnorm_patch.rewrite.journal import Journal

LAYERS = 2
NORMS = 2 * LAYERS + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_a_patched_model_computes_the_same_bits_and_goes_through_the_patches(
    small_model, run, ids, backend, dtype, inference
):
    model = small_model("llama", dtype)
    before = run(model, ids, inference=inference)
    report = rmsnorm_patch.apply(model, backend=backend)
    after = run(model, ids, inference=inference)
    assert after.same_as(before)
    assert before.kinds == {}
    # the first norm alone; then each layer's own pair, and its last add with the norm after it
    assert after.kinds == {"norm": 1, "in_layer": LAYERS, "cross_layer": LAYERS, "taken": LAYERS}
    assert after.backends == {"reference": 1 + 3 * LAYERS}
    assert len(report.norms) == NORMS
    assert report.layers == tuple(f"model.layers.{i}" for i in range(LAYERS))


def test_the_report_and_the_plan_are_plain_json(small_model):
    model = small_model("llama")
    planned = rmsnorm_patch.plan(model, backend="reference")
    report = rmsnorm_patch.apply(model, backend="reference")
    assert report.plan == planned == rmsnorm_patch.plan(model, backend="reference")
    written = json.loads(report.to_json())
    assert written["counts"] == {"cross_layer/fuse": 1, "final/fuse": 1, "in_layer/fuse": 2, "norm/fuse": 5}
    assert written["norms"][-1] == "model.norm"
    assert written["plan"] == json.loads(planned.to_json())


def test_plan_changes_nothing(small_model, snapshot):
    model = small_model("qwen3")
    before = snapshot(model)
    rmsnorm_patch.plan(model)
    assert snapshot(model) == before


def test_applied_twice_is_applied_once(small_model, snapshot):
    model = small_model("llama")
    report = rmsnorm_patch.apply(model)
    once = snapshot(model)
    assert rmsnorm_patch.apply(model) is report
    assert snapshot(model) == once


@pytest.mark.parametrize(
    "other", [{"backend": "reference"}, {"exclude": ["*.0.*"]}, {"include": ["model.norm"]}], ids=str
)
def test_other_settings_on_a_patched_model_are_a_conflict_that_names_both(small_model, snapshot, other):
    model = small_model("llama")
    rmsnorm_patch.apply(model)
    patched = snapshot(model)
    for call in (rmsnorm_patch.apply, rmsnorm_patch.plan):
        with pytest.raises(PatchConflict) as raised:
            call(model, **other)
        [(name, value)] = other.items()
        assert f"{name}={value!r}" in str(raised.value)
        assert "backend='auto', include=[], exclude=[]" in str(raised.value)
        assert "revert(model)" in str(raised.value)
    assert snapshot(model) == patched


def test_part_of_a_patched_model_is_a_conflict(small_model):
    model = small_model("llama")
    rmsnorm_patch.apply(model)
    with pytest.raises(PatchConflict, match="larger model"):
        rmsnorm_patch.apply(model.model.layers[0])


def test_a_model_around_a_patched_one_is_patched_as_a_whole(small_model, run, ids):
    model = small_model("llama")
    before = run(model, ids)
    rmsnorm_patch.apply(model.model)
    report = rmsnorm_patch.apply(model)
    assert len(report.norms) == NORMS
    assert report.norms[0].startswith("model.")
    assert STATE not in model.model.__dict__ or "applied" not in model.model.__dict__[STATE]
    assert run(model, ids).same_as(before)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "mixtral"])
def test_revert_gives_back_the_very_same_object(small_model, snapshot, model_type):
    model = small_model(model_type)
    model.model.layers[0].register_forward_hook(lambda *a: None)
    model.model.norm.register_forward_pre_hook(lambda *a: None)
    before = snapshot(model)
    rmsnorm_patch.apply(model)
    assert snapshot(model) != before
    rmsnorm_patch.revert(model)
    assert snapshot(model) == before
    rmsnorm_patch.revert(model)
    assert snapshot(model) == before


def test_revert_after_runs_leaves_nothing_on_the_modules(small_model, run, snapshot, ids):
    model = small_model("llama")
    run(model, ids)  # transformers installs its own recording hooks at the first call
    before = snapshot(model)
    rmsnorm_patch.apply(model)
    run(model, ids)
    run(model, ids, inference=True)
    rmsnorm_patch.revert(model)
    assert snapshot(model) == before


def test_patched_restores_what_it_found(small_model, snapshot):
    model = small_model("llama")
    before = snapshot(model)
    with contextlib.suppress(ZeroDivisionError), rmsnorm_patch.patched(model) as report:
        assert len(report.norms) == NORMS
        assert snapshot(model) != before
        raise ZeroDivisionError
    assert snapshot(model) == before
    rmsnorm_patch.apply(model)
    once = snapshot(model)
    with rmsnorm_patch.patched(model):
        pass
    assert snapshot(model) == once


class Halt(Exception):
    """Not an error of this package."""


def _fail_at(monkeypatch, owner: type, name: str, at: int) -> None:
    calls = 0
    kept = getattr(owner, name)

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Halt(f"{name} number {at}")
        return kept(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)


def _steps(small_model, monkeypatch) -> dict[str, int]:
    """How often each kind of change happens in one apply."""
    counts = {}
    for name in ("swap_class", "set_state", "record"):
        with monkeypatch.context() as patch:
            calls = []
            kept = getattr(Journal, name)
            patch.setattr(Journal, name, lambda *a, kept=kept, calls=calls: (calls.append(1), kept(*a))[1])
            model = _hooked(small_model("llama"))
            rmsnorm_patch.apply(model)
            counts[name] = len(calls)
    return counts


def _hooked(model: nn.Module) -> nn.Module:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in (model.model.norm, model.model.layers[0], model.model.layers[1].input_layernorm):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return model


def test_a_failure_at_any_step_undoes_all_of_them(small_model, run, snapshot, ids, monkeypatch):
    counts = _steps(small_model, monkeypatch)
    assert counts["swap_class"] == NORMS + LAYERS
    assert counts["record"] == 3
    assert counts["set_state"] >= 1 + LAYERS
    model = _hooked(small_model("llama"))
    expected = run(model, ids)
    before = snapshot(model)
    for name, total in counts.items():
        for at in range(1, total + 1):
            with monkeypatch.context() as patch:
                _fail_at(patch, Journal, name, at)
                with pytest.raises(UnsupportedModel, match=f"Halt: {name} number {at}") as raised:
                    rmsnorm_patch.apply(model)
            assert isinstance(raised.value.__cause__, Halt)
            assert snapshot(model) == before, (name, at)
    assert run(model, ids).same_as(expected)
    assert run(model, ids).kinds == {}


@pytest.mark.parametrize("step", [(norms, "install"), (layers, "install")], ids=lambda s: s[0].__name__)
def test_an_interrupt_rolls_back_and_passes_through(small_model, snapshot, monkeypatch, step):
    model = small_model("llama")
    before = snapshot(model)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(*step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        rmsnorm_patch.apply(model)
    assert snapshot(model) == before


def test_a_second_model_of_the_same_class_is_untouched(small_model, run, snapshot, ids):
    model, other = small_model("llama"), small_model("llama", seed=1)
    before, state = run(other, ids), snapshot(other)
    rmsnorm_patch.apply(model)
    assert snapshot(other)[0][1:3] == state[0][1:3]
    assert [type(m) for m in other.modules()] == [entry[1] for entry in state]
    again = run(other, ids)
    assert again.kinds == {}
    assert again.same_as(before)


def test_one_norm_shared_at_two_paths(small_model, run, snapshot, ids):
    model = small_model("llama", num_hidden_layers=3)
    model.model.layers[1].input_layernorm = model.model.layers[2].input_layernorm
    model.model.layers[0].post_attention_layernorm = model.model.norm
    before, state = run(model, ids), snapshot(model)
    report = rmsnorm_patch.apply(model)
    shared = [site for site in report.plan.norms if site.shared_paths]
    assert {(site.path, *site.shared_paths) for site in shared} == {
        ("model.layers.0.post_attention_layernorm", "model.norm"),
        ("model.layers.1.input_layernorm", "model.layers.2.input_layernorm"),
    }
    after = run(model, ids)
    assert after.same_as(before)
    assert after.kinds["in_layer"] == 3
    rmsnorm_patch.revert(model)
    assert snapshot(model) == state


def test_include_and_exclude_select_by_path(small_model, run, ids):
    model = small_model("llama")
    before = run(model, ids)
    report = rmsnorm_patch.apply(model, include=["model.layers.*"], exclude=["*.1.post_attention_layernorm"])
    assert report.norms == (
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
    )
    after = run(model, ids)
    assert after.same_as(before)
    assert after.kinds == {"norm": 1, "in_layer": 1, "cross_layer": 1, "taken": 1}


def test_bad_calls_name_what_came_and_what_is_allowed(small_model, snapshot):
    model = small_model("llama")
    before = snapshot(model)
    for call in (rmsnorm_patch.plan, rmsnorm_patch.apply, rmsnorm_patch.revert):
        with pytest.raises(UnsupportedModel, match="a dict"):
            call({"weights": 1})
        with pytest.raises(UnsupportedModel, match="the class Linear"):
            call(nn.Linear)
    for call in (rmsnorm_patch.plan, rmsnorm_patch.apply):
        with pytest.raises(UnsupportedModel, match="no module that computes an RMSNorm"):
            call(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        with pytest.raises(UnsupportedInput, match=r"'fast'.*'auto', 'reference', 'triton', 'cuda'"):
            call(model, backend="fast")
        with pytest.raises(UnsupportedModel, match="matches no norm"):
            call(model, include=["model.layer.*"])
        with pytest.raises(UnsupportedInput, match=r"include: got 'model\.norm'"):
            call(model, include="model.norm")
    with pytest.raises(UnsupportedModel, match="no norm to fuse out of 5"):
        rmsnorm_patch.apply(model, exclude=["*"])
    with pytest.raises(UnsupportedInput, match=r"apply\(exlude=\.\.\.\).*unknown option.*exclude"):
        rmsnorm_patch.apply(model, exlude=["*"])
    assert snapshot(model) == before


def test_warmup_has_nothing_to_do_on_the_cpu_and_wants_a_patched_model(small_model):
    model = small_model("llama")
    with pytest.raises(UnsupportedModel, match=r"not patched.*apply\(model\)"):
        rmsnorm_patch.warmup(model)
    rmsnorm_patch.apply(model)
    assert rmsnorm_patch.warmup(model) == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_forced_backend_must_be_able_to_run_where_the_model_is(small_model, snapshot):
    model = small_model("llama")
    before = snapshot(model)
    with pytest.raises(UnsupportedInput, match=r"backend='cuda': got a model on cpu.*backend='auto'"):
        rmsnorm_patch.apply(model, backend="cuda")
    assert snapshot(model) == before


def test_the_original_class_shows_through(small_model):
    model = small_model("llama")
    norm, kind = model.model.norm, type(model.model.norm)
    rmsnorm_patch.apply(model)
    assert type(norm) is not kind
    assert isinstance(norm, kind)
    assert (type(norm).__name__, type(norm).__qualname__, type(norm).__module__) == (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    assert repr(norm) == "LlamaRMSNorm((64,), eps=1e-06)"
    made = type(norm)(32, eps=1e-5)
    assert made.weight.shape == (32,)
    assert original_class(type(norm)) is kind


def test_a_norm_takes_its_argument_by_name_as_before(small_model):
    model = small_model("llama")
    norm = model.model.norm
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = norm(x)
        rmsnorm_patch.apply(model)
        assert torch.equal(norm(hidden_states=x), expected)
        with pytest.raises(TypeError):
            norm(x, x)
        with pytest.raises(TypeError):
            norm()


LIGHT_IMPORT = """
import sys, threading
import torch
before = set(sys.modules)
failed = []
def load():
    try:
        import rmsnorm_patch
        rmsnorm_patch.apply, rmsnorm_patch.plan, rmsnorm_patch.verify
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=load) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not failed, failed
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"transformers", "triton", "cuda", "vllm", "accelerate", "rich", "typer"}
assert not heavy, heavy
assert callable(sys.modules["rmsnorm_patch"].plan) and callable(sys.modules["rmsnorm_patch"].verify)
assert not torch.cuda.is_initialized()
"""


def test_import_is_light_and_thread_safe():
    subprocess.run([sys.executable, "-c", LIGHT_IMPORT], check=True, timeout=600)


def test_factories_installed_twice_and_from_threads_build_one_class(small_model):
    from rmsnorm_patch.rewrite.classes import install_factories

    original = type(small_model("llama").model.norm)
    key = norms.NormKey(rmsnorm_patch.NormSpec(eps=0.0, width=3), "weight", "variance_epsilon", "reference")
    made = []

    def build():
        install_factories()
        made.append(classes.patched_class(original, norms.ROLE, key))

    threads = [threading.Thread(target=build) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(made) == 8
    assert len(set(made)) == 1
    assert handover.LINK
