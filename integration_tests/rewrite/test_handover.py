"""What may come between a layer's last add and the norm that reads its sum. The result is always the unpatched one."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE
from rmsnorm_patch.rewrite import handover, observe

LAYERS = 4
Model = PreTrainedModel


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def twins(small_model) -> Callable[[], tuple[Model, Model]]:
    """(unpatched, patched) models of the same weights."""

    def make(model_type: str = "llama", **fields: object) -> tuple[Model, Model]:
        plain = small_model(model_type, num_hidden_layers=LAYERS, **fields)
        patched = copy.deepcopy(plain)
        rmsnorm_patch.apply(patched, backend="reference")
        return plain, patched

    return make


@pytest.fixture
def any_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers hand over to a test that calls them, as they do to the model's own loop."""
    monkeypatch.setattr("rmsnorm_patch.rewrite.layer_calls._called_by_loop", lambda loop: True)


def logits(model: Model, tokens: torch.Tensor, mode: Callable[[], AbstractContextManager] = torch.no_grad):
    with mode():
        return model(tokens, use_cache=False).logits.clone()


def taken(model: Model, tokens: torch.Tensor, mode: Callable[[], AbstractContextManager] = torch.no_grad) -> int:
    ran: Counter[str] = Counter()
    with observe.observing(lambda event: ran.update([event.kind])):
        logits(model, tokens, mode)
    return ran["taken"]


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mul_(2.0)


def edit_output(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    double(output)


def edit_input(module: nn.Module, args: tuple) -> None:
    double(args[0])


def edit_data(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    double(output.data)  # past the version counter


def replace_input(module: nn.Module, args: tuple) -> tuple:
    return (args[0] * 2.0, *args[1:])


HOOKS = {
    "layer output, in place": lambda m: m.model.layers[1].register_forward_hook(edit_output),
    "layer output, past the version counter": lambda m: m.model.layers[1].register_forward_hook(edit_data),
    "next layer's input, in place": lambda m: m.model.layers[2].register_forward_pre_hook(edit_input),
    "next layer's input, replaced": lambda m: m.model.layers[2].register_forward_pre_hook(replace_input),
    "entry norm's input, in place": lambda m: m.model.layers[2].input_layernorm.register_forward_pre_hook(edit_input),
    "entry norm's output": lambda m: m.model.layers[2].input_layernorm.register_forward_hook(edit_output),
    "in-layer norm's input": lambda m: m.model.layers[1].post_attention_layernorm.register_forward_pre_hook(edit_input),
    "in-layer norm's output": lambda m: m.model.layers[1].post_attention_layernorm.register_forward_hook(edit_output),
    "final norm's input": lambda m: m.model.norm.register_forward_pre_hook(edit_input),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_edit_tensors(twins, tokens, hook: str, mode) -> None:
    plain, patched = twins()
    expected = logits(plain, tokens, mode)
    for model in (plain, patched):
        HOOKS[hook](model)
    edited = logits(plain, tokens, mode)
    assert not torch.equal(edited, expected), "the hook changes nothing: the test proves nothing"
    assert torch.equal(logits(patched, tokens, mode), edited)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_global_hooks_that_edit_tensors(twins, tokens, mode) -> None:
    plain, patched = twins()

    def edit(module: nn.Module, args: tuple, output: object) -> None:
        if type(module).__name__ == "LlamaDecoderLayer":
            double(output.data)

    handle = torch.nn.modules.module.register_module_forward_hook(edit)
    try:
        assert torch.equal(logits(patched, tokens, mode), logits(plain, tokens, mode))
    finally:
        handle.remove()


def test_recorded_hidden_states_keep_the_hand_over(twins, tokens) -> None:
    """transformers leaves its recording hooks on every layer once hidden states were asked for."""
    _, patched = twins()
    with torch.no_grad():
        patched(tokens, output_hidden_states=True)
    assert patched.model.layers[0]._forward_hooks
    assert taken(patched, tokens) == LAYERS


def test_callers_hidden_states_are_not_written(twins, tokens) -> None:
    """What a caller keeps of one call stays as it is in the next."""
    _, patched = twins()
    with torch.no_grad():
        kept = patched(tokens, output_hidden_states=True).hidden_states
        copies = [state.clone() for state in kept]
        patched(tokens.flip(0), output_hidden_states=True)
    assert all(torch.equal(state, saved) for state, saved in zip(kept, copies, strict=True))
    assert not any(state.__dict__.get(handover.CARRIED) for state in kept), "a normed tensor is kept alive"


def test_residual_is_hidden_states(twins) -> None:
    """Both operands of an add are one tensor."""
    plain, patched = twins()
    for model in (plain, patched):
        for layer in model.model.layers:
            layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
            layer.mlp.forward = lambda hidden_states: hidden_states
            layer.input_layernorm.weight.data.fill_(1.0)
            layer.input_layernorm.forward = lambda hidden_states: hidden_states
    tokens = torch.arange(3, 10)[None]
    assert torch.equal(logits(patched, tokens), logits(plain, tokens))


LAYOUTS: dict[str, Callable[[nn.ModuleList], list[nn.Module]]] = {
    "dropped": lambda layers: [layers[0], layers[2], layers[3]],
    "last dropped": lambda layers: list(layers)[:-1],
    "reversed": lambda layers: list(layers)[::-1],
    "shared": lambda layers: [layers[0], layers[1], layers[0], layers[1]],
    "one layer four times": lambda layers: [layers[2]] * 4,
    "swapped": lambda layers: [layers[0], layers[2], layers[1], layers[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_layers_rearranged_after_patching(twins, tokens, layout: str, mode) -> None:
    plain, patched = twins()
    for model in (plain, patched):
        model.model.layers = nn.ModuleList(LAYOUTS[layout](model.model.layers))
        model.config.num_hidden_layers = len(model.model.layers)
    assert torch.equal(logits(patched, tokens, mode), logits(plain, tokens, mode))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_rearranged_before_patching(small_model, tokens, layout: str) -> None:
    model = small_model("llama", num_hidden_layers=LAYERS)
    model.model.layers = nn.ModuleList(LAYOUTS[layout](model.model.layers))
    model.config.num_hidden_layers = len(model.model.layers)
    before = logits(model, tokens)
    plan = rmsnorm_patch.apply(model, backend="reference").plan
    assert torch.equal(logits(model, tokens), before)
    handed = len(list(plan.fused_pairs("cross_layer"))) + len(list(plan.fused_pairs("final")))
    repeated = len(set(map(id, model.model.layers))) < len(model.model.layers)
    assert handed == (0 if repeated else len(model.model.layers))
    assert taken(model, tokens) == handed


def test_early_exit(twins, tokens) -> None:
    plain, patched = twins()
    for model in (plain, patched):
        model.config.num_hidden_layers = 2  # the model's own loop stops here
    assert torch.equal(logits(patched, tokens), logits(plain, tokens))


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


class Editing(nn.Module):
    """Writes to the hidden states before what it wraps, or, with nothing inside, returns them."""

    def __init__(self, inner: nn.Module | None, uncounted: bool) -> None:
        super().__init__()
        self.inner = inner
        self.uncounted = uncounted

    def forward(self, hidden_states: torch.Tensor, *arguments, **named):
        written = hidden_states.data if self.uncounted else hidden_states
        written[..., :9].add_(2.0)
        return hidden_states if self.inner is None else self.inner(hidden_states, *arguments, **named)


def _insert(model: Model, at: int, module: nn.Module) -> None:
    model.model.layers.insert(at, module)
    model.config.num_hidden_layers = len(model.model.layers)


def _wrap_in_new_list(model: Model, uncounted: bool) -> None:
    layers = list(model.model.layers)
    layers[2] = Editing(layers[2], uncounted)
    model.before = (model.model.layers,)  # still alive, and unchanged
    model.model.layers = nn.ModuleList(layers)


def _subclass(model: Model, uncounted: bool) -> None:
    layer = model.model.layers[2]
    cls = type(layer)

    class Edited(cls):
        def forward(self, hidden_states: torch.Tensor, **named):
            Editing(None, uncounted)(hidden_states)
            return cls.forward(self, hidden_states, **named)

    layer.__class__ = Edited


EDITORS: dict[str, Callable[[Model, bool], object]] = {
    "layer wrapped": lambda m, u: m.model.layers.__setitem__(2, Editing(m.model.layers[2], u)),
    "layer wrapped in a new list": _wrap_in_new_list,
    "its norm wrapped": lambda m, u: setattr(
        m.model.layers[2], "input_layernorm", Editing(m.model.layers[2].input_layernorm, u)
    ),
    "final norm wrapped": lambda m, u: setattr(m.model, "norm", Editing(m.model.norm, u)),
    "inserted": lambda m, u: _insert(m, 2, Editing(None, u)),
    "appended": lambda m, u: _insert(m, LAYERS, Editing(None, u)),
    "in the place of another": lambda m, u: setattr(
        m.model, "layers", nn.ModuleList([m.model.layers[1], Editing(None, u), *m.model.layers[2:]])
    ),
    "layer of another class": _subclass,
}


@pytest.mark.parametrize("edit", EDITORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_module_put_between_the_layers_may_edit_the_sum(twins, tokens, edit: str, mode) -> None:
    """Steering wrappers do; neither `.data` nor inference mode counts the write."""
    plain, patched = twins()
    logits(patched, tokens, mode)
    for model in (plain, patched):
        EDITORS[edit](model, mode is torch.no_grad)
    expected = logits(plain, tokens, mode)
    assert torch.equal(logits(patched, tokens, mode), expected)
    copied = copy.deepcopy(patched) if "class" not in edit else patched
    assert torch.equal(logits(copied, tokens, mode), expected)
    rmsnorm_patch.revert(patched)
    assert torch.equal(logits(patched, tokens, mode), expected)


def test_a_proof_names_what_was_put_between(twins, tokens) -> None:
    """The model is right, if slower: no failure, and the reason."""
    _, patched = twins()
    EDITORS["appended"](patched, False)
    (fallback,) = rmsnorm_patch.verify(patched, tokens).fired.fallbacks
    assert fallback.startswith("model.norm: 1 of 1")
    assert "put between the layer and the norm" in fallback


EPS = torch.linspace(1e-6, 0.5, 7)[:, None]

CHANGES: dict[str, Callable[[Model], object]] = {
    "weight written": lambda m: m.model.layers[2].input_layernorm.weight.data.mul_(3.0),
    "weight replaced": lambda m: setattr(
        m.model.layers[2].input_layernorm, "weight", nn.Parameter(torch.full((64,), 2.0))
    ),
    "eps changed": lambda m: setattr(m.model.layers[2].input_layernorm, "variance_epsilon", 0.5),
    "eps of each token": lambda m: [
        setattr(layer.input_layernorm, "variance_epsilon", EPS) for layer in m.model.layers
    ],
    "norm replaced": lambda m: setattr(m.model.layers[2], "input_layernorm", nn.LayerNorm(64)),
    "in-layer norm replaced": lambda m: setattr(m.model.layers[2], "post_attention_layernorm", nn.LayerNorm(64)),
    "final norm replaced": lambda m: setattr(m.model, "norm", nn.Identity()),
    "other dtype": lambda m: m.to(torch.bfloat16),
    "norms in fp32": lambda m: m.to(torch.bfloat16) and [layer.input_layernorm.float() for layer in m.model.layers],
    "new weights": lambda m: m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_model_changed_after_patching(twins, tokens, change: str) -> None:
    plain, patched = twins()
    logits(patched, tokens)
    for model in (plain, patched):
        CHANGES[change](model)
    try:
        expected = logits(plain, tokens)
    except RuntimeError as error:  # a mixture of dtypes that the model itself does not run with
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            logits(patched, tokens)
        return
    assert torch.equal(logits(patched, tokens), expected)


@pytest.mark.parametrize("what", ["sum", "weight", "other weight", "eps", "norm"])
@pytest.mark.usefixtures("any_caller")
def test_a_carry_that_no_longer_holds_is_refused(twins, what: str) -> None:
    """The direct case: between the add and the norm, one of the things that the carry depends on changes."""
    _, patched = twins()
    layer, norm = patched.model.layers[1], patched.model.layers[2].input_layernorm
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        positions = patched.model.rotary_emb(x, torch.arange(3)[None])
        total = layer(x, position_embeddings=positions)
        assert handover.CARRIED in total.__dict__
        if what == "sum":
            total += 1.0
        elif what == "weight":
            norm.weight += 1.0
        elif what == "other weight":
            norm.weight = nn.Parameter(norm.weight * 2.0)
        elif what == "norm":
            other = patched.model.norm
            other.weight = norm.weight
            assert handover.take(other, total) is None
            return
        else:
            norm.variance_epsilon = 0.5
        expected = type(norm).__mro__[1].forward(norm, total)
        assert torch.equal(norm(total), expected)
        assert handover.CARRIED not in total.__dict__


def test_the_callers_depth_is_learned_once(twins, tokens) -> None:
    _, patched = twins()
    assert taken(patched, tokens) == taken(patched, tokens) == LAYERS
    link = patched.model.layers[0].__dict__[STATE][handover.LINK]
    # the layer's forward, the checkpointing wrapper, torch's two frames, and the model's forward above them
    # (around the forward in transformers 5.23, around the call in 5.17; in 5.24 a decorator that renames arguments)
    assert (link.caller, link.depth) in ((4, 6), (3, 5), (2, 5))


@pytest.mark.usefixtures("any_caller")
def test_copies_of_a_sum_carry_nothing(twins) -> None:
    _, patched = twins()
    x = torch.randn(1, 3, 64)
    norm = patched.model.layers[2].input_layernorm
    with torch.no_grad():
        total = patched.model.layers[1](x, position_embeddings=patched.model.rotary_emb(x, torch.arange(3)[None]))
        copied = [copy.deepcopy(total), pickle.loads(pickle.dumps(total)), copy.copy(total), total.clone(), total[:]]
        shallow = copy.copy(total)
        total.mul_(2.0)  # the same memory; the copy has a version counter of its own
        assert torch.equal(norm(shallow), type(norm).__mro__[1].forward(norm, shallow))
        for other in copied:
            other.mul_(2.0)
            assert torch.equal(norm(other), type(norm).__mro__[1].forward(norm, other))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_users_own_loop_may_edit_the_sum(twins, mode) -> None:
    """`.data` and inference mode count no versions: only the model's own loop, which was read, may hand over."""
    plain, patched = twins()
    x = torch.randn(1, 3, 64)

    def loop(model: Model) -> torch.Tensor:
        state = x
        positions = model.model.rotary_emb(x, torch.arange(3)[None])
        for layer in model.model.layers:
            state = layer(state, position_embeddings=positions)
            double(state.data)
        return model.model.norm(state)

    with mode():
        assert torch.equal(loop(patched), loop(plain))


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


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_the_plan_says_what_is_not_handed_over_in_inference_mode(twins, tokens, model_type: str) -> None:
    plain, patched = twins(model_type)
    handed = [pair for pair in rmsnorm_patch.plan(plain).pairs if pair.kind != "in_layer" and pair.action == "fuse"]
    always = [pair for pair in handed if "except in inference mode" not in pair.reason]
    assert (len(always) == len(handed)) is (model_type == "llama")
    assert taken(patched, tokens) == len(handed)
    assert taken(patched, tokens, torch.inference_mode) == len(always)
    assert torch.equal(logits(plain, tokens, torch.inference_mode), logits(patched, tokens, torch.inference_mode))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_classs_own_forward_put_on_the_layer_is_no_obstacle(twins, tokens, mode) -> None:
    """transformers 5.0 leaves it there once hidden states were asked for."""
    plain, patched = twins()
    for layer in patched.model.layers:
        layer.forward = layer.forward
    assert taken(patched, tokens, mode) == LAYERS
    assert torch.equal(logits(plain, tokens, mode), logits(patched, tokens, mode))
    rmsnorm_patch.revert(patched)
    for layer in patched.model.layers:
        assert layer.__dict__["forward"].__func__ is type(layer).forward
