"""The proof as an object, what it says, and the model that comes back from it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from proof_models import apply_as_kernel, as_kernel, build, honest, prompts
from safetensors import safe_open
from safetensors.torch import load_file

from rmsnorm_patch import UnsupportedInput, UnsupportedModel, VerificationFailed, apply, revert, verify
from rmsnorm_patch.proof import Proof, memory


def snapshot(model: nn.Module) -> list[tuple]:
    """Everything that makes a model patched, by identity."""
    return [
        (
            path,
            type(m),
            {k: id(v) for k, v in vars(m).items()},
            [list(vars(m)[k].items()) for k in vars(m) if "hooks" in k],
        )
        for path, m in model.named_modules()
    ]


def wrong_at(weight: torch.Tensor) -> Callable:
    def norm(x, w, spec, eps):  # type: ignore[no-untyped-def]
        return honest(x, w, spec, 1e-5 if w is weight else eps)

    return as_kernel(norm)


def one_bad_site(kernel: Callable) -> tuple[nn.Module, str]:
    model = build("llama", torch.bfloat16)
    path = "model.layers.2.post_attention_layernorm"
    kernel(wrong_at(model.get_submodule(path).weight))
    apply_as_kernel(model)
    return model, path


def test_json_round_trip(kernel: Callable) -> None:
    kernel(as_kernel(honest))
    model = build("qwen3", torch.bfloat16)
    apply_as_kernel(model)
    proof = verify(model, prompts())
    assert Proof.from_json(proof.to_json()) == proof
    told = json.loads(proof.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["passed"] is True
    assert [line[:4] for line in told["verdicts"]] == ["ok  "] * 5


def test_red_proof_is_strict_json_too(kernel: Callable) -> None:
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, e) * float("nan")))
    model = build("llama", torch.bfloat16)
    apply_as_kernel(model)
    proof = verify(model, prompts(), raise_on_failure=False)
    json.loads(proof.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Proof.from_json(proof.to_json()) == proof
    assert not proof.logits.passed


def test_explanation_names_the_site_its_numbers_and_the_command(kernel: Callable) -> None:
    model, path = one_bad_site(kernel)
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts(), seed=7, source="my checkpoint")
    proof = caught.value.proof
    text = proof.explain()
    assert str(caught.value).count(text) == 1
    worst = proof.worst_site.worst
    assert f"worst site: {path} (LlamaRMSNorm), {worst.name}" in text
    assert f"{worst.max_ulp} ulp (allowed 2)" in text
    assert f"{worst.differing} of {worst.elements} elements differ (allowed {worst.allowed_differing})" in text
    words = shlex.split(proof.command())
    assert words[:3] == ["rmsnorm-patch", "verify", "my checkpoint"]
    assert words[words.index("--site") + 1] == path
    assert words[words.index("--seed") + 1] == "7"
    assert words[words.index("--dtype") + 1] == "bfloat16"
    assert proof.command() in text


def test_the_named_site_alone_is_red_again_with_the_same_numbers(kernel: Callable) -> None:
    model, path = one_bad_site(kernel)
    first = verify(model, prompts(), raise_on_failure=False, seed=3)
    again = verify(model, prompts(), raise_on_failure=False, seed=3, sites=[path])
    judged = [site for site in again.sites if site.measurements]
    assert [site.path for site in judged] == [path]
    assert judged[0] == next(site for site in first.sites if site.path == path)


def test_failing_rows_are_saved_and_show_the_failure(kernel: Callable, tmp_path) -> None:
    model, path = one_bad_site(kernel)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.01)
    file = tmp_path / "failure.safetensors"
    proof = verify(model, prompts(), raise_on_failure=False, save_failure=file)
    assert str(file) in proof.explain()
    kept = load_file(file)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["site"] == path
    assert torch.equal(kept["left"] + kept["right"], kept["total"])
    norm = model.get_submodule(path)
    revert(model)
    assert torch.equal(norm(kept["total"]), kept["normed_expected"])
    assert not torch.equal(kept["normed"], kept["normed_expected"])


def test_nothing_is_saved_for_a_green_proof(tmp_path) -> None:
    model = build("llama", torch.float32)
    apply(model)
    assert verify(model, prompts(), save_failure=tmp_path / "none").saved_failure == ""
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_exactly_as_it_was_patched(training: bool) -> None:
    model = build("gemma2", torch.bfloat16)
    apply(model)
    model.train(training)
    before = snapshot(model)
    verify(model, prompts())
    assert snapshot(model) == before


def test_the_model_comes_back_after_an_exception() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedInput, match="the unpatched model raises"):
        verify(model, {**prompts(), "attention_mask": torch.ones(1, 1, 1, 1, 2)})
    assert snapshot(model) == before


def test_accelerate_hooks_come_back() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = build("llama", torch.bfloat16)
    add_hook_to_module(model.model.norm, ModelHook())
    add_hook_to_module(model.model.layers[1], ModelHook())
    apply(model)
    before = snapshot(model)
    proof = verify(model, prompts())
    assert snapshot(model) == before
    assert proof.logits.bit_identical


def test_an_unpatched_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"apply\(model\)"):
        verify(build("llama", torch.float32), prompts())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"sites": ["model.layers.9.norm"]}, "model.layers.9.norm"), ({"reference": "exact"}, "'wide'")],
)
def test_wrong_options_are_refused(options: dict, named: str) -> None:
    model = build("llama", torch.float32)
    apply(model)
    with pytest.raises(UnsupportedInput, match=named):
        verify(model, prompts(), **options)


@pytest.mark.parametrize("inputs", [[], "text", {"text": "a"}, [3]])
def test_inputs_that_are_none(inputs: object) -> None:
    model = build("llama", torch.float32)
    apply(model)
    with pytest.raises(UnsupportedInput, match="input"):
        verify(model, inputs)


def test_kinds_of_inputs() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    ids = prompts()["input_ids"]
    for inputs, positions in ((ids, 48), (ids[0], 24), (prompts(), 48), ([prompts(), ids[:1, :5]], 48 + 5)):
        proof = verify(model, inputs, greedy_tokens=2)
        assert proof.logits.positions == positions
        assert proof.fired.expected == 7 * (2 if isinstance(inputs, list) else 1)


def test_padding_is_left_out_of_the_logits() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    inputs = prompts()
    inputs["attention_mask"][0, :7] = 0
    assert verify(model, inputs).logits.positions == 48 - 7


def test_apply_rolls_back_when_the_proof_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    before = snapshot(model)
    from rmsnorm_patch.rewrite import norms

    real = norms.take

    def stale(norm: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        taken = real(norm, x)
        return None if taken is None else taken.roll(1, dims=1)

    monkeypatch.setattr(norms, "take", stale)
    with pytest.raises(VerificationFailed) as caught:
        apply(model, verify=prompts())
    assert isinstance(caught.value.proof, Proof)
    assert snapshot(model) == before
    monkeypatch.undo()
    report = apply(model, verify=prompts())
    assert report.proof.passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_wider_run(dtype: torch.dtype, kernel: Callable) -> None:
    kernel(as_kernel(honest))
    model = build("mixtral", dtype)
    apply_as_kernel(model)
    proof = verify(model, prompts(), reference="original")
    assert proof.logits.reference == "original"
    assert proof.logits.own_error > 0
    wrong = build("mixtral", dtype)
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, e) * 1.05))
    apply_as_kernel(wrong)
    assert not verify(wrong, prompts(), reference="original", raise_on_failure=False).logits.passed


def test_too_little_memory_for_a_wider_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    copy = memory.of_copy(model, torch.float32)[torch.device("cpu")]
    monkeypatch.setattr(memory, "free", lambda device: copy)  # and nothing for what is kept beside it
    proof = verify(model, prompts())
    assert proof.logits.reference == "original"
    assert any("not from a wider run" in note and "needs" in note for note in proof.notes)
    with pytest.raises(UnsupportedInput, match="reference='original'"):
        verify(model, prompts(), reference="wide")


def test_a_long_input_is_shortened_for_the_data_flow(kernel: Callable) -> None:
    kernel(as_kernel(honest))
    model = build("llama", torch.bfloat16)
    apply_as_kernel(model)
    proof = verify(model, prompts(), space=20_000, greedy_tokens=0)
    assert any("1 sequence of" in note for note in proof.notes)
    assert proof.flow.calls == 7
    assert proof.logits.positions == 48
    proof = verify(model, prompts(), space=100, greedy_tokens=0)
    assert any("not judged" in note for note in proof.notes)


def test_a_model_that_does_not_reproduce_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data flow cannot be judged bit for bit then, and the proof says so."""
    model = build("llama", torch.float32)
    mlp = type(model.model.layers[0].mlp)
    right = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: right(self, x) * (1 + 1e-6 * torch.rand(())))
    apply(model)
    proof = verify(model, prompts(), raise_on_failure=False, greedy_tokens=0)
    assert not proof.flow.reproducible
    assert "does not reproduce itself" in proof.explain()


def test_a_part_of_a_model_and_a_model_around_it() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    proof = verify(Around(), prompts())
    assert {site.path for site in proof.sites} == {
        "inner.model.norm",
        *(f"inner.model.layers.{i}.{n}_layernorm" for i in range(3) for n in ("input", "post_attention")),
    }
    assert proof.fired.pairs_fused == 6


def test_a_compiled_model_is_proved_in_eager_mode() -> None:
    model = build("llama", torch.float32)
    apply(model)
    proof = verify(torch.compile(model), prompts())
    assert proof.fired.fused == proof.fired.expected == 7
