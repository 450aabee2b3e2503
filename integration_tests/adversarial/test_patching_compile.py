"""torch.compile(fullgraph=True), patching after compiling, torch.export, jit.trace and fx."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn as nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_dynamo")]


@pytest.mark.parametrize(
    ("model_type", "backend", "mode"),
    [  # every two of them meet
        ("llama", "reference", torch.no_grad),
        ("llama", "auto", torch.inference_mode),
        ("qwen3", "reference", torch.inference_mode),
        ("qwen3", "auto", torch.no_grad),
        ("gemma2", "reference", torch.no_grad),
        ("gemma2", "auto", torch.inference_mode),
    ],
)
def test_a_patched_model_traces_whole_and_computes_the_same(small_model, ids, model_type, backend, mode):
    """aot_eager runs the graph's aten ops one by one: the bits are eager's."""
    model = small_model(model_type)
    with mode():
        expected = model(ids, use_cache=False).logits
        rmsnorm_patch.apply(model, backend=backend)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_patched_model_compiled_by_inductor(small_model, ids):
    model = small_model("llama")
    with torch.no_grad():
        expected = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        torch._dynamo.reset()
        rmsnorm_patch.apply(model)
        got = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    assert torch.equal(got, expected)


def test_other_lengths_recompile_once_and_stay_right(small_model, ids):
    model = small_model("llama")
    inputs = [torch.arange(2 * length).view(2, length) * 7 % 320 for length in range(3, 12)]
    with torch.no_grad():
        expected = [model(x, use_cache=False).logits for x in inputs]
        rmsnorm_patch.apply(model)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for x, wanted in zip(inputs, expected, strict=True):
            assert torch.equal(compiled(x, use_cache=False).logits, wanted)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile(model)", "model.compile()"])
def test_patching_and_reverting_after_compile_recompiles(small_model, ids, whole):
    """Graphs with one norm weight of the class that ran: a stale graph would show in the operators that it holds."""
    model = small_model("llama")
    seen = []

    def record(graph, inputs):
        seen.append(graph)
        return graph

    if whole:
        call = torch.compile(model, backend=record, fullgraph=True)
    else:
        model.compile(backend=record, fullgraph=True)
        call = model
    with torch.no_grad():
        expected = call(ids, use_cache=False).logits
        assert len(seen) == 1
        rmsnorm_patch.apply(model)
        assert torch.equal(call(ids, use_cache=False).logits, expected)
        assert len(seen) == 2
        rmsnorm_patch.revert(model)
        assert torch.equal(call(ids, use_cache=False).logits, expected)
        assert len(seen) <= 3


def _keep_compiled(module):
    module.kept = torch.compile(module.forward, backend="eager")


def _compile_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")


def _compile_call(module):
    module.compile(backend="eager")


@pytest.mark.parametrize("which", ["model.layers.1.input_layernorm", "model.layers.1", "model", ""])
@pytest.mark.parametrize("keep", [_keep_compiled, _compile_forward, _compile_call])
def test_compiled_forwards_that_a_module_keeps_in_its_dict(small_model, ids, keep, which):
    """Under any name: nothing of the original runs in place of a kernel unseen, and `revert` leaves what was kept."""
    model = small_model("llama")
    module = model.get_submodule(which)
    keep(module)
    kept, expected = dict(module.__dict__), _logits(model, ids)
    plan = rmsnorm_patch.plan(model)
    left = [*(site for site in plan.norms if site.action != "fuse"), *(p for p in plan.pairs if p.action != "fuse")]
    foreign = keep is _compile_forward and "layers" in which
    assert bool(left) == foreign
    assert all("torch.compile of transformers" in site.reason for site in left)
    rmsnorm_patch.apply(model)
    assert torch.equal(_logits(model, ids), expected)
    rmsnorm_patch.revert(model)
    assert module.__dict__ == kept
    assert torch.equal(_logits(model, ids), expected)


def test_a_compiled_norm_is_recompiled_after_patching():
    """The guard is on the class: shown with a norm whose patched class gives another op."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64).eval()
    counter = CompileCounter()
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    x = torch.randn(2, 64)
    with torch.no_grad():
        compiled(x)
        rmsnorm_patch.apply(norm)
        compiled(x)
        compiled(x)
        assert counter.frame_count == 2
        rmsnorm_patch.revert(norm)
        compiled(x)
    assert counter.frame_count <= 3


def _logits(model, ids):
    """Without hidden states: transformers' recording hooks cannot be traced."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_layers_compiled_one_by_one(small_model, ids):
    model = small_model("llama", num_hidden_layers=4)
    expected = _logits(model, ids)
    rmsnorm_patch.apply(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(_logits(model, ids), expected)
    with torch.inference_mode():
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_only_some_layers_compiled(small_model, ids):
    """Eager layers hand over; compiled ones compute: at each border the next norm must notice."""
    model = small_model("llama", num_hidden_layers=4)
    expected = _logits(model, ids)
    rmsnorm_patch.apply(model)
    model.model.layers[1].compile(backend="aot_eager", fullgraph=True)
    model.model.layers[2].input_layernorm.compile(backend="aot_eager", fullgraph=True)
    events = []
    with observe.observing(events.append):
        assert torch.equal(_logits(model, ids), expected)
    assert [event.kind for event in events].count("taken") >= 1
    assert torch.equal(_logits(model, ids), expected)


def test_training_through_a_compiled_patched_model(small_model, ids):
    def gradients(patch):
        torch._dynamo.reset()
        model = small_model("llama").train()
        if patch:
            rmsnorm_patch.apply(model)
        torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.parametrize("strict", [True, False])
def test_export(small_model, ids, strict):
    model = Logits(small_model("llama")).eval()
    with torch.no_grad():
        expected = model(ids)
        plain = torch.export.export(model, (ids,), strict=strict)
        rmsnorm_patch.apply(model)
        exported = torch.export.export(model, (ids,), strict=strict)
        assert torch.equal(exported.module()(ids), expected)
    assert sorted(exported.state_dict) == sorted(plain.state_dict)
    count = [sum(node.op == "call_function" for node in program.graph.nodes) for program in (plain, exported)]
    assert count[0] == count[1]


def test_jit_trace_of_a_patched_model(small_model, ids):
    model = Logits(small_model("llama", attn_implementation="eager")).eval()
    with torch.no_grad():
        rmsnorm_patch.apply(model)
        traced = torch.jit.trace(model, (ids,), check_trace=False)
        other = (ids + 5) % 320
        assert torch.equal(traced(other), model(other))


def test_symbolic_trace_of_a_patched_norm():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64).eval()
    x = torch.randn(2, 64)
    rmsnorm_patch.apply(norm)
    tracer = torch.fx.Tracer()
    graph = tracer.trace(norm)
    with torch.no_grad():
        assert torch.equal(torch.fx.GraphModule(norm, graph)(x), norm(x))


def test_fake_tensors_and_make_fx(small_model):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    model = small_model("llama")
    layer = model.model.layers[0]
    x, other = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    position = model.model.rotary_emb(x, torch.arange(5)[None])

    def call(x):
        return layer(x, position_embeddings=position), model.model.norm(x)

    with torch.no_grad():
        expected = call(other)
        rmsnorm_patch.apply(model)
        for kind in ("real", "symbolic"):
            graph = make_fx(call, tracing_mode=kind, _allow_non_fake_inputs=True)(x)
            assert all(torch.equal(a, b) for a, b in zip(graph(other), expected, strict=True))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            total, normed = call(mode.from_tensor(x))
        assert total.shape == normed.shape == x.shape
        assert all(torch.equal(a, b) for a, b in zip(call(other), expected, strict=True))
