"""Sandwich layouts in real model types: every add behind a norm is one call with it, every bit stays, the proof is
green, and what keeps a call from it is counted and said."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

LAYERS = 3
TYPES = {  # adds behind norms in a layer of the small configuration, and those of them whose sum a norm of it reads
    "afmoe": (2, 1), "exaone4": (2, 0), "flex_olmo": (2, 0), "gemma2": (2, 1), "gemma3_text": (2, 1),
    "gemma4_text": (3, 1), "gemma4_unified_text": (2, 1), "glm4": (2, 1), "kolibri1": (2, 1), "lfm3": (2, 1),
    "olmo2": (2, 0), "olmo3": (2, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def matrix(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("support_matrix")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gemma2(small_model) -> PreTrainedModel:
    return small_model("gemma2", torch.bfloat16, num_hidden_layers=LAYERS)


def run(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True)
    return [found.logits, *found.hidden_states]


def identical(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def kinds(model: PreTrainedModel, tokens: torch.Tensor) -> Counter[str]:
    ran: Counter[str] = Counter()
    with observe.observing(lambda event: ran.update([f"{event.kind} {event.backend}"])):
        run(model, tokens)
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_bits_proof_and_undo(matrix: ModuleType, tokens: torch.Tensor, model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"no {model_type} in this transformers")
    model = matrix.build(model_type, torch.bfloat16)
    classes = [type(module) for module in model.modules()]
    before = run(model, tokens)
    adds, read = TYPES[model_type]
    layers = len(model.get_decoder().layers)
    counts = rmsnorm_patch.apply(model, backend="reference").counts()
    assert (counts["norm_add/fuse"], counts.get("norm_add/leave", 0)) == (adds * layers, 0)
    assert identical(before, run(model, tokens))
    ran = kinds(model, tokens)
    assert ran["norm_add reference"] == adds * layers
    assert ran["in_layer reference"] == read * layers
    proof = rmsnorm_patch.verify(model, {"input_ids": tokens})
    assert proof.passed
    assert proof.fired.pairs_fused == proof.fired.pairs_expected >= (adds + read) * layers
    rmsnorm_patch.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("_rmsnorm_patch" in module.__dict__ for module in model.modules())
    assert identical(before, run(model, tokens))


def test_a_kernel_of_ours_gives_the_bits_of_the_separate_ops(gemma2, tokens, monkeypatch) -> None:
    """The interpreter's kernels, of which one does what three did."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rmsnorm_patch.apply(gemma2, backend="triton")
    together = run(gemma2, tokens)
    counts = rmsnorm_patch.status(gemma2).counts()
    assert (counts["added"], counts["fused"], counts["handed_over"]) == (2 * LAYERS, LAYERS, LAYERS)
    assert (counts["alone"], counts["fallen_back"], counts["apart"]) == (1, 0, 0)
    rmsnorm_patch.revert(gemma2)
    plan = rmsnorm_patch.plan(gemma2, backend="triton")
    apart = plan.__class__(**{**vars(plan), "pairs": tuple(p for p in plan.pairs if p.kind != "norm_add")})
    rmsnorm_patch.rewrite.apply_plan(gemma2, apart)
    assert identical(together, run(gemma2, tokens))
    assert rmsnorm_patch.status(gemma2).counts()["added"] == 0


def hook(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("which", ["post_attention_layernorm", "post_feedforward_layernorm"])
def test_a_hook_on_the_norm_runs_and_is_named(gemma2, tokens, which: str) -> None:
    hook(gemma2.model.layers[1].get_submodule(which))
    before = run(gemma2, tokens)
    rmsnorm_patch.apply(gemma2, backend="reference")
    assert identical(before, run(gemma2, tokens))
    ran = kinds(gemma2, tokens)
    assert (ran["norm_add reference"], ran["norm_add original"]) == (2 * LAYERS - 1, 1)
    assert (ran["in_layer reference"], ran["cross_layer reference"]) == (LAYERS, LAYERS)
    (reason,) = rmsnorm_patch.status(gemma2).why_apart()
    assert "the norm has hooks" in reason


@pytest.mark.parametrize("which", ["pre_feedforward_layernorm", "input_layernorm"])
def test_a_hook_on_the_norm_of_the_sum_runs_and_is_named(gemma2, tokens, which: str) -> None:
    hook(gemma2.model.layers[1].get_submodule(which))
    before = run(gemma2, tokens)
    rmsnorm_patch.apply(gemma2, backend="reference")
    assert identical(before, run(gemma2, tokens))
    assert kinds(gemma2, tokens)["norm_add reference"] == 2 * LAYERS
    (reason,) = rmsnorm_patch.status(gemma2).why_apart()
    assert "the norm has hooks" in reason


def test_a_norm_of_the_sum_that_is_left_alone(gemma2, tokens) -> None:
    before = run(gemma2, tokens)
    plan = rmsnorm_patch.apply(gemma2, backend="reference", exclude=["*pre_feedforward*"]).plan
    assert len(list(plan.fused_pairs("norm_add"))) == 2 * LAYERS
    assert not list(plan.fused_pairs("in_layer"))
    assert identical(before, run(gemma2, tokens))
    assert kinds(gemma2, tokens)["norm_add reference"] == 2 * LAYERS


def test_norms_of_different_numerics_are_two_calls(gemma2, tokens, monkeypatch) -> None:
    """The norm behind which the add stands is one call with it; the norm of the sum is one of its own, and says why."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for layer in gemma2.model.layers:
        norm = layer.pre_feedforward_layernorm
        other = nn.RMSNorm(norm.weight.numel(), eps=1e-6, dtype=torch.bfloat16)
        other.weight.data.copy_(1 + norm.weight)
        layer.pre_feedforward_layernorm = other.eval()
    rmsnorm_patch.apply(gemma2, backend="triton")
    run(gemma2, tokens)
    status = rmsnorm_patch.status(gemma2)
    assert status.why_apart() == {"the norm of the sum has other numerics than the one behind which it stands": LAYERS}
    assert (status.counts()["added"], status.counts()["alone"]) == (2 * LAYERS, LAYERS + 1)


def test_gradients_are_the_unpatched_models(gemma2, tokens) -> None:
    model = gemma2.float()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    for backend in ("reference", "auto"):
        rmsnorm_patch.apply(model, backend=backend)
        assert identical(plain, gradients())
        rmsnorm_patch.revert(model)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_run_alike(gemma2, tokens, how) -> None:
    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits

    before = logits(gemma2)
    rmsnorm_patch.apply(gemma2, backend="reference")
    other = how(gemma2)
    assert torch.equal(before, logits(other))
    assert kinds(other, tokens)["norm_add reference"] == 2 * LAYERS
    rmsnorm_patch.revert(other)
    assert torch.equal(before, logits(other))


def test_a_norm_that_is_replaced_after_apply_is_called(gemma2, tokens) -> None:
    rmsnorm_patch.apply(gemma2, backend="reference")
    layer = gemma2.model.layers[1]
    layer.post_attention_layernorm = nn.Identity()
    found = run(gemma2, tokens)
    rmsnorm_patch.revert(gemma2)
    assert identical(found, run(gemma2, tokens))
