"""The rotation behind the norms of a query and its key: which functions are taken, in which forwards, and what a model
that was rewritten for it computes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn as nn
from query_and_key import TOKENS, outputs, same
from transformers import PreTrainedModel
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

import rmsnorm_patch
from rmsnorm_patch.numerics import reference, rotation
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.pairs.rotation import known, why_other
from rmsnorm_patch.rewrite import observe, query_key

TAKEN = {
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3_text": {"head_dim": 32},  # normed behind the transpose
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"], "head_dim": 32},
    "apertus": {"head_dim": 32},
}
LEFT = {
    "glm4_moe": ({"use_qk_norm": True, "n_routed_experts": 8}, "it stands in another block"),
    "olmo2": ({"num_key_value_heads": 4}, "the norms' results are read before it"),
    "hunyuan_v1_dense": ({}, None),  # the norms stand behind it
}
OTHERS = [
    modeling_glm4_moe.apply_rotary_pos_emb,  # a part of a row
    modeling_cohere.apply_rotary_pos_emb,  # neighbours are turned, in fp32
    modeling_olmo2.apply_rotary_pos_emb,  # in fp32
]


def ran(model: PreTrainedModel) -> Counter[str]:
    """Events, those of norms with their rotation as "rotated"."""
    found: Counter[str] = Counter()

    def note(event: observe.Event) -> None:
        found.update(["rotated" if event.rotation is not None else event.kind])

    with torch.no_grad(), observe.observing(note):
        model(TOKENS)
    return found


# functions


@pytest.mark.parametrize("module", [modeling_qwen3, modeling_gemma3, modeling_qwen3_moe])
def test_the_half_rotation_is_known_in_every_module(module) -> None:
    assert why_other(module.apply_rotary_pos_emb) == ""
    assert known(module.apply_rotary_pos_emb) is not None


@pytest.mark.parametrize("function", OTHERS)
def test_other_rotations_are_not(function) -> None:
    assert why_other(function)
    assert known(function) is None


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def other_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((x2, -x1), dim=-1)


def plain(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def backwards(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (other_half(q) * sin), (k * cos) + (other_half(k) * sin)


def heads_last(q, k, cos, sin, unsqueeze_dim=2):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def in_fp32(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return ((q.float() * cos) + (rotate_half(q.float()) * sin)).to(q.dtype), k * cos


def crossed(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (k * cos) + (rotate_half(k) * sin), (q * cos) + (rotate_half(q) * sin)


def sometimes(q, k, cos, sin):
    if torch.is_grad_enabled():
        return q, k
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


COUNTED: list[int] = []


def remembers(q, k, cos, sin):
    COUNTED.append(1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def test_what_is_written_otherwise_is_left() -> None:
    assert why_other(plain) == ""
    for function in (backwards, heads_last, in_fp32, crossed, sometimes, remembers):
        assert "its source is of another rotation" in why_other(function), function
    assert why_other(nn.Identity()) == "it is a Identity, not a plain function"


def test_a_function_is_known_as_long_as_nothing_of_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_other(plain) == ""
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "rotate_half", other_half)
        assert known(plain) is None
    assert known(plain) is not None
    with monkeypatch.context() as patch:
        patch.setattr(plain, "__defaults__", (2,))
        assert known(plain) is None
    with monkeypatch.context() as patch:
        patch.setattr(rotate_half, "__code__", other_half.__code__)
        assert known(plain) is None
    assert known(plain) is not None


def test_bits_are_asked_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second witness: a rotation that rounds elsewhere than its symbols show."""
    own = rotation.rotate

    def unrounded(x, cos, sin):
        return (
            own(x, cos, sin) if isinstance(x, torch.Tensor) is False else own(x.float(), cos.float(), sin.float()).to(x)
        )

    monkeypatch.setattr(rotation, "rotate", unrounded)
    monkeypatch.setattr("rmsnorm_patch.pairs.rotation._KNOWN", {})
    assert why_other(plain) == "its bits are others in bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_rotates_by_the_angle_of_each_pair(dtype: torch.dtype) -> None:
    """Against complex numbers in fp64."""
    x = torch.randn(2, 4, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    angle = torch.arange(24.0, dtype=torch.float64).view(1, 3, 8) / 7
    cos, sin = (f(angle).repeat(1, 1, 2).to(dtype) for f in (torch.cos, torch.sin))
    turned = (
        torch.complex(x[..., :8].double(), x[..., 8:].double()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    exact = torch.cat((turned.real, turned.imag), -1)
    got = rotation.rotate(x, cos, sin)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), exact, atol=8 * torch.finfo(dtype).eps, rtol=0)


# forwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", TAKEN)
def test_bits_stay_where_the_rotation_is_taken(small_model, kind: str, dtype: torch.dtype) -> None:
    model = small_model(kind, dtype, num_hidden_layers=3, **TAKEN[kind])
    classes = [type(module) for module in model.modules()]
    before = outputs(model)
    report = rmsnorm_patch.apply(model, backend="reference")
    sites = list(report.plan.fused_query_key())
    assert sites
    assert {site.rotation for site in sites} == {"fuse"}
    assert report.plan.counts()["rotation/fuse"] == len(sites)
    assert ran(model)["rotated"] == 2 * len(sites)
    assert same(before, outputs(model))
    assert rmsnorm_patch.status(model).why_unrotated() == {}
    rmsnorm_patch.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert same(before, outputs(model))


@pytest.mark.parametrize("kind", LEFT)
def test_the_plan_says_why_a_rotation_is_left(small_model, kind: str) -> None:
    more, why = LEFT[kind]
    model = small_model(kind, num_hidden_layers=3, **more)
    before = outputs(model)
    report = rmsnorm_patch.apply(model, backend="reference")
    sites = list(report.plan.fused_query_key())
    assert sites
    for site in sites:
        assert site.rotation == (None if why is None else "leave")
        assert why is None or why in site.rotation_reason
    if why is not None:
        assert "their rotation by itself" in " ".join(str(report.plan).split())
    assert ran(model)["rotated"] == 0
    assert ran(model)["together"] == 2 * len(sites)
    assert same(before, outputs(model))


def test_a_proof_counts_them_and_turns_red_where_they_are_wrong(qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    rmsnorm_patch.apply(qwen3)
    proof = rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=2)
    assert (proof.fired.rotated, proof.fired.rotated_expected, proof.fired.fallbacks) == (4, 4, ())
    assert "4 of 4 with their rotation" in proof.explain()
    own = query_key._rotated
    for wrong in (
        lambda *operands: tuple(1.5 * x for x in own(*operands)),
        lambda *operands: own(*operands[:5], operands[6], operands[5], *operands[7:]),
    ):
        monkeypatch.setattr(query_key, "_rotated", wrong)
        with pytest.raises(rmsnorm_patch.VerificationFailed):
            rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=2)


def test_a_proof_sees_a_rotation_that_is_not_of_the_norms_bits(qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit of the last place, in one element: no norm moves by it."""
    rmsnorm_patch.apply(qwen3)
    own = query_key._report

    def moved(q_norm, k_norm, rows, normed, backend, turned=None):
        turned.both[0].view(torch.int32)[0, 0, 0, 0] ^= 1
        own(q_norm, k_norm, rows, normed, backend, turned)

    monkeypatch.setattr(query_key, "_report", moved)
    with pytest.raises(rmsnorm_patch.VerificationFailed, match=r"1 of .* rotated elements have other bits"):
        rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=0)


def test_a_replaced_function_is_called(qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_qwen3.apply_rotary_pos_emb
    rmsnorm_patch.apply(qwen3, backend="reference")
    before = outputs(qwen3)

    def replaced(q, k, cos, sin, unsqueeze_dim=1):
        return tuple(2 * each for each in own(q, k, cos, sin))

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", replaced)
    after = outputs(qwen3)
    assert not same(before, after)
    status = rmsnorm_patch.status(qwen3)
    assert list(status.why_unrotated()) == ["its rotation is another function than the one that was judged"]
    assert "did not share a launch with their rotation" in str(status)
    rmsnorm_patch.revert(qwen3)
    assert same(after, outputs(qwen3))
    sites = rmsnorm_patch.plan(qwen3).query_key
    assert {site.rotation for site in sites} == {"leave"}
    assert "apply_rotary_pos_emb: its source is of another rotation" in sites[0].rotation_reason


def test_a_replaced_helper_is_called(qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    rmsnorm_patch.apply(qwen3, backend="reference")
    monkeypatch.setattr(modeling_qwen3, "rotate_half", other_half)
    after = outputs(qwen3)
    assert rmsnorm_patch.status(qwen3).why_unrotated()
    rmsnorm_patch.revert(qwen3)
    assert same(after, outputs(qwen3))


def test_a_hook_sees_what_it_saw(qwen3) -> None:
    attention = qwen3.model.layers[0].self_attn
    order: list[str] = []
    for name in ("q_proj", "q_norm", "k_proj", "k_norm", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda *_, name=name: order.append(name))
    before, called = outputs(qwen3), list(order)
    rmsnorm_patch.apply(qwen3)
    order.clear()
    assert same(before, outputs(qwen3))
    assert order == called
    fired = rmsnorm_patch.verify(qwen3, TOKENS, greedy_tokens=0).fired
    assert (fired.rotated, fired.rotated_expected) == (2, 4)


def test_gradients_are_the_models(qwen3) -> None:
    def gradient() -> torch.Tensor:
        qwen3.zero_grad()
        qwen3(TOKENS).logits.square().sum().backward()
        return qwen3.model.layers[0].self_attn.q_norm.weight.grad.clone()

    before = gradient()
    rmsnorm_patch.apply(qwen3)
    assert torch.equal(before, gradient())
    status = rmsnorm_patch.status(qwen3)
    assert list(status.why_single()) == ["a gradient may be wanted"]


def test_copies_and_pickles_keep_it(qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    before = outputs(qwen3)
    rmsnorm_patch.apply(qwen3)
    stored = pickle.dumps(qwen3)
    for made in (copy.deepcopy(qwen3), pickle.loads(stored)):
        assert ran(made)["rotated"] == 4
        assert same(before, outputs(made))


def test_the_op_is_the_norm_and_the_rotation(qwen3) -> None:
    """What the kernel is held against on a GPU."""
    attention = qwen3.model.layers[0].self_attn
    x = torch.randn(2, 3, 4, attention.head_dim)
    cos, sin = torch.randn(1, 3, attention.head_dim), torch.randn(1, 3, attention.head_dim)
    with torch.no_grad():
        normed = reference.rms_norm(x, attention.q_norm.weight, LLAMA, attention.q_norm.variance_epsilon)
        wanted, _ = modeling_qwen3.apply_rotary_pos_emb(
            attention.q_norm(x).transpose(1, 2), normed.transpose(1, 2), cos, sin
        )
        assert torch.equal(rotation.rotate(normed.transpose(1, 2), cos, sin), wanted)
