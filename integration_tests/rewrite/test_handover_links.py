"""The links by which layers hand their sums over: given up, revived, copied, pickled, gone with their model."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from handing_over import LAYERS, Model, logits, taken

import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE
from rmsnorm_patch.rewrite import handover, observe


def test_a_link_that_nobody_takes_is_given_up(twins, tokens) -> None:
    _, patched = twins()
    patched.config.num_hidden_layers = 2  # layer 1 is the last now; the norm that it hands to never runs
    ran: Counter[str] = Counter()
    for _ in range(handover.MAX_UNTAKEN):
        logits(patched, tokens)
    with observe.observing(lambda event: ran.update([event.kind])):
        logits(patched, tokens)
    assert (ran["cross_layer"], ran["taken"]) == (1, 1)


def handed_over(model: Model, tokens: torch.Tensor, times: int) -> int:
    ran: Counter[str] = Counter()
    with observe.observing(lambda event: ran.update([event.kind])):
        for _ in range(times):
            logits(model, tokens)
    return ran["cross_layer"]


def test_a_link_that_was_given_up_revives(twins, tokens) -> None:
    """Where its norm reads the sum again: at once for another shape, else some calls later."""
    plain, patched = twins()
    for other in (tokens[:, :3], tokens):
        patched.config.num_hidden_layers = 2
        handed_over(patched, tokens, handover.MAX_UNTAKEN + 2)
        patched.config.num_hidden_layers = LAYERS
        waiting = 0
        while taken(patched, other) < LAYERS:
            waiting += 1
            assert waiting < handover.MAX_UNTAKEN
        assert (waiting == 0) is (other.shape != tokens.shape)
        assert torch.equal(logits(patched, other), logits(plain, other))


def test_a_link_that_nobody_takes_costs_next_to_nothing(twins, tokens) -> None:
    """The norm of layer 0's link runs; layer 1's does not, and is tried once in MAX_UNTAKEN forwards."""
    _, patched = twins()
    patched.config.num_hidden_layers = 2
    most = handover.MAX_UNTAKEN
    handed_over(patched, tokens, most)
    assert handed_over(patched, tokens, 3 * most) == 3 * most + 3
    shapes = [tokens[:, :length] for length in (2, 3)]
    for step in range(most):
        logits(patched, shapes[step % 2])
    assert sum(handed_over(patched, shapes[step % 2], 1) for step in range(2 * most)) == 2 * most + 2


def test_the_callers_depth_is_learned_once(twins, tokens) -> None:
    _, patched = twins()
    assert taken(patched, tokens) == taken(patched, tokens) == LAYERS
    link = patched.model.layers[0].__dict__[STATE][handover.LINK]
    # the layer's forward, the checkpointing wrapper, torch's two frames, and the model's forward above them
    # (around the forward in transformers 5.23, around the call in 5.17; in 5.24 a decorator that renames arguments)
    assert (link.caller, link.depth) in ((4, 6), (3, 5), (2, 5))


@pytest.mark.usefixtures("any_caller")
def test_shallow_copy_of_an_inference_tensor(twins) -> None:
    """The object itself must be the one that the layer returned: a shallow copy shares attributes, not identity."""
    _, patched = twins()
    norm = patched.model.layers[2].input_layernorm
    x = torch.randn(1, 3, 64)
    with torch.inference_mode():
        total = patched.model.layers[1](x, position_embeddings=patched.model.rotary_emb(x, torch.arange(3)[None]))
        shallow = copy.copy(total)
        assert handover.CARRIED in shallow.__dict__
        assert handover.take(norm, shallow) is None
        assert handover.take(norm, total) is not None


def test_deepcopy_links_its_own_layers(twins, tokens) -> None:
    plain, patched = twins()
    copied = copy.deepcopy(patched)
    assert taken(copied, tokens) == LAYERS
    with torch.no_grad():
        for model in (plain, copied):
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.mul_(1.5)
    assert torch.equal(logits(copied, tokens), logits(plain, tokens))
    assert not torch.equal(logits(patched, tokens), logits(plain, tokens))
    rmsnorm_patch.revert(patched)
    assert taken(patched, tokens) == 0
    assert taken(copied, tokens) == LAYERS


def test_deepcopy_of_one_layer_is_one_layer(twins) -> None:
    _, patched = twins()
    original = patched.model.layers[1]
    layer = copy.deepcopy(original)
    assert layer.__dict__[STATE][handover.LINK].norm() is None
    assert list(layer.state_dict()) == list(original.state_dict())
    x = torch.randn(1, 3, 64)
    positions = patched.model.rotary_emb(x, torch.arange(3)[None])
    with torch.no_grad():
        expected, actual = original(x, position_embeddings=positions), layer(x, position_embeddings=positions)
    assert torch.equal(actual, expected)
    assert handover.CARRIED not in actual.__dict__


@pytest.mark.long
def test_pickle_in_a_fresh_process(twins, tokens, tmp_path: Path, repository: Path) -> None:
    plain, patched = twins()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((patched, tokens, logits(plain, tokens))))
    script = """
import pickle, sys, torch
model, tokens, expected = pickle.loads(open(sys.argv[1], "rb").read())
from rmsnorm_patch.rewrite import observe
kinds = []
with torch.no_grad(), observe.observing(lambda event: kinds.append(event.kind)):
    assert torch.equal(model(tokens, use_cache=False).logits, expected)
print(kinds.count("in_layer"), kinds.count("taken"), type(model.model.layers[0]).__name__)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(LAYERS), str(LAYERS), "LlamaDecoderLayer"]


def test_a_pickle_under_another_loop_hands_nothing_over(twins, tokens) -> None:
    """The loop's source decides what may lie between an add and its norm; another version of it was not read."""
    plain, patched = twins()
    chain = patched.model.__dict__[STATE][handover.CHAIN]
    restored, arguments, state = chain.__reduce__()
    assert taken(patched, tokens) == LAYERS
    restored(*arguments).__setstate__({**state, "digest": "another"})
    assert taken(patched, tokens) == 0
    assert torch.equal(logits(patched, tokens), logits(plain, tokens))
    restored(*arguments).__setstate__(state)
    assert taken(patched, tokens) == LAYERS


def test_links_add_no_module_and_no_key(twins) -> None:
    plain, patched = twins()
    assert list(patched.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in patched.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_patched_model_dies_with_its_last_user(twins, tokens) -> None:
    """No cycle: a model's memory must not wait for the garbage collector."""
    _, patched = twins()
    logits(patched, tokens)
    gc.collect()
    gc.disable()
    try:
        alive = [weakref.ref(layer) for layer in patched.model.layers]
        del patched
        assert not any(layer() is not None for layer in alive)
    finally:
        gc.enable()


def test_a_removed_layer_dies(twins, tokens) -> None:
    _, patched = twins()
    logits(patched, tokens)
    layer = weakref.ref(patched.model.layers[2])
    del patched.model.layers[2]
    gc.collect()
    assert layer() is None
    assert taken(copy.deepcopy(patched), tokens) == 1  # layer 0 to 1; the last one is not where it was


def test_eight_threads_on_one_model(twins) -> None:
    plain, patched = twins()
    inputs = [torch.randint(3, 300, (1, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [logits(plain, tokens) for tokens in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(logits(patched, inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_beam_search_and_assisted_generation(twins, tokens) -> None:
    plain, patched = twins()
    for options in ({"num_beams": 3}, {"assistant_model": plain}, {"prompt_lookup_num_tokens": 2}):
        given = tokens[:1]
        texts = [
            model.generate(given, max_new_tokens=6, do_sample=False, eos_token_id=-1, **options)
            for model in (plain, patched)
        ]
        assert torch.equal(*texts), options
