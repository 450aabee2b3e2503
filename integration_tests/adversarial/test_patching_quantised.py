"""Models with quantised products, of three libraries: planned, patched and proved as any other, and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

import rmsnorm_patch

KINDS = (
    "fine-grained",
    "compressed token",
    "compressed static",
    "compressed int8",
    "torchao Float8WeightOnlyConfig",
    "torchao Int8DynamicActivationInt8WeightConfig",
)
"""Of `quantised_models.made`."""
NORMS, PAIRS = 9, 8
CALLS = {"norm": 1, "in_layer": 4, "cross_layer": 4, "taken": 4}
"""What a forward goes through: every add with its norm."""
Make = Callable[[str], PreTrainedModel]


@pytest.fixture
def ids() -> torch.Tensor:
    """Bytes of a text, as the shipped model was trained on."""
    return torch.tensor([list(b"You may copy"), list(b"This program")])


@pytest.fixture
def make(quantised_models: ModuleType, tmp_path: Path) -> Iterator[Make]:
    def made(kind: str) -> PreTrainedModel:
        return quantised_models.made(kind, tmp_path / str(len(list(tmp_path.iterdir()))), "cpu")  # type: ignore[no-any-return]

    with quantised_models.product_of_the_hub():
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_planned_proved_and_restored(make, run, ids, snapshot, kind):
    model = make(kind)
    expected = run(model, ids)
    before = snapshot(model)
    wanted = rmsnorm_patch.plan(model)
    assert [len(list(wanted.fused_norms())), len(list(wanted.fused_pairs()))] == [NORMS, PAIRS]
    report = rmsnorm_patch.apply(model, verify=ids)
    assert report.proof is not None
    assert report.proof.passed
    assert f"fired: {NORMS} of {NORMS} norm calls, {PAIRS} of {PAIRS} with their add" in str(report.proof)
    after = run(model, ids)
    assert after.kinds == CALLS
    assert after.same_as(expected)
    rmsnorm_patch.revert(model)
    assert snapshot(model) == before
    assert run(model, ids).same_as(expected)


@pytest.mark.parametrize("kind", ["fine-grained", "compressed token"])
def test_a_kernel_serves_every_norm_of_a_quantised_model(make, run, ids, monkeypatch, kind):
    """Triton's, in the interpreter: behind compressed-tensors' wrappers too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, ids = make(kind), ids[:1, :4]
    expected = run(model, ids)
    rmsnorm_patch.apply(model, backend="triton")
    after = run(model, ids)
    assert after.kinds == CALLS
    assert after.backends == {"triton": sum(CALLS.values())}
    torch.testing.assert_close(after.logits, expected.logits, atol=0.2, rtol=0.05)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("compressed")])
def test_weights_without_their_scales_are_no_wider_run(make, ids, kind):
    """The plan says that the products read plain rows; the proof, that it measures from the original."""
    model = make(kind)
    (note,) = rmsnorm_patch.plan(model).notes
    assert "norms write plain rows" in note
    proof = rmsnorm_patch.apply(model, verify=ids).proof
    assert proof is not None
    assert proof.dtype == "bfloat16"
    assert "not from a wider run" in str(proof)


@pytest.mark.parametrize("kind", ["compressed token", "compressed int8"])
def test_a_checkpoint_that_its_first_forward_decompresses(make, run, ids, kind):
    """A proof runs replicas: the hook that decompresses must take itself off the replica, and not off the model."""
    plain, model = make(kind), make(kind)
    expected = run(plain, ids)
    report = rmsnorm_patch.apply(model, verify=ids)
    assert report.proof is not None
    assert report.proof.passed
    assert model.model.layers[0].self_attn.q_proj.weight.element_size() == 1, "still compressed"
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds == CALLS
    rmsnorm_patch.revert(model)
    assert run(model, ids).same_as(expected)
    assert run(model, ids).kinds == {}


def test_what_stands_over_a_wrapped_forward_counts(make, run, ids):
    """compressed-tensors' wrapper calls a function that anybody may have put there."""
    model = make("compressed token")
    run(model, ids)
    norm = model.model.layers[1].input_layernorm
    if "_original_forward_func" not in norm.__dict__:
        pytest.skip("this compressed-tensors does not wrap forwards")
    norm._original_forward_func = lambda self, hidden_states: 2 * type(self).forward(self, hidden_states)
    wanted = rmsnorm_patch.plan(model)
    (left,) = [site for site in wanted.norms if site.action == "leave"]
    assert left.path == "model.layers.1.input_layernorm"
    assert "what it computes is unknown" in left.reason


def test_offloading_that_is_taken_off_leaves_the_patch_on(make, run, ids):
    model = make("compressed token")
    expected = run(model, ids)
    if "_original_forward_func" not in model.model.norm.__dict__:
        pytest.skip("this compressed-tensors does not wrap forwards")
    from compressed_tensors.offload import remove_dispatch

    rmsnorm_patch.apply(model)
    remove_dispatch(model)
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds == CALLS
    rmsnorm_patch.revert(model)
    assert model.model.norm.forward.__func__ is type(model.model.norm).forward
    assert run(model, ids).kinds == {}
