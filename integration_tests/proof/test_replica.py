"""A replica: the same object graph over the same weights, and nothing of it the served model's."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
from proof_models import build, prompts

from rmsnorm_patch import apply, verify
from rmsnorm_patch.patch_state import STATE, is_patched
from rmsnorm_patch.proof.replica import SHARED_BUFFER, replica
from rmsnorm_patch.rewrite import observe


def llama() -> nn.Module:
    model = build("llama", torch.bfloat16)
    apply(model)
    return model


def modules_called(model: nn.Module) -> set[int]:
    """Ids of the norms that a forward of `model` calls."""
    seen: set[int] = set()
    with torch.no_grad(), observe.observing(lambda event: seen.add(id(event.norm))):
        model(**prompts())
    return seen


def own(model: nn.Module) -> set[int]:
    return {id(module) for module in model.modules()}


def test_it_computes_what_the_model_does_with_modules_of_its_own() -> None:
    model = llama()
    made = replica(model)
    with torch.no_grad():
        assert torch.equal(made(**prompts()).logits, model(**prompts()).logits)
    assert modules_called(made) <= own(made)
    assert not own(made) & own(model)
    for (path, left), (_, right) in zip(model.named_parameters(), made.named_parameters(), strict=True):
        assert left is right, path


def test_links_lead_to_its_own_norms() -> None:
    model = llama()
    kinds: list[str] = []
    made = replica(model)
    with torch.no_grad(), observe.observing(lambda event: kinds.append(event.kind)):
        made(**prompts())
    assert kinds.count("taken") == kinds.count("cross_layer") == 3
    assert id(made.model.layers[0].__dict__[STATE]["next"].norm()) in own(made)


def test_unpatched_it_is_what_revert_gives_and_the_model_stays() -> None:
    model = llama()
    original = replica(model, patched=False)
    assert not any(is_patched(type(module)) or STATE in module.__dict__ for module in original.modules())
    assert is_patched(type(model.model.norm))
    assert type(original.model.norm).__name__ == "LlamaRMSNorm"


def closure(layer: nn.Module) -> object:
    inner = layer.forward

    def forward(*args: object, **named: object) -> object:
        return inner(*args, **named)

    return forward


def with_default(layer: nn.Module) -> object:
    def forward(*args: object, inner: object = layer.forward, **named: object) -> object:
        return inner(*args, **named)

    return forward


def partial(layer: nn.Module) -> object:
    made = functools.partial(lambda inner, *args, **named: inner(*args, **named), layer.forward)
    return functools.update_wrapper(made, layer.forward)


def by_global_name(layer: nn.Module) -> object:
    """As a notebook's wrapper, which finds what it wraps among the globals."""
    scope = {"inner": layer.forward}
    exec("def forward(*args, **named):\n    return inner(*args, **named)", scope)
    return scope["forward"]


class Registry:
    """As hook registries of other libraries: the module, a table of hooks, a lock."""

    def __init__(self, layer: nn.Module) -> None:
        self.module = weakref.ref(layer)
        self.forwards = OrderedDict(first=layer.forward)
        self.lock = threading.Lock()

    def __call__(self, *args: object, **named: object) -> object:
        assert self.module() is not None
        with self.lock:
            return self.forwards["first"](*args, **named)


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, layer: nn.Module) -> None:
        self.inner = [(layer,)]

    def __call__(self, *args: object, **named: object) -> object:
        layer = self.inner[0][0]
        return type(layer).forward(layer, *args, **named)


WRAPPERS = [closure, with_default, partial, by_global_name, Registry, Slotted]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_wrapped_forward_wraps_its_own_module(wrap: object) -> None:
    model = llama()
    for layer in model.model.layers:
        layer.forward = wrap(layer)
    for norm in (model.model.norm, model.model.layers[1].input_layernorm):
        norm.forward = wrap(norm)
    made = replica(model)
    assert modules_called(made) <= own(made)
    assert modules_called(model) <= own(model)
    assert verify(model, prompts(), greedy_tokens=2).passed


def test_compiled_parts_are_the_code_that_was_compiled() -> None:
    model = llama()
    model.model.layers[0].compile(backend="eager")
    model.model.layers[1].forward = torch.compile(model.model.layers[1].forward, backend="eager")
    model.model.layers[2] = torch.compile(model.model.layers[2], backend="eager")
    made = replica(torch.compile(model, backend="eager"))
    assert len(modules_called(made)) == 7
    assert modules_called(made) <= own(made)
    assert made.config is model.config


def test_hooks_see_its_own_modules() -> None:
    model = llama()
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(id(module)))
    made = replica(model)
    with torch.no_grad():
        made(**prompts())
    assert seen == [id(made.model.layers[1])]


def test_one_module_at_two_paths_and_tied_weights_stay_one() -> None:
    model = llama()
    model.model.layers[2].input_layernorm = model.model.layers[1].input_layernorm
    model.lm_head.weight = model.model.embed_tokens.weight
    made = replica(model)
    assert made.model.layers[2].input_layernorm is made.model.layers[1].input_layernorm
    assert made.lm_head.weight is model.model.embed_tokens.weight


class Counting(nn.Module):
    """Writes what a forward may write: a buffer, an attribute, a list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("packed", torch.zeros(SHARED_BUFFER + 1, dtype=torch.uint8))
        self.last, self.history = 0, []

    def forward(self, **inputs: torch.Tensor) -> object:
        self.calls += 1
        self.last += 1
        self.history.append(self.last)
        return self.inner(**inputs)


def test_what_a_forward_writes_on_its_modules_is_its_own() -> None:
    model = Counting(llama())
    assert replica(model).packed is model.packed
    assert verify(model, prompts()).passed
    assert (float(model.calls), model.last, model.history) == (0.0, 0, [])


def test_inputs_that_a_forward_writes_come_back_as_they_were() -> None:
    from transformers import DynamicCache

    model = llama()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
    assert cache.get_seq_length() == 24
    ids = prompts(2, 5, seed=9)["input_ids"]
    assert verify(model, {"input_ids": ids, "past_key_values": cache}, greedy_tokens=0).logits.bit_identical
    assert cache.get_seq_length() == 24


def test_offloaded_weights_are_brought_in_for_the_replica_alone() -> None:
    from accelerate import cpu_offload

    model = llama()
    cpu_offload(model, execution_device=torch.device("cpu"))
    proof = verify(model, prompts(), greedy_tokens=2)
    assert proof.logits.bit_identical
    assert any("offloaded" in note for note in proof.notes)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
