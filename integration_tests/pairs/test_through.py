"""A sum that passes through the forward of a module around its layer (a T5 block around its sub-layers): handed over,
and never what somebody edited on the way."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import transformers as tf

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

TEXT = {"num_layers": 2, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 64}
SMALL = {**TEXT, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
VISION = {
    "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "patch_embed_hidden_size": 16, "seq_len": 16,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**SMALL)),
    "mt5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**SMALL)),
    "umt5": lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**SMALL)),
    "longt5": lambda: tf.LongT5ForConditionalGeneration(tf.LongT5Config(**SMALL)),
    "longt5 global": lambda: tf.LongT5ForConditionalGeneration(
        tf.LongT5Config(encoder_attention_type="transient-global", **SMALL)
    ),
    "udop": lambda: tf.UdopForConditionalGeneration(
        tf.UdopConfig(image_size=32, max_2d_position_embeddings=32, **SMALL)
    ),
    "switch_transformers": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(num_experts=2, expert_capacity=8, num_decoder_layers=2, **SMALL)
    ),
    "pix2struct": lambda: tf.Pix2StructForConditionalGeneration(
        tf.Pix2StructConfig(
            text_config={**TEXT, "hidden_size": 32, "decoder_start_token_id": 0}, vision_config=VISION
        )
    ),
}  # fmt: skip
SUMS = {"pix2struct": 3 * 2 + 2 * 2 - 1}
"""Sums of a forward, each read by one norm: of an encoder and a decoder of two blocks where nothing is said. The norm
behind Pix2Struct's vision encoder is called by the module around the encoder."""
IDS = torch.arange(1, 13).view(2, 6)


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    given = {"decoder_input_ids": IDS[:, :4]}
    if family == "pix2struct":
        patches = torch.rand(2, 16, 18, generator=torch.Generator().manual_seed(2))
        return {"flattened_patches": patches, "attention_mask": torch.ones(2, 16), **given}
    if family == "udop":
        given["bbox"] = torch.zeros(2, 6, 4)
    return {"input_ids": IDS, **given}


def model_of(family: str = "t5") -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for norm in model.modules():
        if type(norm).__name__.endswith("LayerNorm"):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval()


def logits(model: nn.Module, given: dict[str, torch.Tensor], mode: Callable = torch.no_grad) -> torch.Tensor:
    with mode():
        return model(**given, use_cache=False).logits.clone()


def ran(model: nn.Module, given: dict[str, torch.Tensor], mode: Callable = torch.no_grad) -> Counter[str]:
    found: Counter[str] = Counter()
    with observe.observing(lambda event: found.update([event.kind])):
        logits(model, given, mode)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum_is_handed_over(family: str) -> None:
    model, given = model_of(family), inputs_of(family)
    expected = logits(model, given)
    rmsnorm_patch.apply(model, backend="reference", verify=given)
    counts = ran(model, given)
    pairs = counts["in_layer"] + counts["taken"]
    assert pairs == SUMS.get(family, 2 * 2 + 3 * 2)
    assert counts["cross_layer"] == counts["taken"]
    assert not counts["kept"]
    assert torch.equal(logits(model, given), expected)
    rmsnorm_patch.revert(model)
    assert not ran(model, given)
    assert torch.equal(logits(model, given), expected)


def test_the_plan_names_them() -> None:
    plan = rmsnorm_patch.plan(model_of(), backend="reference")
    fused = {(pair.kind, pair.layer, pair.norm) for pair in plan.pairs if pair.action == "fuse"}
    for stack, last in (("encoder", 1), ("decoder", 2)):
        across = (f"{stack}.block.0.layer.{last}", f"{stack}.block.1.layer.0.layer_norm")
        assert ("cross_layer", *across) in fused
        assert ("final", f"{stack}.block.1.layer.{last}", f"{stack}.final_layer_norm") in fused


def test_a_norm_behind_a_whole_loop_has_a_line() -> None:
    """Pix2Struct's vision encoder runs its layers in a loop; the module around it norms what comes out."""
    plan = rmsnorm_patch.plan(model_of("pix2struct"), backend="reference")
    norms = {site.path for site in plan.norms}
    (behind,) = [pair for pair in plan.pairs if pair.norm.endswith("encoder.layernorm") and pair.norm in norms]
    assert (behind.kind, behind.action) == ("final", "leave")
    assert behind.layer.endswith("encoder.encoder.layer.1")
    assert "loop" in behind.reason


class Stack(nn.Module):
    """Layers in a loop, without a norm behind them."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class Stacks(nn.Module):
    """Two stacks, the second on what the first gives, and a norm behind them."""

    def __init__(self, first: nn.Module, second: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.norm = first, second, norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.first(hidden_states)
        hidden_states = self.second(hidden_states)
        return self.norm(hidden_states)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


def test_pairs_between_two_loops_have_lines_and_are_left() -> None:
    torch.manual_seed(0)
    stacks = (Stack(nn.ModuleList([Block(), Block()])) for _ in range(2))
    model = Stacks(*stacks, nn.RMSNorm(32, eps=1e-6)).eval()
    x = torch.randn(3, 32)
    expected = model(x)
    lines = {(pair.layer, pair.norm): pair for pair in rmsnorm_patch.plan(model, backend="reference").pairs}
    assert lines["first.layers.0", "first.layers.1.norm"].action == "fuse"
    for layer, norm in (("first.layers.1", "second.layers.0.norm"), ("second.layers.1", "norm")):
        assert lines[layer, norm].action == "leave"
        assert "loop" in lines[layer, norm].reason
    rmsnorm_patch.apply(model, backend="reference")
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_generation_with_a_cache() -> None:
    model = model_of()
    before = model.generate(IDS, max_new_tokens=6, do_sample=False)
    rmsnorm_patch.apply(model, backend="reference")
    found: Counter[str] = Counter()
    with observe.observing(lambda event: found.update([event.kind])):
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), before)
    assert found["taken"] == 2 * 2 + 6 * (3 * 2)


def test_inference_mode_hands_nothing_over() -> None:
    """What a block runs after its last sub-layer was traced, not read: no version would show that it wrote."""
    model, given = model_of(), inputs_of("t5")
    expected = logits(model, given)
    rmsnorm_patch.apply(model, backend="reference")
    assert not ran(model, given, torch.inference_mode)["taken"]
    assert torch.equal(logits(model, given, torch.inference_mode), expected)


def test_training_and_checkpointing_keep_the_original_arithmetic() -> None:
    plain, given = model_of(), {**inputs_of("t5"), "labels": IDS[:, :4].contiguous()}
    del given["decoder_input_ids"]
    patched = copy.deepcopy(plain)
    rmsnorm_patch.apply(patched, backend="reference")
    for model in (plain, patched):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)  # of the dropout
        model(**given, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), patched.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


def write(tensor: torch.Tensor) -> None:
    tensor.data[..., :9].add_(2.0)  # no version counts it


def edits_output(module: nn.Module, arguments: tuple, output: tuple) -> None:
    write(output[0])


def edits_input(module: nn.Module, arguments: tuple) -> None:
    write(arguments[0])


class Editing(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor, *arguments, **named):
        write(hidden_states)
        return (hidden_states, None, None) if self.inner is None else self.inner(hidden_states, *arguments, **named)


class FeedForward(Editing):
    def forward(self, hidden_states: torch.Tensor):
        result = self.inner(hidden_states)
        write(result)
        return result


def _forward_of_its_own(model: nn.Module) -> None:
    block = model.encoder.block[0]
    own = block.forward

    def forward(*arguments, **named):
        result = own(*arguments, **named)
        write(result[0])
        return result

    block.forward = forward


def _another_class(model: nn.Module) -> None:
    block = model.encoder.block[0]
    cls = type(block)

    class Edited(cls):
        def forward(self, *arguments, **named):
            result = cls.forward(self, *arguments, **named)
            write(result[0])
            return result

    block.__class__ = Edited


def _wrap(holder: nn.ModuleList, at: int, wrapper: type[Editing]) -> None:
    holder[at] = wrapper(holder[at])


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "hook on the block": lambda m: m.encoder.block[0].register_forward_hook(edits_output),
    "hook on the next block": lambda m: m.encoder.block[1].register_forward_pre_hook(edits_input),
    "hook on its first sub-layer": lambda m: m.encoder.block[1].layer[0].register_forward_pre_hook(edits_input),
    "a forward on the block": _forward_of_its_own,
    "the block of another class": _another_class,
    "the next block wrapped": lambda m: _wrap(m.encoder.block, 1, Editing),
    "a block appended": lambda m: m.encoder.block.append(Editing()),
    "the last sub-layer wrapped": lambda m: _wrap(m.encoder.block[0].layer, 1, FeedForward),
    "the next sub-layer wrapped": lambda m: _wrap(m.encoder.block[1].layer, 0, Editing),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_edits_the_sum_on_its_way(edit: str) -> None:
    plain, given = model_of(), inputs_of("t5")
    patched = copy.deepcopy(plain)
    rmsnorm_patch.apply(patched, backend="reference")
    untouched = logits(patched, given)
    for model in (plain, patched):
        EDITS[edit](model)
    expected = logits(plain, given)
    assert not torch.equal(expected, untouched), "the edit changes nothing: the test proves nothing"
    assert torch.equal(logits(patched, given), expected)


def test_a_forward_put_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = model_of(), inputs_of("t5")
    rmsnorm_patch.apply(model, backend="reference")
    logits(model, given)
    cls = type(model.encoder.block[0])
    own = cls.forward

    def forward(self, *arguments, **named):
        result = own(self, *arguments, **named)
        write(result[0])
        return result

    monkeypatch.setattr(cls, "forward", forward)
    edited = logits(model, given)
    rmsnorm_patch.revert(model)
    assert torch.equal(logits(model, given), edited)


def test_a_hook_that_only_records_is_let_pass() -> None:
    model, given = model_of(), inputs_of("t5")
    rmsnorm_patch.apply(model, backend="reference")
    before = ran(model, given)["taken"]
    with torch.no_grad():
        model(**given, output_hidden_states=True)
    assert model.encoder.block[0]._forward_hooks
    assert ran(model, given)["taken"] == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_link_their_own_blocks(how: str) -> None:
    model, given = model_of(), inputs_of("t5")
    expected = logits(model, given)
    rmsnorm_patch.apply(model, backend="reference")
    wanted = ran(model, given)["taken"]
    stored = io.BytesIO(pickle.dumps(model))
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.load(stored)
    del model
    assert torch.equal(logits(copied, given), expected)
    assert ran(copied, given)["taken"] == wanted
    copied.encoder.block[0].register_forward_hook(edits_output)
    edited = logits(copied, given)
    rmsnorm_patch.revert(copied)
    assert torch.equal(logits(copied, given), edited)


def test_unlike_code_of_a_block_hands_nothing_over() -> None:
    """An unpickled model whose block has another source in this process."""
    model, given = model_of(), inputs_of("t5")
    rmsnorm_patch.apply(model, backend="reference")
    chain = model.encoder._rmsnorm_patch["chain"]
    steps = [
        step._replace(passages=tuple(p._replace(digest="of another source") for p in step.passages))
        for step in chain.steps
    ]
    chain.__setstate__({"steps": tuple(steps), "runner": chain.runner, "digest": chain.digest})
    counts = ran(model, given)
    assert (counts["kept"], counts["taken"]) == (2, 8)


def test_status_says_why_a_hooked_block_keeps_its_sum() -> None:
    model, given = model_of(), inputs_of("t5")
    rmsnorm_patch.apply(model, backend="reference")
    model.encoder.block[0].register_forward_hook(lambda *_: None)
    logits(model, given)
    assert "hooked, wrapped, moved or put between" in str(rmsnorm_patch.status(model))
