"""Libraries that look a block up by its class: `REGISTRY[type(module)]`, `type(module) in SUPPORTED`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch.rewrite.classes import patched_class

LIBRARY = """
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

HANDLERS = {LlamaDecoderLayer: "a block", "default": "anything"}
SUPPORTED = {LlamaRMSNorm}

class Registry:
    _entries = {LlamaDecoderLayer: "metadata"}
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    """`library(name, source)`: a module of that source, imported from a file."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def load(name: str, source: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        names.append(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)


def _notes(plan, name):
    return [note for note in plan.notes if note.startswith(f"{name}.")]


def test_registered_blocks_are_found_as_before(small_model, library):
    blocks = library("block_library", LIBRARY)
    model = small_model("llama")
    plan = rmsnorm_patch.plan(model)
    assert len(_notes(plan, "block_library")) == 3
    assert "block_library.Registry._entries has an entry for LlamaDecoderLayer" in str(plan)
    assert len(blocks.HANDLERS) == 2  # a plan changes nothing
    rmsnorm_patch.apply(model)
    layer = model.model.layers[0]
    assert type(layer) is not LlamaDecoderLayer
    assert blocks.HANDLERS[type(layer)] == "a block"
    assert blocks.Registry._entries[type(layer)] == "metadata"
    assert type(layer.input_layernorm) in blocks.SUPPORTED
    rmsnorm_patch.revert(model)
    assert type(layer) is LlamaDecoderLayer
    assert blocks.HANDLERS[type(layer)] == "a block"


KINDS = {
    "Registry(): an object": "FOUND.entries",
    "Sub({LlamaDecoderLayer: 1}): a class derived from dict": "FOUND",
    "UserDict({LlamaDecoderLayer: 1})": "FOUND",
    "ChainMap({}, {LlamaDecoderLayer: 1})": "FOUND",
    "Counter({LlamaDecoderLayer: 1})": "FOUND",
    "WeakKeyDictionary({LlamaDecoderLayer: 1})": "FOUND",
    "WeakSet([LlamaDecoderLayer])": "FOUND",
    "{'llama': {LlamaDecoderLayer: 1}}": "FOUND['llama']",
    "{**dict.fromkeys(range(20)), LlamaDecoderLayer: 1}": "FOUND",
    "{*range(20), LlamaDecoderLayer}": "FOUND",
    "{**dict.fromkeys(range(200)), 'llama': {**dict.fromkeys('abcdefghi'), LlamaDecoderLayer: 1}}": "FOUND['llama']",
}


@pytest.mark.parametrize("kind", KINDS)
def test_registries_of_other_kinds(small_model, library, kind: str):
    source = "from collections import ChainMap, Counter, UserDict\nfrom weakref import WeakKeyDictionary, WeakSet\n"
    source += "from transformers.models.llama.modeling_llama import LlamaDecoderLayer\n"
    source += "class Sub(dict):\n    def __setitem__(self, key, value):\n        raise KeyError('once')\n\n"
    source += "class Registry:\n    def __init__(self):\n        self.entries = {LlamaDecoderLayer: 1}\n\n"
    blocks = library("other_library", f"{source}\nFOUND = {kind.partition(': a')[0]}\n")
    model = small_model("llama")
    (note,) = _notes(rmsnorm_patch.plan(model), "other_library")
    assert "has an entry for LlamaDecoderLayer" in note
    rmsnorm_patch.apply(model)
    assert type(model.model.layers[0]) in eval(KINDS[kind], vars(blocks))


@pytest.mark.parametrize(
    "table", ["[(LlamaDecoderLayer, 1)]", "{(LlamaDecoderLayer, 'x'): 1}", "MappingProxyType({LlamaDecoderLayer: 1})"]
)
def test_what_cannot_be_entered_is_named_by_the_plan(small_model, library, table: str):
    library("table_library", f"from types import MappingProxyType\n{LIBRARY}\nTABLE = {table}\n")
    (note,) = (note for note in rmsnorm_patch.plan(small_model("llama")).notes if "table_library.TABLE" in note)
    assert "leave them out with exclude=" in note


def test_a_library_that_is_imported_later_is_told_by_the_next_apply(small_model, library):
    model = small_model("llama")
    rmsnorm_patch.apply(model)
    later = library("later_library", LIBRARY)
    layer = model.model.layers[0]
    assert type(layer) not in later.HANDLERS
    rmsnorm_patch.apply(model)
    assert later.HANDLERS[type(layer)] == "a block"


def test_what_is_registered_after_the_module_was_read_is_seen(small_model, library):
    blocks = library("growing_library", "LATE = {}\n")
    model = small_model("llama")
    rmsnorm_patch.plan(model)
    blocks.LATE[LlamaDecoderLayer] = 1
    assert len(_notes(rmsnorm_patch.plan(model), "growing_library")) == 1
    blocks.NEW = {LlamaDecoderLayer: 2}
    assert len(_notes(rmsnorm_patch.plan(model), "growing_library")) == 2
    rmsnorm_patch.apply(model)
    layer = type(model.model.layers[0])
    assert (blocks.LATE[layer], blocks.NEW[layer]) == (1, 2)


def test_a_class_that_joins_a_table_of_others_is_seen(small_model, library):
    blocks = library("joined_library", "TABLE = {'name': 1}\nNAMES = {'name'}\n")
    model = small_model("llama")
    assert not _notes(rmsnorm_patch.plan(model), "joined_library")
    blocks.TABLE[LlamaDecoderLayer] = 1
    blocks.NAMES.add(LlamaRMSNorm)
    assert len(_notes(rmsnorm_patch.plan(model), "joined_library")) == 2
    rmsnorm_patch.apply(model)
    assert type(model.model.layers[0]) in blocks.TABLE
    assert type(model.model.norm) in blocks.NAMES


def test_an_entry_of_the_patched_class_itself_is_kept(small_model, library):
    blocks = library("own_entry_library", LIBRARY)
    model = small_model("llama")
    rmsnorm_patch.apply(model)
    layer = type(model.model.layers[0])
    blocks.HANDLERS[layer] = "chosen for it"
    rmsnorm_patch.apply(model)
    assert blocks.HANDLERS[layer] == "chosen for it"


def test_a_memory_of_derived_classes_is_no_registry(small_model, library):
    """FSDP2 keeps the class that it derived from each: a patched layer in its place would be unpatched by sharding."""
    source = LIBRARY + "DERIVED = {LlamaDecoderLayer: type('FSDPLayer', (LlamaDecoderLayer,), {})}\n"
    source += "class Written(LlamaDecoderLayer):\n    pass\n\n\nREPLACED_BY = {LlamaDecoderLayer: Written}\n"
    blocks = library("deriving_library", source)
    model = small_model("llama")
    assert not any("DERIVED" in note for note in rmsnorm_patch.plan(model).notes)
    rmsnorm_patch.apply(model)
    layer = type(model.model.layers[0])
    assert layer not in blocks.DERIVED
    assert blocks.REPLACED_BY[layer] is blocks.Written


def test_a_class_made_by_unpickling_is_entered(small_model, library):
    """Without any `apply`: the class is made when the pickle asks for it."""
    model = small_model("llama")
    rmsnorm_patch.apply(model, backend="reference")
    norm = vars(type(model.model.norm))
    rmsnorm_patch.revert(model)
    blocks = library("unpickling_library", LIBRARY)
    key = norm["_rmsnorm_patch_key"]._replace(eps_attribute=None)
    assert patched_class(LlamaRMSNorm, norm["_rmsnorm_patch_role"], key) in blocks.SUPPORTED


def test_a_list_of_classes_is_named_by_the_plan(small_model, library):
    blocks = library("listing_library", LIBRARY + "BLOCKS = (LlamaDecoderLayer, int)\n")
    model = small_model("llama")
    (note,) = (note for note in rmsnorm_patch.plan(model).notes if "listing_library.BLOCKS" in note)
    assert "isinstance finds" in note
    rmsnorm_patch.apply(model)
    assert isinstance(model.model.layers[0], blocks.BLOCKS)


def test_other_models_have_no_notes(small_model, library):
    library("unused_library", LIBRARY)
    assert not _notes(rmsnorm_patch.plan(small_model("qwen3")), "unused_library")


def test_what_a_copy_of_this_package_keeps_is_no_registry(small_model, library):
    """The `kernels` library loads our layers under a name of its own; what that copy knows of a class is its own."""
    source = f"from weakref import WeakKeyDictionary\n{LIBRARY}BY_CLASS = WeakKeyDictionary({{LlamaRMSNorm: 1}})\n"
    library("_rmsnorm_patch_cpu_0", source)
    assert not _notes(rmsnorm_patch.plan(small_model("llama")), "_rmsnorm_patch_cpu_0")


def test_a_module_that_is_gone_is_not_kept(small_model, library):
    library("passing_library", LIBRARY)
    model = small_model("llama")
    assert _notes(rmsnorm_patch.plan(model), "passing_library")
    del sys.modules["passing_library"]
    assert not _notes(rmsnorm_patch.plan(model), "passing_library")


@pytest.mark.parametrize("cache", ["first block", "mag"])
def test_caches_of_diffusers(cache):
    """Its caches ask a registry for `type(block)`, and fill it at the first question."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import hooks

    steps, ratios = 3, torch.tensor([1.0, 0.99, 0.98])
    config = {
        "first block": lambda: hooks.FirstBlockCacheConfig(threshold=0.9),
        "mag": lambda: hooks.MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios, threshold=0.5),
    }[cache]

    def outputs(patch):
        torch.manual_seed(0)
        model = diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=4, caption_channels=32,
        ).eval()  # fmt: skip
        if patch:
            assert rmsnorm_patch.apply(model, backend="reference").layers
        model.enable_cache(config())
        torch.manual_seed(1)
        hidden, text, mask = torch.randn(1, 16, 4), torch.randn(1, 9, 32), torch.ones(1, 9, dtype=torch.bool)
        with model.cache_context("prompt"), torch.no_grad():
            return [
                model(
                    hidden_states=hidden, encoder_hidden_states=text, encoder_attention_mask=mask,
                    timestep=torch.tensor([step]), num_frames=1, height=4, width=4, return_dict=False,
                )[0]
                for step in range(steps)
            ]  # fmt: skip

    expected, after = outputs(False), outputs(True)
    assert all(map(torch.equal, expected, after))
