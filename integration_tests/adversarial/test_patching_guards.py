"""When a kernel may not run: each guard, and the patched path through the Triton interpreter around it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmsnorm_patch.rewrite import guards


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def _x(dtype=torch.float32):
    return torch.randn(3, 8).to(dtype)


def _weight(dtype=torch.float32, **fields):
    return nn.Parameter(torch.rand(8).to(dtype), requires_grad=False, **fields)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (_x(), _weight()),
        (_x(), None),
        (_x(torch.bfloat16), _weight(torch.bfloat16)),
        (_x(torch.bfloat16), _weight()),
        (_x(), _weight(torch.bfloat16)),
        (_x(torch.float16), _weight(torch.float16)),
        (_x(), torch.rand(8)),
        (_x()[:, ::1].t().t(), _weight()),
        (torch.randn(2, 3, 8), _weight()),
        (torch.randn(8), _weight()),
    ],
)
def test_what_a_kernel_may_serve(x, weight):
    with torch.no_grad():
        assert guards.servable(x, weight)
        assert guards.reason(x, weight) == ""
        assert guards.traceable(x, weight)


@pytest.mark.parametrize(
    ("x", "weight", "why"),
    [
        (_x(torch.float64), _weight(torch.float64), "input dtype torch.float64"),
        (torch.ones(3, 8, dtype=torch.int32), None, "input dtype torch.int32"),
        (_x(torch.float16), _weight(torch.bfloat16), "weight dtype torch.bfloat16 for input dtype torch.float16"),
        (_x(), nn.Parameter(torch.rand(1), requires_grad=False), r"weight of shape \(1,\) for rows of 8"),
        (_x(), nn.Parameter(torch.rand(3, 8), requires_grad=False), r"weight of shape \(3, 8\)"),
        (_x(), nn.Parameter(torch.empty(0), requires_grad=False), r"weight of shape \(0,\)"),
        (_x(), torch.rand(8, device="meta"), "weight on meta, input on cpu"),
        (torch.rand(3, 8, device="meta"), torch.rand(8, device="meta"), "input on meta"),
        (torch.rand(3, 8, device="meta"), None, "input on meta"),
        (_x().as_subclass(Sub), _weight(), "input is a Sub"),
        (_x(), torch.rand(8).as_subclass(Sub), "weight is a Sub"),
        (_x().to_sparse(), _weight(), "layout"),
        (FakeTensorMode().from_tensor(_x()), _weight(), "input is a FakeTensor"),
    ],
)
def test_what_it_may_not(x, weight, why):
    with torch.no_grad():
        assert not guards.servable(x, weight)
        assert re.search(why, guards.reason(x, weight))
        if "layout" not in why and "input on meta" not in why:
            assert not guards.traceable(x, weight)


def test_what_around_a_call_forbids_it():
    x, weight = _x(), _weight()
    wanted = nn.Parameter(torch.rand(8))
    assert guards.servable(x, weight)
    assert not guards.servable(x, wanted)
    assert guards.reason(x, wanted) == "a gradient is wanted"
    assert not guards.servable(_x().requires_grad_(), weight)
    assert not guards.servable(_x().requires_grad_(), None)
    assert guards.servable(x, None)
    assert guards.reason(x, None) == guards.reason(x, weight) == ""
    with torch.no_grad():
        assert guards.servable(x, wanted)
        assert guards.servable(_x().requires_grad_(), None)
        with torch.device("cpu"):  # only places new tensors
            assert guards.servable(x, weight)
            assert guards.reason(x, weight) == ""
        with Seen():
            assert not guards.servable(x, weight)
            assert not guards.servable(x, None)
            assert guards.reason(x, weight) == "a torch dispatch mode is active"
        with Watching():
            assert not guards.servable(x, weight)
            assert guards.reason(x, weight) == "a torch function mode is active"
        with torch.autocast("cpu", torch.bfloat16):
            assert not guards.traceable(x, weight)
            assert not guards.servable(x, weight)
            assert not guards.servable(x, None)
            assert guards.reason(x, weight) == "autocast is active"
        with torch.autograd.forward_ad.dual_level():
            assert not guards.servable(x, weight)
            assert guards.reason(x, weight) == "a function transform is active"
        answers = []
        torch.func.vmap(lambda row: (answers.append(guards.servable(row, weight)), row)[1])(x)
        assert answers == [False]
        answers.clear()
        torch.jit.trace(lambda t: (answers.append(guards.servable(t, weight)), t + 1)[1], (x,), check_trace=False)
        assert answers == [False]
        assert guards.servable(x, weight)


def test_no_modes_are_listed_where_there_is_none(monkeypatch):
    """Every call of a patched norm asks, and a list of modes costs more than their number."""

    def never():
        raise AssertionError("there is no mode")

    monkeypatch.setattr(guards, "function_mode_watches", never)
    assert guards.servable(_x(), _weight())
    with torch.device("cpu"), pytest.raises(AssertionError):
        guards.servable(_x(), _weight())


def test_a_compiled_region_is_served_with_grad_mode_on_where_no_gradient_is_wanted():
    x, weight = _x(), _weight()
    assert torch.is_grad_enabled()
    assert guards.traceable(x, weight)
    assert guards.traceable(x, None)
    assert not guards.traceable(x, nn.Parameter(torch.rand(8)))
    assert not guards.traceable(_x().requires_grad_(), None)


def test_a_gate_forbids_a_kernel_only_where_its_gradient_is_wanted():
    x, gate = _x(), _x()
    assert torch.is_grad_enabled()
    assert guards.gate_fits(x, gate)
    gate.requires_grad_()
    assert not guards.gate_fits(x, gate)
    assert guards.gate_reason(x, gate) == "a gradient is wanted"
    with torch.no_grad():
        assert guards.gate_fits(x, gate)
        assert guards.gate_reason(x, gate) == ""


@pytest.mark.parametrize(
    "gate",
    [
        _x().as_subclass(Sub),
        _x(torch.float64),
        torch.randn(1, 8),
        torch.randn(3, 8, device="meta"),
        _x().to_sparse(),
    ],
)
def test_each_difference_of_a_gate_alone_forbids_a_kernel_and_is_named(gate):
    x = _x()
    assert torch.is_grad_enabled()
    assert not guards.gate_fits(x, gate)
    assert guards.gate_reason(x, gate).startswith(f"gate is a {type(gate).__name__} {gate.dtype} ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gate_of_another_served_dtype_fits(dtype):
    assert guards.gate_fits(_x(torch.bfloat16), _x(dtype))


INTERPRETED = """
import copy, torch, torch.nn as nn
from collections import Counter
from transformers import LlamaConfig, LlamaForCausalLM
import rmsnorm_patch
from rmsnorm_patch.rewrite import observe

torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(5)[None] * 7
def run(model):
    events = []
    with torch.no_grad(), observe.observing(events.append):
        out = model(ids, output_hidden_states=True)
    return out, Counter((e.kind, e.backend) for e in events), events
expected, _, _ = run(model)
report = rmsnorm_patch.apply(model, backend="triton")
KERNELS = {("norm", "triton"): 1, ("in_layer", "triton"): 2, ("cross_layer", "triton"): 2, ("taken", "triton"): 2}
def check(model, wanted, expected=expected):
    got, kinds, events = run(model)
    assert kinds == wanted, kinds
    for mine, theirs in zip(got.hidden_states, expected.hidden_states):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    return events
ready = rmsnorm_patch.warmup(model)
assert [(r.op, r.n, r.dtype, r.weight_dtype, r.backend, r.device) for r in ready] == [
    (op, 64, "float32", "float32", "triton", "cpu") for op in ("rms_norm", "fused_add_rms_norm")], ready
check(model, KERNELS)
check(copy.deepcopy(model), KERNELS)

# a copy with new weights in one: kernels read each model's own
other = copy.deepcopy(model)
with torch.no_grad():
    other.model.norm.weight.mul_(2)
changed, _, _ = run(other)
torch.testing.assert_close(changed.hidden_states[-1], 2 * expected.hidden_states[-1], rtol=1e-5, atol=1e-6)
check(model, KERNELS)

# eps is read at the call
model.model.norm.variance_epsilon = 1.0
twin = copy.deepcopy(model)
rmsnorm_patch.revert(twin)
check(model, KERNELS, run(twin)[0])
model.model.norm.variance_epsilon = 1e-6

# guards: the original arithmetic, said with the reason
class Sub(torch.Tensor):
    pass
kept = model.model.norm.weight
model.model.norm.weight = nn.Parameter(kept.detach().as_subclass(Sub), requires_grad=False)
got, kinds, events = run(model)
assert ("norm", "original") in kinds and ("norm", "triton") in kinds, kinds
left = [(e.kind, e.reason) for e in events if e.backend == "original"]
assert left == [("kept", "weight is a Sub"), ("norm", "weight is a Sub")], left
torch.testing.assert_close(got.hidden_states[-1], expected.hidden_states[-1], rtol=1e-5, atol=1e-6)
model.model.norm.weight = kept

# training, and a gradient that is wanted
model.train()
_, kinds, events = run(model)
assert {backend for _, backend in kinds} == {"original"}, kinds
assert any("training mode" in e.reason for e in events)
model.eval()
events = []
with observe.observing(events.append):
    loss = model(ids, labels=ids).loss
    loss.backward()
assert {e.backend for e in events} == {"original"}, events
ours = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
rmsnorm_patch.revert(model)
model(ids, labels=ids).loss.backward()
assert all(torch.equal(a, p.grad) for a, p in zip(ours, model.parameters()))
again, kinds, _ = run(model)
assert kinds == {}
assert torch.equal(again.logits, expected.logits)
print("right")
"""


def test_the_kernel_path_and_its_guards_in_a_model(tmp_path):
    """Real kernels, by Triton's interpreter: what is right for the reference arithmetic must be so for kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=900, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("right")
