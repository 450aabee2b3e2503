"""Rotations that a branch of the attention chooses: some layers rotate, others do not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn as nn
from query_and_key import TOKENS, outputs, same
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CHOSEN = {
    "exaone4": {},
    "exaone_moe": {**EXPERTS, "num_shared_experts": 1, "is_moe_layer": [False, True, True]},
    "afmoe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1},
    "flint": {},
    "kolibri1": {},
}
"""Their attentions rotate where their window slides."""


def ran(model: nn.Module, *given: torch.Tensor) -> tuple[Counter[str], torch.Tensor]:
    """Events, those of norms with their rotation as "rotated", and what came out."""
    found: Counter[str] = Counter()

    def note(event: observe.Event) -> None:
        if event.kind in ("together", "single", "unrotated"):
            found.update(["rotated" if event.rotation is not None else event.kind])

    torch.manual_seed(0)
    with torch.no_grad(), observe.observing(note):
        made = model(*given)
    return found, getattr(made, "logits", made)


def mixed(small_model, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"no {kind} in this transformers")
    fields = {"head_dim": 32, "layer_types": MIXED, "sliding_window": 4, **CHOSEN[kind]}
    model: PreTrainedModel = small_model(kind, dtype, num_hidden_layers=3, **fields)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CHOSEN)
def test_layers_that_rotate_do_it_in_the_norms_launch(small_model, kind: str, dtype: torch.dtype) -> None:
    model = mixed(small_model, kind, dtype)
    classes = [type(module) for module in model.modules()]
    before = outputs(model)
    report = rmsnorm_patch.apply(model, backend="reference")
    assert [site.rotation for site in report.plan.fused_query_key()] == ["fuse", None, "fuse"]
    assert ran(model, TOKENS)[0] == {"rotated": 4, "together": 2}
    assert same(before, outputs(model))
    assert rmsnorm_patch.status(model).why_unrotated() == {}
    rmsnorm_patch.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert same(before, outputs(model))


def test_a_proof_expects_those_that_rotate(small_model) -> None:
    model = mixed(small_model, "exaone4")
    rmsnorm_patch.apply(model)
    fired = rmsnorm_patch.verify(model, TOKENS, greedy_tokens=2).fired
    assert (fired.rotated, fired.rotated_expected, fired.fallbacks) == (4, 4, ())


@pytest.mark.parametrize("layer", [0, 1], ids=["no longer", "from now on"])
def test_a_layer_that_changes_its_mind(small_model, layer: int) -> None:
    """The branch is asked at each call, as the model asks."""
    model, plain = (mixed(small_model, "exaone4") for _ in range(2))
    rmsnorm_patch.apply(model, backend="reference")
    before = outputs(model)
    for each in (model, plain):
        each.model.layers[layer].self_attn.is_sliding ^= True
    assert not same(before, outputs(model))
    assert same(outputs(plain), outputs(model))
    assert ran(model, TOKENS)[0] == {"rotated": 2 if layer == 0 else 4, "together": 4 if layer == 0 else 2}


def test_a_hook_on_a_norm_sees_its_call(small_model) -> None:
    model = mixed(small_model, "exaone4")
    before, seen = outputs(model), []
    rmsnorm_patch.apply(model)
    for layer in model.model.layers:
        layer.self_attn.k_norm.register_forward_hook(lambda module, given, made: seen.append(made))
    assert same(before, outputs(model))
    assert seen


# forms


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = LlamaRMSNorm(32), LlamaRMSNorm(32)
        self.q_proj, self.k_proj = nn.Linear(32, 64), nn.Linear(32, 64)
        self.dropout = nn.Dropout(0.5)
        self.rotates, self.window, self.kinds = True, None, ("a",)

    def asks(self) -> bool:
        return self.rotates


class Attribute(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        if self.window is None and not (not self.rotates or self.window == 3):
            cos, sin = angles
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + 2 * k


class Call(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        cos, sin = angles
        if self.asks():
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + 2 * k


class Argument(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        if angles is not None:
            cos, sin = angles
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + 2 * k


class Norm(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        cos, sin = angles
        if q is not self.window:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + 2 * k


class Otherwise(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        cos, sin = angles
        if self.rotates:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        else:
            q = 3 * q
        return q + 2 * k


class RunsInBranch(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        cos, sin = angles
        if self.rotates:
            cos = self.dropout(cos)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + 2 * k


class ReadsInBranch(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        cos, sin = angles
        before = None
        if self.rotates:
            before = q
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + 2 * k if before is None else q + k + before


class More(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        cos, sin = angles
        if self.rotates:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            q = 3 * q
        return q + 2 * k


class Twice(Base):
    def forward(self, x, angles):
        q = self.q_norm(self.q_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(2, -1, 2, 32)).transpose(1, 2)
        cos, sin = angles
        if self.window is not None:
            q = 3 * q
        if self.rotates:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + 2 * k


LEFT = {
    Call: "whether it runs shows in the call alone",
    Argument: "whether it runs shows in the call alone",
    Norm: "whether it runs shows in the call alone",
    Otherwise: "it stands in another block",
    RunsInBranch: "code runs between the norms and it",
    ReadsInBranch: "the norms' results are read or bound anew before it",
    More: "it stands in another block",
    Twice: "the norms' results are read before it",
}


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = kind()

    def forward(self, x, angles):
        return self.attention(x, angles)


def operands() -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    angle = torch.arange(96.0).view(1, 3, 32)
    return torch.linspace(-1, 1, 2 * 3 * 32).view(2, 3, 32), (angle.cos(), angle.sin())


@pytest.mark.parametrize("rotates", [True, False])
def test_attributes_and_constants_may_choose(rotates: bool) -> None:
    model = Model(Attribute).eval()
    model.attention.rotates = rotates
    _, before = ran(model, *operands())
    rmsnorm_patch.apply(model)
    (site,) = rmsnorm_patch.plan(model).query_key
    assert site.rotation == ("fuse" if rotates else None)
    found, after = ran(model, *operands())
    assert found == {"rotated" if rotates else "together": 2}
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", LEFT)
def test_what_else_may_choose_is_left(kind: type[nn.Module]) -> None:
    model = Model(kind).eval()
    _, before = ran(model, *operands())
    rmsnorm_patch.apply(model)
    (site,) = rmsnorm_patch.plan(model).query_key
    assert (site.rotation, site.rotation_reason) == ("leave", LEFT[kind])
    found, after = ran(model, *operands())
    assert found == {"together": 2}
    assert torch.equal(before, after)
