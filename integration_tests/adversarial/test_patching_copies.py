"""deepcopy, pickle, torch.save, state dicts, safetensors, save_pretrained."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import linecache
import pickle
import py_compile
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_model

import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE, derives_from_patched

FUSED = {"norm": 1, "in_layer": 2, "cross_layer": 2, "taken": 2}


def _new_norm_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("which", ["copy", "model"])
def test_a_deepcopy_with_new_weights_in_one_is_independent(small_model, run, ids, which):
    model, plain = small_model("llama"), small_model("llama")
    changed = small_model("llama")
    _new_norm_weights(changed, 3)
    old, new = run(plain, ids), run(changed, ids)
    rmsnorm_patch.apply(model)
    run(model, ids)
    made = copy.deepcopy(model)
    _new_norm_weights(made if which == "copy" else model, 3)
    got_copy, got_model = run(made, ids), run(model, ids)
    assert got_copy.same_as(new if which == "copy" else old)
    assert got_model.same_as(old if which == "copy" else new)
    assert got_copy.kinds == got_model.kinds == FUSED


def test_each_copy_is_reverted_for_itself(small_model, run, ids):
    model = small_model("llama")
    expected = run(model, ids)
    report = rmsnorm_patch.apply(model)
    made = copy.deepcopy(model)
    assert rmsnorm_patch.apply(made) == report
    rmsnorm_patch.revert(model)
    assert run(model, ids).kinds == {}
    assert run(made, ids).kinds == FUSED
    rmsnorm_patch.revert(made)
    after = run(made, ids)
    assert after.kinds == {}
    assert after.same_as(expected)
    for ours, original in zip(made.modules(), model.modules(), strict=True):
        assert type(ours) is type(original)
        assert list(ours.__dict__) == list(original.__dict__)
        assert STATE not in ours.__dict__


def test_a_copied_layer_alone_runs_and_reverts(small_model):
    model = small_model("llama")
    x = torch.randn(1, 4, 64)
    position = model.model.rotary_emb(x, torch.arange(4)[None])
    with torch.no_grad():
        expected = model.model.layers[0](x, position_embeddings=position)
        rmsnorm_patch.apply(model)
        layer = copy.deepcopy(model.model.layers[0])
        assert torch.equal(layer(x, position_embeddings=position), expected)
        rmsnorm_patch.revert(layer)
        assert torch.equal(layer(x, position_embeddings=position), expected)
    assert not any(derives_from_patched(type(m)) for m in layer.modules())


def test_a_shallow_copy_shares_parameters_as_before(small_model):
    model = small_model("llama")
    rmsnorm_patch.apply(model)
    made = copy.copy(model.model.norm)
    assert type(made) is type(model.model.norm)
    assert made.weight is model.model.norm.weight


FRESH = """
import pickle, sys, torch
path = sys.argv[1]
models = [pickle.load(open(f"{path}.pickle", "rb")), torch.load(f"{path}.saved", weights_only=False)]
import rmsnorm_patch
from rmsnorm_patch.rewrite import observe
from transformers.models.llama import modeling_llama
ids, expected = torch.load(f"{path}.expected")
for model in models:
    events = []
    with torch.no_grad(), observe.observing(events.append):
        assert torch.equal(model(ids).logits, expected)
    kinds = sorted(event.kind for event in events)
    assert kinds == ["cross_layer"] * 2 + ["in_layer"] * 2 + ["norm"] + ["taken"] * 2, kinds
    report = rmsnorm_patch.apply(model)
    assert len(report.norms) == 5
    again = pickle.loads(pickle.dumps(model))
    rmsnorm_patch.revert(model)
    assert type(model.model.norm) is modeling_llama.LlamaRMSNorm
    assert type(model.model.layers[0]) is modeling_llama.LlamaDecoderLayer
    assert not any("_rmsnorm_patch" in m.__dict__ for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(again(ids).logits, expected)
"""


def test_a_pickle_is_a_patched_model_in_a_fresh_process(small_model, run, ids, tmp_path):
    """One process for pickle's file and that of torch.save: to import what a model needs takes it longest."""
    model = small_model("llama")
    expected = run(small_model("llama"), ids)  # its recording hooks, a function's locals, cannot be pickled
    rmsnorm_patch.apply(model)
    path = tmp_path / "model"
    path.with_suffix(".pickle").write_bytes(pickle.dumps(model))
    torch.save(model, f"{path}.saved")
    torch.save((ids, expected.logits), f"{path}.expected")
    subprocess.run([sys.executable, "-c", FRESH, str(path)], check=True, timeout=900)


MODEL = """
import torch.nn as nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.query, self.key = nn.RMSNorm(16), nn.RMSNorm(16), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        query = self.q(self.query(x).view(*x.shape[:-1], 4, 16))
        key = self.k(self.key(x).view(*x.shape[:-1], 4, 16))
        return (query + key).flatten(-2)

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.RMSNorm(64), nn.RMSNorm(64), nn.Linear(64, 64)
        self.attention = Attention()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), nn.RMSNorm(64)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
"""


@pytest.mark.parametrize("source", ["none", "another"])
def test_a_pickle_read_where_the_source_is_not_what_it_was(tmp_path, monkeypatch, source):
    """A deployment without sources has the model's code alone: it runs that."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "model_without_source.py"
    path.write_text(MODEL)
    module, x = importlib.import_module(path.stem), torch.randn(2, 3, 64)
    model = module.Model().eval()
    with torch.no_grad():
        expected = model(x)
        report = rmsnorm_patch.apply(model)
        assert report.layers == ("layers.0", "layers.1")
        assert report.attentions == ("layers.0.attention", "layers.1.attention")
        written = pickle.dumps(model)
        if source == "none":
            py_compile.compile(str(path), cfile=str(path.with_suffix(".pyc")), doraise=True)
            path.unlink()
        else:
            path.write_text(f"{MODEL}\n".replace("x + self.mlp", "self.mlp").replace("query + key", "key"))
        for forget in (importlib.invalidate_caches, linecache.clearcache):
            forget()
        monkeypatch.delitem(sys.modules, path.stem)
        again = pickle.loads(written)
        other = type(again)().eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected) == (source == "none")
        assert torch.equal(again(x), other(x))
        rmsnorm_patch.revert(again)
        assert torch.equal(again(x), other(x))
    assert not any(derives_from_patched(type(each)) for each in again.modules())


def test_a_module_made_by_a_patched_ones_class_is_nobodys_patched_module(small_model, run, ids, snapshot):
    """`type(layer)(config, 0)`, as who adds a block or makes an average of the weights does."""
    model, plain = small_model("llama"), small_model("llama")
    rmsnorm_patch.apply(model)
    norm, layer = model.model.norm, model.model.layers[0]
    made = [type(norm)(64, eps=1e-3), type(layer)(model.config, 0), type(layer)(config=model.config, layer_idx=0)]
    assert not any(derives_from_patched(type(each)) for module in made for each in module.modules())
    assert made[0].variance_epsilon == 1e-3
    assert inspect.signature(type(layer)) == inspect.signature(type(plain.model.layers[0]))
    for each in (model, plain):
        each.model.layers[0] = copy.deepcopy(made[1])
        each.model.layers[0].load_state_dict(plain.model.layers[1].state_dict())
    assert run(model, ids).same_as(run(plain, ids))
    other = small_model("llama")
    other.model.layers[0] = made[1].eval()
    before = snapshot(other)
    rmsnorm_patch.apply(other)
    rmsnorm_patch.revert(other)
    assert snapshot(other) == before


def test_old_pickle_protocols_work_where_they_did(small_model, run, ids):
    model = small_model("llama")
    expected = run(small_model("llama"), ids)
    rmsnorm_patch.apply(model)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert run(pickle.loads(pickle.dumps(model, protocol)), ids).same_as(expected)


def test_state_dict_keys_and_a_strict_load_both_ways(small_model, run, ids):
    model, other = small_model("llama"), small_model("llama", seed=1)
    keys = list(model.state_dict())
    theirs = run(other, ids)
    rmsnorm_patch.apply(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(other.state_dict(), strict=True)
    after = run(model, ids)
    assert after.same_as(theirs)
    assert after.kinds == FUSED
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, strict=True, assign=True)
    assert run(model, ids).same_as(theirs)


def test_safetensors_round_trip_is_bit_equal(small_model, tmp_path):
    model = small_model("llama", torch.bfloat16)
    save_model(model, str(tmp_path / "plain.safetensors"))
    rmsnorm_patch.apply(model)
    save_model(model, str(tmp_path / "patched.safetensors"))
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "patched.safetensors").read_bytes()
    assert len(load_file(tmp_path / "patched.safetensors")) > 0


def test_save_pretrained_writes_the_same_files_and_loads_unpatched(small_model, run, ids, tmp_path):
    model = small_model("llama", torch.bfloat16)
    expected = run(model, ids)
    model.save_pretrained(tmp_path / "plain")
    rmsnorm_patch.apply(model)
    model.save_pretrained(tmp_path / "patched")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "patched").iterdir()) == files
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes(), name
    loaded = type(model).from_pretrained(tmp_path / "patched", dtype=torch.bfloat16).eval()
    fresh = run(loaded, ids)
    assert fresh.kinds == {}
    assert fresh.same_as(expected)
    rmsnorm_patch.apply(loaded)
    assert run(loaded, ids).same_as(expected)


class Counting(pickle.Pickler):
    """A pickler that notes the shape of every tensor that it writes."""

    def __init__(self):
        super().__init__(io.BytesIO())
        self.shapes = []

    def reducer_override(self, written):
        if isinstance(written, torch.Tensor):
            self.shapes.append(tuple(written.shape))
        return NotImplemented


def test_a_pickle_holds_no_second_set_of_weights(small_model):
    def written(model):
        pickler = Counting()
        pickler.dump(model)
        return sorted(pickler.shapes)

    model = small_model("llama")
    plain = written(model)
    assert len(plain) >= len(list(model.parameters()))
    rmsnorm_patch.apply(model)
    assert written(model) == plain
