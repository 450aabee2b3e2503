"""`rmsnorm_patch.status`: how many calls went which way, and why, without anybody observing."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_driver import table_of
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch import UnsupportedModel
from rmsnorm_patch.backends.cuda import driver
from rmsnorm_patch.page import folded
from rmsnorm_patch.patch_state import STATE
from rmsnorm_patch.rewrite import counts, handover, layer_calls, native

TOKENS = torch.arange(1, 8)[None]
LAYERS = 3
NORMS = 2 * LAYERS + 1
STEP = {"calls": NORMS, "handed_over": LAYERS, "reference": LAYERS + 1}
"""One forward on the CPU: a norm in each layer and the first one are computed, the others are taken over."""


@pytest.fixture
def model(small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model("llama", num_hidden_layers=LAYERS)


def patched(model: PreTrainedModel) -> PreTrainedModel:
    rmsnorm_patch.apply(model)
    return model


def step(model: torch.nn.Module, times: int = 1) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(times):
            logits = model(TOKENS).logits
    return logits


def counted(model: torch.nn.Module) -> dict[str, int]:
    """The counts that are not zero."""
    return {name: count for name, count in rmsnorm_patch.status(model).counts().items() if count}


def times(number: int, one: dict[str, int]) -> dict[str, int]:
    return {name: number * count for name, count in one.items()}


def test_each_call_is_counted_once(model) -> None:
    assert counted(patched(model)) == {}
    step(model, 5)
    assert counted(model) == times(5, STEP)
    sites = {site.path: site for site in rmsnorm_patch.status(model).sites}
    assert sites["model.layers.1.input_layernorm"].handed_over == 5
    assert sites["model.layers.1.post_attention_layernorm"].reference == 5
    assert {site.calls for site in sites.values()} == {5}


def test_what_launcher_c_serves_is_counted(model, launchers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(model)
    norm = model.model.norm
    kernel = layer_calls.kernel_of(norm)
    assert kernel is not None
    spec, width = type(norm)._rmsnorm_patch_key.spec, model.config.hidden_size
    monkeypatch.setattr(kernel.fused, "table", table_of("fused_add_rms_norm", spec, width))
    native.enroll(type(norm), kernel)
    native.enroll_alone(type(norm), kernel, table_of("rms_norm", spec, width))
    assert str(launchers) == driver.LIBRARY
    step(model)  # finds the frames of the loop
    before = counted(model)
    step(model, 3)
    now = {name: count - before.get(name, 0) for name, count in counted(model).items()}
    each = {"calls": NORMS, "fused": LAYERS, "handed_over": LAYERS, "alone": 1}
    assert {name: count for name, count in now.items() if count} == times(3, each)
    model.config.num_hidden_layers = 2  # the last layer's norm takes nothing any more
    step(model, 4)
    assert counted(model)["not_taken"] == 4


def test_threads_lose_no_count(model) -> None:
    patched(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=step, args=(model, 25)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert counted(model) == times(150, STEP)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_start_at_zero_and_count_for_themselves(model, way) -> None:
    step(patched(model), 2)
    made = way(model)
    assert counted(made) == {}
    step(made, 3)
    assert counted(made) == times(3, STEP)
    assert counted(model) == times(2, STEP)


def test_revert_forgets(model) -> None:
    step(patched(model))
    rmsnorm_patch.apply(model)
    assert counted(model) == STEP, "a second apply changes nothing"
    rmsnorm_patch.revert(model)
    assert not any(STATE in module.__dict__ for module in model.modules())
    assert counted(patched(model)) == {}


def test_a_proof_is_not_counted(model) -> None:
    step(patched(model), 2)
    rmsnorm_patch.verify(model, {"input_ids": TOKENS})
    assert counted(model) == times(2, STEP)


def test_hooks_and_gradients_are_reasons(model) -> None:
    handle = patched(model).model.layers[1].post_attention_layernorm.register_forward_hook(lambda *call: None)
    step(model, 2)
    handle.remove()
    model(TOKENS)
    status = rmsnorm_patch.status(model)
    assert status.why_apart() == {
        "a gradient may be wanted": LAYERS,
        "the norm has hooks or a forward of its own: it is called as a module": 2,
    }
    (site,) = (site for site in status.sites if site.path == "model.layers.1.post_attention_layernorm")
    assert (site.apart, site.calls, site.fallen_back) == (2, 3, 0)
    assert "2 x model.layers.1.post_attention_layernorm: the norm has hooks" in str(status)


def test_an_input_that_is_no_plain_tensor_falls_back(model) -> None:
    class Marked(torch.Tensor):
        pass

    norm = patched(model).model.norm
    norm(torch.ones(2, 64).as_subclass(Marked))
    assert rmsnorm_patch.status(model).why() == {"input is a Marked": 1}


class TakingMore(LlamaRMSNorm):
    def forward(self, hidden_states, positions=None):
        return super().forward(hidden_states)


def test_a_call_with_more_than_the_input_falls_back(model) -> None:
    model.model.norm = TakingMore(64).eval()
    norm, x = patched(model).model.norm, torch.ones(2, 64)
    norm(x, positions=x)
    norm(x)
    (site,) = rmsnorm_patch.status(norm).sites
    assert dict(site.why) == {"the norm is called with more than its input": 1}
    assert (site.class_name, site.calls, site.reference) == ("TakingMore", 2, 1)


def test_a_tensor_eps_is_named_and_not_read(model) -> None:
    patched(model).model.norm.variance_epsilon = torch.tensor(1e-5)
    step(model)
    assert rmsnorm_patch.status(model).why_apart() == {"eps is a Tensor, no float": 1}


def test_a_sum_that_is_not_passed_on_is_a_hand_over_in_vain(model) -> None:
    patched(model).config.num_hidden_layers = 2
    model.model.layers[2].input_layernorm.requires_grad_(False)
    step(model, handover.MAX_UNTAKEN)
    status = rmsnorm_patch.status(model)
    assert status.counts()["not_taken"] == handover.MAX_UNTAKEN
    assert any(note.startswith("model.layers.1 hands nothing over for now") for note in status.notes)
    step(model)
    assert rmsnorm_patch.status(model).counts()["apart"] == 1


def test_a_norm_that_was_replaced_is_named(model) -> None:
    patched(model).model.layers[0].input_layernorm = torch.nn.RMSNorm(64)
    (note,) = rmsnorm_patch.status(model).notes
    assert note.startswith("model.layers.0.input_layernorm is a RMSNorm that is not patched")
    assert len(rmsnorm_patch.status(model).sites) == NORMS - 1


def test_part_of_a_patched_model_has_a_status(model) -> None:
    step(patched(model))
    assert len(rmsnorm_patch.status(model.model.layers[0]).sites) == 2


def test_an_unpatched_model_has_none(model) -> None:
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*not patched.*apply\(model\) first"):
        rmsnorm_patch.status(model)
    with pytest.raises(UnsupportedModel, match=r"torch\.nn\.Module"):
        rmsnorm_patch.status("a model")


def test_a_norm_without_its_counts_computes_and_counts_again(model) -> None:
    """As it comes from a pickle whose `__getstate__` leaves private attributes out."""
    expected = step(patched(model))
    for module in model.modules():
        if layer_calls.kernel_of(module) is not None:
            del module.__dict__[STATE]
    assert torch.equal(step(model), expected)
    assert counted(model) == {"not_taken": 2 * LAYERS}
    step(model)
    assert counted(model)["calls"] == NORMS
    rmsnorm_patch.revert(model)
    assert not any(STATE in module.__dict__ for module in model.modules())


def test_compiled_graphs_are_not_counted_and_the_page_says_so(model) -> None:
    compiled = torch.compile(patched(model), backend="eager", fullgraph=True)
    step(compiled, 2)
    assert counted(model) == {}
    assert "not counted: calls inside graphs of torch.compile, and replays of CUDA graphs" in str(
        rmsnorm_patch.status(model)
    )


def test_the_page_the_list_and_the_document_agree(model) -> None:
    step(patched(model), 2)
    status = rmsnorm_patch.status(model)
    document = json.loads(status.to_json())
    assert document == status.to_dict()
    assert document["counts"] == status.counts()
    assert sum(site["calls"] for site in document["sites"]) == 2 * NORMS
    for text in (str(status), status.explain()):
        assert text.startswith(f"LlamaForCausalLM: {NORMS} patched norms, {2 * NORMS} calls since apply")
        assert max(map(len, text.splitlines())) <= 120
    assert all(site.path in status.explain() for site in status.sites)


def test_threads_lose_no_reason() -> None:
    reasons = counts.Reasons()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=lambda: [reasons.add("a gradient is wanted") for _ in range(20000)])]
    threads += [threading.Thread(target=lambda: [reasons.add("a hook") for _ in range(20000)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert reasons.counts() == {"a gradient is wanted": 20000, "a hook": 60000}


def test_reasons_do_not_fill_memory() -> None:
    reasons = counts.Reasons()
    for number in range(1000):
        reasons.add(f"rows of {number}")
    assert len(reasons.counts()) == counts.MAX_REASONS + 1
    assert sum(reasons.counts().values()) == 1000


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        ([3], "layers.3.norm"),
        ([2, 0, 1], "layers.[0-2].norm"),
        ([0, 1, 3], "layers.[0-1,3].norm"),
        ([0, 2, 4, 6], "layers.[0,2,4,6].norm"),
        ([0, 2, 4, 6, 8], "layers.[0..8 (5 of them)].norm"),
    ],
)
def test_paths_of_one_row_name_their_layers_while_there_are_few_ranges(numbers: list[int], shown: str) -> None:
    assert folded(f"layers.{number}.norm" for number in numbers) == shown
