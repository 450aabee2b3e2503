"""Other devices, streams, graphs, compiled callers and threads, cases 32 to 42: right, or a named error."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn as nn
from bad_input import (
    BF16,
    EPS,
    case,
    fused,
    norm,
    parameter,
    rand,
    same,
)

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import backend as cuda_backend
from rmsnorm_patch.backends.cuda import cache
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import GEMMA, LLAMA
from rmsnorm_patch.ops import dispatch

pytestmark = pytest.mark.gpu


@case(32)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_current(backend):
    x, weight = rand(8, 2048).to("cuda:1"), parameter(2048).to("cuda:1")
    with torch.cuda.device(0):
        got = norm(LLAMA, backend)(x, weight, EPS)
        assert torch.cuda.current_device() == 0
    assert got.device == x.device
    same(got, reference.rms_norm(x, weight, LLAMA, EPS))


@case(33)
def test_operands_on_different_devices_are_named(backend):
    for weight in (parameter(512).cpu(), nn.Parameter(parameter(512).cpu())):
        with pytest.raises(UnsupportedInput, match=r"weight on cpu and x on cuda:0.*\.to\(device\)"):
            norm(LLAMA, backend)(rand(4, 512), weight, EPS)
    with pytest.raises(UnsupportedInput, match=r"residual on cpu and x on cuda:0"):
        fused(LLAMA, backend)(rand(4, 512), rand(4, 512).cpu(), parameter(512), EPS)


@case(34)
def test_cpu_tensors_take_the_reference_path():
    x, residual, weight = rand(4, 512).cpu(), rand(4, 512, seed=1).cpu(), parameter(512).cpu()
    got = fused(LLAMA, "auto")(x, residual, weight, EPS)
    want = reference.fused_add_rms_norm(x, residual, weight, LLAMA, EPS)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    with pytest.raises(UnsupportedInput, match=r"x on cpu"):
        cuda_backend.bind("rms_norm", LLAMA)(x, weight, EPS)


@case(35)
def test_side_stream_with_a_delayed_producer(backend):
    fresh, weight = rand(64, 4096), parameter(4096)
    expected = norm(LLAMA, backend)(fresh, weight, EPS)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = torch.zeros_like(fresh)
        torch.cuda._sleep(50_000_000)
        x.copy_(fresh)
        got = norm(LLAMA, backend)(x, weight, EPS)
    stream.synchronize()
    assert torch.equal(got, expected)


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@case(36)
@pytest.mark.parametrize("n", [2048, 5125])
def test_a_captured_graph_replays_with_new_data(n, backend):
    x, residual, weight = rand(8, n), rand(8, n, seed=1), parameter(n)
    op = fused(LLAMA, backend)
    op(x, residual, weight, EPS)
    graph, (normed, total) = captured(lambda: op(*op(x, residual, weight, EPS), weight, EPS))
    for seed in (5, 6):
        x.copy_(rand(8, n, seed=seed))
        graph.replay()
        expected = op(*op(x, residual, weight, EPS), weight, EPS)
        assert torch.equal(normed, expected[0])
        assert torch.equal(total, expected[1])


@case(37)
def test_capture_with_a_cold_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "cold"))
    n = 3096  # in no other test, so that nothing of it is loaded
    x, weight, spec = rand(8, n), parameter(n), replace(GEMMA, width=n - 1)
    graph, result = captured(lambda: norm(spec, "cuda")(x, weight, EPS))
    assert list((tmp_path / "cold").glob("*.artefact")), "was compiled before"
    x.copy_(rand(8, n, seed=4))
    graph.replay()
    same(result, reference.rms_norm(x, weight, spec, EPS))


@case(38)
def test_fullgraph_with_any_number_of_rows(backend):
    torch._dynamo.reset()
    op, counter = fused(LLAMA, backend), torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def layer(x, residual, weight):
        normed, total = op(x * 2, residual, weight, EPS)
        return normed + 1, total

    compiled, weight = torch.compile(layer, fullgraph=True, backend=counter), parameter(4096)
    for m in (1, 2, 5, 64, 300):
        x, residual = rand(m, 4096), rand(m, 4096, seed=1)
        got, want = compiled(x, residual, weight), layer(x, residual, weight)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    assert counter.frame_count <= 3


@case(39)
def test_opcheck_fake_tensors_and_symbolic_sizes(backend):
    spec = dict(zip(("round_before_weight", "weight_offset", "output"), ops.spec_args(LLAMA)[:3], strict=True))
    x, residual, weight = rand(4, 256), rand(4, 256, seed=1), parameter(256).detach()
    named = {**spec, "backend": backend}
    tests = ("test_schema", "test_faketensor")
    library = torch.ops.rmsnorm_patch
    torch.library.opcheck(library.rms_norm.default, (x, weight, EPS), named, test_utils=tests)
    torch.library.opcheck(library.fused_add_rms_norm.default, (x, residual, weight, EPS), named, test_utils=tests)
    operands = (x.clone(), residual.clone(), weight, EPS)
    torch.library.opcheck(library.fused_add_rms_norm_.default, operands, named, test_utils=tests)
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x, residual, weight: library.fused_add_rms_norm(x, residual, weight, EPS, **named),
        tracing_mode="symbolic",
    )(x, residual, weight)
    for m in (1, 9):
        more = rand(m, 256), rand(m, 256, seed=1)
        got, want = graph(*more, weight), fused(LLAMA, backend)(*more, weight, EPS)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@case(40)
def test_patching_a_compiled_model_recompiles_it(small_model, backend, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("RMSNORM_PATCH_COMPILE", "op")  # by default a patched model's graphs keep its own arithmetic
    model, ids = small_model("llama", BF16).cuda(), torch.arange(14, device="cuda").view(2, 7)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    ours = lambda graphs: any("rmsnorm_patch" in str(n.target) for g in graphs for n in g.graph.nodes)  # noqa: E731
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        assert not ours(counter.graphs)
        rmsnorm_patch.apply(model, backend=backend)
        eager, after = model(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits
        assert ours(counter.graphs)
        assert (after - eager).norm() <= 0.02 * eager.norm()
        rmsnorm_patch.revert(model)
        assert torch.equal(compiled(ids, use_cache=False).logits, before)


@case(41)
def test_first_call_from_a_new_thread(backend):
    x, weight, spec, found = rand(4, 1544), parameter(1544), replace(GEMMA, width=1543), []
    thread = threading.Thread(target=lambda: found.append(norm(spec, backend)(x, weight, EPS)))
    thread.start()
    thread.join()
    same(found[0], reference.rms_norm(x, weight, spec, EPS))


@case(42)
def test_unknown_capabilities():
    choose = lambda sm: dispatch.choose("rms_norm", LLAMA, BF16, BF16, 8, 4096, sm)  # noqa: E731
    newer = choose(130)
    assert newer.backend == "cuda"
    assert "sm_130 is not among the proved sm_80" in newer.reason
    older = choose(75)
    assert older.backend == "triton"
    assert "needs sm_80 or newer, device has sm_75" in older.reason
