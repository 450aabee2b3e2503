"""The first thing that a pair tries in an eager decode step: the launcher's own call, ahead of the guards.

The launcher serves CUDA tensors only, so the op's reference arithmetic stands where its callable would; what is tested
is when it is asked, with what, and that its answer lands where the model reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch import observe, reference
from rmsnorm_patch.rewrite import pair_ops
from rmsnorm_patch.semantics import LLAMA

TOKENS = torch.arange(1, 8)[None]


class Launcher:
    """Stands where a bound op is; counts what it was asked."""

    def __init__(self, serves: bool = True) -> None:
        self.serves = serves
        self.asked: list[tuple[torch.Tensor, float]] = []

    def attempt(self, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, eps: float):
        self.asked.append((weight, eps))
        with torch._C.DisableTorchFunction():  # no mode sees what a kernel does
            return reference.fused_add_rms_norm(a, b, weight, LLAMA, eps) if self.serves else None

    def __call__(self, *operands: object):
        raise AssertionError("the guards' call: CPU tensors never reach it")

    def backend_for(self, *operands: object) -> str:
        return "reference"


@pytest.fixture
def model(small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model("llama", torch.bfloat16, num_hidden_layers=3)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def put(model: PreTrainedModel, launcher: Launcher) -> None:
        rmsnorm_patch.apply(model)
        kernel = pair_ops.kernel_of(model.model.norm)
        assert kernel is not None
        monkeypatch.setattr(kernel, "fused", launcher)

    return put


def test_every_pair_is_one_attempt_and_the_logits_are_the_models(model, install) -> None:
    with torch.no_grad():
        before = model(TOKENS, output_hidden_states=True)
        launcher = Launcher()
        install(model, launcher)
        after = model(TOKENS, output_hidden_states=True)
    assert len(launcher.asked) == 6
    layers = model.model.layers
    read = [layers[0].post_attention_layernorm, layers[1].input_layernorm, layers[1].post_attention_layernorm]
    assert [weight is norm.weight for (weight, _), norm in zip(launcher.asked, read, strict=False)] == [True] * 3
    assert torch.equal(before.logits, after.logits)
    for one, other in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(one, other)


def test_generation_is_the_models(model, install) -> None:
    with torch.inference_mode():
        before = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
        launcher = Launcher()
        install(model, launcher)
        after = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
    assert torch.equal(before, after)
    assert len(launcher.asked) == 6 * 8


def test_what_the_launcher_declines_runs_the_original(model, install) -> None:
    with torch.no_grad():
        before = model(TOKENS).logits
        launcher = Launcher(serves=False)
        install(model, launcher)
        assert torch.equal(model(TOKENS).logits, before)
    assert len(launcher.asked) == 6


def test_eps_is_the_modules_at_the_call(model, install) -> None:
    launcher = Launcher()
    install(model, launcher)
    model.model.layers[1].input_layernorm.variance_epsilon = 0.0
    with torch.no_grad():
        model(TOKENS)
    assert [eps for _, eps in launcher.asked] == [1e-6, 0.0, 1e-6, 1e-6, 1e-6, 1e-6]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class CoarseAdd(TorchFunctionMode):
    """Simulates another precision, as quantisation studies do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.to(torch.float8_e5m2).to(result.dtype) if func is torch.Tensor.add else result


def test_a_default_device_is_no_reason(model, install) -> None:
    launcher = Launcher()
    install(model, launcher)
    with torch.no_grad(), torch.device("cpu"):
        model(TOKENS)
    assert len(launcher.asked) == 6


def test_a_function_mode_sees_the_adds(model, install) -> None:
    with torch.no_grad():
        plain = model(TOKENS).logits
        with CoarseAdd():
            before = model(TOKENS).logits
        install(model, Launcher())
        with CoarseAdd():
            after = model(TOKENS).logits
    assert torch.equal(after, before)
    assert not torch.equal(after, plain)


AROUND = ["grad", "training", "autocast", "dispatch mode", "function mode", "forward AD", "observer", "hooks"]


@pytest.mark.parametrize("around", AROUND)
def test_not_asked_where_the_original_must_run(model, install, around: str) -> None:
    launcher = Launcher()
    install(model, launcher)
    if around == "training":
        model.train()
    if around == "hooks":
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.register_forward_hook(lambda module, args, output: None)
    contexts = {
        "grad": torch.enable_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "dispatch mode": Watching(),
        "function mode": CoarseAdd(),
        "forward AD": torch.autograd.forward_ad.dual_level(),
        "observer": observe.observing(lambda event: None),
    }
    with torch.no_grad(), contexts.get(around, nullcontext()):
        model(TOKENS)
    assert launcher.asked == []
