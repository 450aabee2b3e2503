"""Norms that nobody listed are matched by what they compute; look-alikes are rejected, each with its reason."""

import functools
import importlib.util
import re
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec
from rmsnorm_patch.scan.norms import infer_spec, variant_name

WIDTH = 48


@pytest.fixture
def remote(tmp_path):
    """Import source as transformers imports remote code: a module of its own, unknown to the package."""
    loaded = []

    def load(source):
        path = tmp_path / f"modeling_remote_{len(loaded)}.py"
        path.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(f"remote_{tmp_path.name}_{len(loaded)}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


def test_odd_names_and_a_helper_method_are_matched(remote):
    code = remote(
        """
        import torch
        class Zephyr(torch.nn.Module):
            def __init__(self, width, jitter=3e-5):
                super().__init__()
                self.gain = torch.nn.Parameter(torch.zeros(width))
                self.register_parameter("bias", None)
                self.jitter = jitter
                self.momentum = 0.25
                self.layer_index = 7
            def _energy(self, h):
                return (h * h).mean(dim=-1, keepdim=True)
            def forward(self, states):
                h = states.float()
                h = h * (self._energy(h) + self.jitter).rsqrt()
                return ((1 + self.gain.float()) * h).to(states.dtype)
        """
    )
    match = infer_spec(code.Zephyr(WIDTH))
    assert match.spec == NormSpec(3e-5, "none", "fp32", True, "input")
    assert (match.eps_attribute, match.weight_attribute, match.hidden_size) == ("jitter", "gain", WIDTH)
    assert "gemma" in match.reason


class ConstantEps(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.scale, 2.5e-6)


class ClassEps(nn.Module):
    tiny = 4e-6

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.w * F.rms_norm(x, (x.shape[-1],), None, self.tiny)


class UnusedExtras(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-6

    def forward(self, x, residual=None, **kwargs):
        return F.rms_norm(x, (x.shape[-1],), self.w, self.eps)


class ConfigEps(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.eps = config["eps"]
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        scale = 2.0 if self.config["double"] else 1.0
        return F.rms_norm(x, (x.shape[-1],), self.w, self.eps) * scale


class LeadingColumns(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = 16
        self.eps = 1e-6
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h[..., : self.part].pow(2).mean(-1, keepdim=True) + self.eps)
        return self.w * h.to(x.dtype)


class NoMixedDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        if x.dtype != self.weight.dtype:
            raise TypeError("mixed dtypes")
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def test_eps_as_a_constant_in_the_code():
    match = infer_spec(ConstantEps())
    assert (match.spec.eps, match.eps_attribute, match.weight_attribute) == (2.5e-6, None, "scale")
    assert match.spec.variant == FP32_WEIGHT_MULTIPLY.variant


def test_eps_as_a_class_attribute_is_read_anew():
    module = ClassEps()
    assert infer_spec(module).spec == NormSpec(4e-6)
    module.tiny = 5e-6
    assert (infer_spec(module).spec.eps, infer_spec(module).eps_attribute) == (5e-6, "tiny")


def test_optional_arguments_that_are_never_read_do_no_harm():
    assert infer_spec(UnusedExtras()).spec.variant == FP32_WEIGHT_MULTIPLY.variant


def test_attributes_that_are_no_plain_data_decide_per_module():
    assert infer_spec(ConfigEps({"eps": 1e-6, "double": False})).spec is not None
    assert infer_spec(ConfigEps({"eps": 1e-6, "double": True})).spec is None


def test_variance_over_leading_columns():
    assert infer_spec(LeadingColumns()).spec == NormSpec(width=16)


def test_a_norm_that_refuses_mixed_dtypes_is_judged_by_the_others():
    match = infer_spec(NoMixedDtypes())
    assert match.spec.variant == FP32_WEIGHT_MULTIPLY.variant
    assert "3 dtype pairs" in match.reason


@pytest.mark.parametrize("eps", [None, 0.0, 0, 1e-5, 1e-12])
def test_eps_is_kept_exactly(eps):
    match = infer_spec(nn.RMSNorm(WIDTH, eps=eps))
    assert match.spec.eps is eps if eps is None else (match.spec.eps == eps and match.eps_attribute == "eps")


@pytest.mark.parametrize(("affine", "has_weight"), [(True, True), (False, False)])
def test_flags_of_one_class_are_told_apart(affine, has_weight):
    match = infer_spec(nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=affine))
    assert match.spec.has_weight is has_weight
    assert match.weight_attribute == ("weight" if has_weight else None)


class Norm(nn.Module):
    """Frame of the look-alikes: a weight, an eps, and `body(self, x)` for a forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-6


def rms(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class SubtractsMean(Norm):
    def forward(self, x):
        h = x.float() - x.float().mean(-1, keepdim=True)
        return (self.weight * rms(h, self.eps)).to(x.dtype)


class SumOfSquares(Norm):
    def forward(self, x):
        h = x.float()
        return (self.weight * h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + self.eps)).to(x.dtype)


class EpsOutside(Norm):
    def forward(self, x):
        h = x.float()
        return (self.weight * (h / (h.pow(2).mean(-1, keepdim=True).sqrt() + self.eps))).to(x.dtype)


class HalfStatistics(Norm):
    def forward(self, x):
        return self.weight * rms(x, self.eps)


class HalfFactor(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).to(x.dtype))


class DividesBySquareRoot(Norm):
    def forward(self, x):
        h = x.float()
        return self.weight * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class ClampsInput(Norm):
    def forward(self, x):
        return self.weight * rms(x.float().clamp(-1000.0, 1000.0), self.eps).to(x.dtype)


class ClampsResult(Norm):
    def forward(self, x):
        return self.weight * rms(x.float(), self.eps).clamp(-5.0, 5.0).to(x.dtype)


class CleansNaN(Norm):
    def forward(self, x):
        return self.weight * torch.nan_to_num(rms(x.float(), self.eps)).to(x.dtype)


class MaximumForEps(Norm):
    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp(min=self.eps))).to(x.dtype)


class WeightFirst(Norm):
    def forward(self, x):
        return rms(self.weight.float() * x.float(), self.eps).to(x.dtype)


class WithBias(Norm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return self.weight * rms(x.float(), self.eps).to(x.dtype) + self.bias


class NoiseInTraining(Norm):
    def forward(self, x):
        y = self.weight * rms(x.float(), self.eps).to(x.dtype)
        return y + 0.01 * torch.randn_like(y) if self.training else y


class NoiseAlways(Norm):
    def forward(self, x):
        y = self.weight * rms(x.float(), self.eps).to(x.dtype)
        return y + (torch.rand(()) < 0.5)


class Counts(Norm):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


class Remembers(Norm):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


class WritesInput(Norm):
    def forward(self, x):
        y = self.weight * rms(x.float(), self.eps).to(x.dtype)
        x.zero_()
        return y


class Gated(Norm):
    def forward(self, x, gate):
        return self.weight * rms(x.float(), self.eps).to(x.dtype) * F.silu(gate)


class OptionallyGated(Norm):
    def forward(self, x, gate=None):
        y = self.weight * rms(x.float(), self.eps).to(x.dtype)
        return y if gate is None else y * F.silu(gate)


class HeadWeights(Norm):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, WIDTH))

    def forward(self, x):
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


class AcrossTokens(Norm):
    def forward(self, x):
        dims = tuple(range(x.dim() - 1))
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(dims, keepdim=True) + self.eps)).to(x.dtype)


class RankDependent(Norm):
    def forward(self, x):
        y = self.weight * rms(x.float(), self.eps).to(x.dtype)
        return y if x.dim() == 3 else 2 * y


class ZeroEpsMeansDefault(Norm):
    def __init__(self):
        super().__init__()
        self.eps = 0.0

    def forward(self, x):
        return self.weight * rms(x.float(), self.eps or 1e-6).to(x.dtype)


class TensorAttribute(Norm):
    def __init__(self):
        super().__init__()
        self.table = [torch.ones(WIDTH)]

    def forward(self, x):
        return self.weight * rms(x.float(), self.eps).to(x.dtype) * self.table[0].to(x.dtype)


class ReturnsTuple(Norm):
    def forward(self, x):
        return rms(x, self.eps), x


class NeedsAnotherDevice(Norm):
    def forward(self, x):
        if x.device.type == "cpu":
            raise RuntimeError("this kernel needs a GPU")
        return x


class OwnCall(Norm):
    def __call__(self, x):
        return 2 * super().__call__(x)

    def forward(self, x):
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


class FailsInTraining(Norm):
    def forward(self, x):
        if self.training:
            raise RuntimeError("no process group")
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


class Delegates(Norm):
    forward = functools.partial(rms, eps=1e-6)


LOOK_ALIKES = [
    (SubtractsMean, "subtracts the mean"),
    (SumOfSquares, "sum of squares"),
    (EpsOutside, "eps outside the square root"),
    (HalfStatistics, "mean square in the input's half precision"),
    (HalfFactor, "rounds 1 / rms to the input's dtype"),
    (DividesBySquareRoot, "another order of operations"),
    (ClampsInput, "not on rows with: large values"),
    (ClampsResult, "not on rows with: one spike"),
    (CleansNaN, "not on rows with: Inf, NaN"),
    (MaximumForEps, "not on rows with: .*tiny values"),
    (WeightFirst, "weight before the normalisation"),
    (WithBias, r"has a bias \(bias\)"),
    (NoiseInTraining, "training mode"),
    (NoiseAlways, "from call to call"),
    (Counts, "writes to the module's own attributes"),
    (Remembers, "writes to the module's own attributes"),
    (WritesInput, "writes to its input"),
    (Gated, r"needs further arguments \(gate\)"),
    (OptionallyGated, r"optional argument that changes the result \(gate\)"),
    (HeadWeights, "has 2 dimensions"),
    (AcrossTokens, "something other than an RMSNorm"),
    (RankDependent, "2-D input"),
    (ZeroEpsMeansDefault, r"its own eps=0\.0 does not enter"),
    (TensorAttribute, "'table', which holds tensors"),
    (ReturnsTuple, "returns a tuple"),
    (NeedsAnotherDevice, r"cannot be run on .* the CPU \(RuntimeError: this kernel needs a GPU"),
    (OwnCall, "overrides __call__"),
    (FailsInTraining, r"fails on a probe \(RuntimeError: no process group\)"),
    (Delegates, "no forward in Python"),
    (lambda: nn.RMSNorm((4, 8)), "2 dimensions"),
    (lambda: nn.RMSNorm((4, 8), elementwise_affine=False), "over 2 dimensions"),
    (lambda: nn.LayerNorm(WIDTH, bias=False), "subtracts the mean"),
    (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), "subtracts the mean"),
    (lambda: nn.Sequential(nn.RMSNorm(WIDTH)), "sub-modules"),
]


@pytest.mark.parametrize(("build", "reason"), LOOK_ALIKES, ids=[getattr(b, "__name__", "?") for b, _ in LOOK_ALIKES])
def test_look_alikes_are_rejected_with_their_reason(build, reason):
    match = infer_spec(build())
    assert match.spec is None
    assert re.search(reason, match.reason), match.reason


def test_a_forward_under_torch_compile_is_run_uncompiled():
    class Compiled(Norm):
        @torch.compile
        def forward(self, x):
            return self.weight * rms(x.float(), self.eps).to(x.dtype)

    torch._dynamo.utils.counters.clear()
    assert infer_spec(Compiled()).spec.variant == LLAMA.variant
    assert not torch._dynamo.utils.counters["frames"]


class AutocastDependent(Norm):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            return x
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


def test_autocast_of_the_caller_does_not_reach_the_probes():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert infer_spec(AutocastDependent()).spec.variant == LLAMA.variant


def test_containers_that_the_forward_writes_to_are_the_twins_own():
    module = Remembers()
    infer_spec(module)
    assert module.seen == []


def test_common_variants_have_their_names():
    named = {LLAMA: "llama", GEMMA: "gemma", T5: "t5", FP32_WEIGHT_MULTIPLY: "fp32-weight-multiply"}
    assert {spec: variant_name(spec) for spec in named} == named
    assert variant_name(NormSpec(width=3, eps=1e-5)) == "llama width=3"
