"""Modules of another dtype than the norms': the plan says whose calls will fall back, and `status` agrees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
BEHIND_WO = {
    *(f"encoder.block.1.layer.{i}.layer_norm" for i in range(2)),
    *(f"decoder.block.1.layer.{i}.layer_norm" for i in range(3)),
    "encoder.final_layer_norm",
    "decoder.final_layer_norm",
}
RUN = """
import json, sys
import torch
from transformers import T5ForConditionalGeneration
import rmsnorm_patch

model = T5ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float16).eval()
tokens = torch.arange(1, 9)[None]
with torch.no_grad():
    before = model(input_ids=tokens, decoder_input_ids=tokens[:, :3]).logits
    rmsnorm_patch.apply(model, backend="triton")
    after = model(input_ids=tokens, decoder_input_ids=tokens[:, :3]).logits
status = rmsnorm_patch.status(model)
apart = {reason: n for site in status.sites for reason, n in site.why_apart.items()}
counts = {name: status.counts()[name] for name in ("fallen_back", "alone", "handed_over")}
print(json.dumps({"close": torch.allclose(before, after, rtol=2e-2, atol=2e-3), **counts, "apart": apart}))
"""


def t5(folder: Path, dtype: torch.dtype) -> T5ForConditionalGeneration:
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(folder)
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def falling(plan: rmsnorm_patch.Plan) -> set[str]:
    return {site.path for site in plan.norms if site.falls_back}


def test_norms_behind_modules_in_float32_are_served(tmp_path: Path) -> None:
    """transformers keeps T5's `wo` in fp32, and with it the residual stream from there on."""
    plan = rmsnorm_patch.plan(t5(tmp_path, torch.float16))
    assert (falling(plan), plan.notes) == (set(), ())
    assert {site.path for site in plan.norms if site.inputs == ("float32",)} == BEHIND_WO
    assert {site.inputs for site in plan.norms if site.path not in BEHIND_WO} == {("float16",)}


def test_no_call_of_such_a_model_falls_back(tmp_path: Path, repository: Path) -> None:
    """Adds of a float16 and a float32 tensor among them. Five norms run alone: the first of each stack, and those of
    the first blocks, which read a clamped float16 sum."""
    pytest.importorskip("triton")
    t5(tmp_path, torch.float16)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"close": True, "fallen_back": 0, "alone": 5, "handed_over": 7, "apart": {}}


class HalfTypes(nn.Module):
    """A norm of one half type on hidden states of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32, dtype=torch.float16)
        self.norm = LlamaRMSNorm(32).bfloat16()
        self.dummy_inputs = {"tokens": torch.ones(1, 3, dtype=torch.long)}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embed(tokens))


def test_a_norm_of_the_other_half_type_is_named() -> None:
    plan = rmsnorm_patch.plan(HalfTypes())
    assert falling(plan) == {"norm"}
    page = " ".join(str(plan).split())
    assert "as the model is now, 1 of the fused norms will run the original arithmetic" in page
    assert "falls back: its input is float16 because of embed, its weight bfloat16; no kernel takes both" in page
    assert [site["falls_back"] for site in plan.to_dict()["norms"] if site["falls_back"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_of_one_dtype_falls_back_nowhere(tmp_path: Path, dtype: torch.dtype) -> None:
    plan = rmsnorm_patch.plan(t5(tmp_path, dtype))
    assert (falling(plan), plan.notes) == (set(), ())


class InFloat32(nn.Module):
    """Computes in fp32 and gives its input's dtype back, as routers and adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x.float()).to(x.dtype)


class ByValue(nn.Module):
    """Decides by its input's values, as a mixture of experts does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.fixture
def mixed() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).eval()
    model.model.layers[0].mlp = InFloat32()
    return model


def test_a_result_that_is_cast_back_makes_nothing_fall_back(mixed: LlamaForCausalLM) -> None:
    plan = rmsnorm_patch.plan(mixed)
    assert (falling(plan), plan.notes) == (set(), ())


def test_an_add_falls_back_with_its_norm(mixed: LlamaForCausalLM) -> None:
    plan = rmsnorm_patch.plan(mixed)
    norms = tuple(replace(n, falls_back="of its dtype") if n.path == "model.norm" else n for n in plan.norms)
    (final,) = (group for group in replace(plan, norms=norms).pair_groups() if group.where == "model.norm")
    assert final.why.endswith("; falls back with its norm")
    assert not any("falls back" in group.why for group in plan.pair_groups())


def test_the_model_is_neither_called_nor_changed(mixed: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: InFloat32, x: torch.Tensor) -> torch.Tensor:
        assert self is not mixed.model.layers[0].mlp
        called.append(x.device.type)
        return x

    called: list[str] = []
    monkeypatch.setattr(InFloat32, "forward", forward)
    before = {name: (id(tensor), tensor._version) for name, tensor in mixed.state_dict(keep_vars=True).items()}
    random = torch.random.get_rng_state()
    rmsnorm_patch.plan(mixed)
    assert called == ["meta"]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert before == {name: (id(tensor), tensor._version) for name, tensor in mixed.state_dict(keep_vars=True).items()}
    assert not any(module._forward_pre_hooks for module in mixed.modules())


def test_what_could_not_be_found_out_is_said(mixed: LlamaForCausalLM) -> None:
    def note() -> str:
        (found,) = rmsnorm_patch.plan(mixed).notes
        assert found.startswith("model.layers.0.mlp.product: another dtype than the norms' bfloat16")
        assert "status(model) tells" in found
        return found

    seen: list[torch.Tensor] = []
    handle = mixed.model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert "hooks or forwards of their own" in note()
    handle.remove()
    mixed.model.layers[0].mlp.forward = mixed.model.layers[0].mlp.forward
    assert "hooks or forwards of their own" in note()
    del mixed.model.layers[0].mlp.forward
    mixed.model.layers[1].mlp = ByValue()
    assert "does not run on the meta device" in note()
    assert seen == []
