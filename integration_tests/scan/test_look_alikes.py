"""Modules that look like an RMSNorm and compute something else: each is rejected with its reason."""

import functools
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.scan.norms import infer_spec

WIDTH = 48


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
