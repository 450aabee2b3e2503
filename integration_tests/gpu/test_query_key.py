"""Attentions on a GPU whose queries and keys are normed in one launch: the bits of a launch each, proved, captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import rmsnorm_patch
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.query_key_norm.rotated import bind_rms_norm_rotated
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, NormSpec
from rmsnorm_patch.patch_state import original_class, role_of
from rmsnorm_patch.rewrite import native, observe

pytestmark = pytest.mark.gpu

LAYERS = 2
FORMS = {
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 64},  # a transposed view: rows of two levels
    "olmo2": {"num_key_value_heads": 4},  # the whole width
    "hunyuan_v1_dense": {"head_dim": 128},  # after the rotation
}


ROTATES = {
    "Qwen3ForCausalLM": True,
    "Gemma3ForCausalLM": True,
    "Olmo2ForCausalLM": False,
    "HunYuanDenseV1ForCausalLM": False,
}
"""Whether the rotation is part of the launch."""


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model(request.param, torch.bfloat16, num_hidden_layers=LAYERS, **FORMS[request.param]).cuda()


def apart(model: PreTrainedModel) -> None:
    """Give the attentions their own forwards back: a launch for each norm."""
    for module in model.modules():
        if role_of(module) == "attention":
            module.__class__ = original_class(type(module))


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of a prompt of one sequence and of three, and what follows it."""
    tokens = torch.arange(3, 33, device="cuda").view(3, 10)
    made = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return [model(tokens[:1], use_cache=False).logits, model(tokens, use_cache=False).logits, made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_one_launch_gives_the_bits_of_two(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.to(dtype)
    rmsnorm_patch.apply(model, backend="cuda")
    together = outputs(model)
    status = rmsnorm_patch.status(model)
    together_now = "rotated" if ROTATES[type(model).__name__] else "together"
    assert status.counts()[together_now] > 0
    assert status.why_single() == status.why_unrotated() == {}
    apart(model)
    for one, two in zip(together, outputs(model), strict=True):
        assert torch.equal(one, two)
    rmsnorm_patch.revert(model)


def test_they_are_proved(model: PreTrainedModel) -> None:
    rmsnorm_patch.apply(model)
    proof = rmsnorm_patch.verify(model, torch.arange(1, 40, device="cuda")[None])
    assert proof.passed, proof.explain()
    assert proof.fired.together == proof.fired.together_expected == 2 * LAYERS
    assert proof.fired.rotated == proof.fired.rotated_expected == 2 * LAYERS * ROTATES[type(model).__name__]


def test_launcher_c_serves_them_after_the_first_call(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_patch.rewrite import query_key

    rmsnorm_patch.apply(model)
    outputs(model)
    if native.query_key is native._declined:
        pytest.skip("launcher.c is not in use")
    for name in ("_query_key", "_rotated"):
        monkeypatch.setattr(query_key, name, lambda *operands: pytest.fail("launcher.c declined"))
    token, events = torch.full((1, 1), 5, device="cuda"), Counter()
    with torch.no_grad(), observe.observing(lambda event: events.update([f"{event.kind}/{event.backend}"])):
        model(token, use_cache=False)
    assert events["together/cuda"] == 2 * LAYERS


def test_a_step_is_captured_and_replayed(model: PreTrainedModel) -> None:
    rmsnorm_patch.apply(model)
    made = {made.op for made in rmsnorm_patch.warmup(model)}
    assert made >= {"rms_norm_pair", *(("rms_norm_rotated",) if ROTATES[type(model).__name__] else ())}
    tokens = torch.arange(1, 9, device="cuda")[None]
    with torch.no_grad():
        model(tokens, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(tokens, use_cache=False).logits
        tokens.add_(3)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, model(tokens, use_cache=False).logits)


# the op


def turned(
    spec: NormSpec, dtype: torch.dtype, x: torch.Tensor, keys: int, axis: int, sequences: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the op gives for x [batch, length, heads, N], its last heads being keys, and what our norm and the model's
    own function give."""
    n = x.shape[-1]
    weights = [torch.rand(n, device="cuda").to(dtype) + 0.5 for _ in range(2)]
    angles = [torch.randn(sequences, x.shape[1], n, device="cuda").to(dtype) for _ in range(2)]
    given = [x[:, :, :-keys], x[:, :, -keys:]]
    if axis == 1:
        given = [each.transpose(1, 2) for each in given]
    norm = cuda_backend.bind("rms_norm", spec)
    normed = [norm(each, weight, 1e-6) for each, weight in zip(given, weights, strict=True)]
    normed = [each if axis == 1 else each.transpose(1, 2) for each in normed]
    wanted = apply_rotary_pos_emb(*normed, *angles)
    made = bind_rms_norm_rotated(spec)(*given, *weights, 1e-6, *angles, axis)
    return list(made), list(wanted)


def strides(x: torch.Tensor) -> list[int]:
    """Of the dimensions in which there is more than one element."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("spec", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("axis", [2, 1])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (8, 1), (1, 7), (2, 130)])
def test_the_op_has_the_bits_of_the_norm_and_of_the_models_function(dtype, spec, axis, batch, length) -> None:
    torch.manual_seed(0)
    for n in (64, 128) if dtype == torch.float32 else (64, 128, 256):
        for sequences in {1, batch}:
            x = torch.randn(batch, length, 40, n, device="cuda").to(dtype)
            for packed in (False, True):
                rows = x if packed else x[:, :, 3:]
                made, wanted = turned(spec, dtype, rows, 8, axis, sequences)
                for one, other in zip(made, wanted, strict=True):
                    assert torch.equal(one, other)
                    if axis == 2:
                        assert strides(one) == strides(other)


def test_the_op_takes_difficult_numbers() -> None:
    """Infinities, NaN and zeros of either sign stay what the model's function makes of them."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 10, 128, device="cuda").bfloat16()
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-40], device="cuda")
    x.view(-1)[: odd.numel()] = odd.bfloat16()
    x[1, 2] = 0.0
    for one, other in zip(*turned(LLAMA, torch.bfloat16, x, 2, 2, 1), strict=True):
        nan = one.isnan()
        assert torch.equal(nan, other.isnan())
        bits = [torch.where(nan, 0, each.contiguous().view(torch.int16)) for each in (one, other)]
        assert torch.equal(*bits)


def test_what_the_op_cannot_take_it_names() -> None:
    x = torch.randn(2, 4, 3, 128, device="cuda").bfloat16()  # head by head
    weight, angle = torch.ones(128, device="cuda").bfloat16(), torch.randn(1, 3, 128, device="cuda").bfloat16()
    op = bind_rms_norm_rotated(LLAMA)
    with pytest.raises(UnsupportedInput, match="do not lie token by token"):
        op(x, x, weight, weight, 1e-6, angle, angle, 1)
    rows = x.transpose(1, 2).contiguous()
    with pytest.raises(UnsupportedInput, match=r"cos is torch[.]float32"):
        op(rows, rows[:, :, :1], weight, weight, 1e-6, angle.float(), angle, 2)


def test_a_token_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 130, heads, 128, device="cuda").bfloat16() for heads in (32, 8))
    weight, op = torch.rand(128, device="cuda").bfloat16() + 0.5, bind_rms_norm_rotated(LLAMA)
    cos, sin = (torch.randn(1, 130, 128, device="cuda").bfloat16() for _ in range(2))
    whole = op(q, k, weight, weight, 1e-6, cos, sin, 2)
    at = slice(77, 78)
    alone = op(q[1:, at], k[1:, at], weight, weight, 1e-6, cos[:, at], sin[:, at], 2)
    for many, one in zip(whole, alone, strict=True):
        assert torch.equal(many[1:, :, at], one)


def test_angles_are_read_where_they_lie() -> None:
    """Angles of less alignment, or that are no rows one behind the other, are copied first."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, heads, 128, device="cuda").bfloat16() for heads in (4, 2))
    weight, op = torch.rand(128, device="cuda").bfloat16() + 0.5, bind_rms_norm_rotated(LLAMA)
    held = torch.randn(2, 3, 260, device="cuda").bfloat16()
    cos, sin = held[..., 1:129], held[..., 130:258]
    wanted = op(q, k, weight, weight, 1e-6, cos.contiguous(), sin.contiguous(), 2)
    for _ in range(2):
        for one, other in zip(op(q, k, weight, weight, 1e-6, cos, sin, 2), wanted, strict=True):
            assert torch.equal(one, other)
