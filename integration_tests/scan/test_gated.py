"""Which gated norms are taken for one, and what is said of those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import rmsnorm_patch
from rmsnorm_patch.errors import UnsupportedModel
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.scan.gated import UNKNOWN
from rmsnorm_patch.scan.norms import infer_gated, infer_norm, infer_spec

WIDTH = 64


class Gated(nn.Module):
    """The norm in fp32, times silu(gate)."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.tiny = eps

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.tiny) * self.gamma.float()

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (self.normed(x) * F.silu(z.float())).to(x.dtype)


class WithoutGate(Gated):
    def forward(self, x, z=None):  # type: ignore[no-untyped-def, override]
        return super().forward(x, z) if z is not None else self.normed(x).to(x.dtype)


class Offset(Gated):
    def normed(self, x):  # type: ignore[no-untyped-def]
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.tiny) * (1.0 + self.gamma.float())


class OtherActivation(Gated):
    def forward(self, x, z):  # type: ignore[no-untyped-def, override]
        return (self.normed(x) * F.gelu(z.float())).to(x.dtype)


class RoundsTheActivation(Gated):
    """The same in fp32; in half precision the gate's activation is rounded."""

    def forward(self, x, z):  # type: ignore[no-untyped-def, override]
        return (self.normed(x) * F.silu(z)).to(x.dtype)


class WritesItsGate(Gated):
    def forward(self, x, z):  # type: ignore[no-untyped-def, override]
        got = super().forward(x, z)
        z.zero_()
        return got


class Remembers(Gated):
    def forward(self, x, z):  # type: ignore[no-untyped-def, override]
        self.last = x
        return super().forward(x, z)


class ClampsItsEps(Gated):
    """Every eps of the probes means what it says; its own does not."""

    def __init__(self) -> None:
        super().__init__(eps=1e-9)

    def normed(self, x):  # type: ignore[no-untyped-def]
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + max(self.tiny, 1e-6)) * self.gamma.float()


class Third(Gated):
    def forward(self, x, z, scale=1.0):  # type: ignore[no-untyped-def, override]
        return super().forward(x, z) * scale


class OtherShape(Gated):
    """Its second tensor is a residual of another width, say."""

    def forward(self, x, z):  # type: ignore[no-untyped-def, override]
        return super().forward(x, z[..., : WIDTH // 2].repeat(1, 1, 3))


class NeverReadsIt(Gated):
    def forward(self, x, z=None):  # type: ignore[no-untyped-def, override]
        return self.normed(x).to(x.dtype)


@pytest.mark.parametrize(("cls", "offset"), [(Gated, "none"), (WithoutGate, "none"), (Offset, "fp32")])
def test_other_names_and_an_offset(cls: type[Gated], offset: str) -> None:
    match = infer_norm(cls(eps=3e-4))
    assert match.gating == GateSpec("silu", "norm_first")
    assert match.spec is not None
    assert (match.spec.weight_offset, match.spec.eps) == (offset, 3e-4)
    assert (match.weight_attribute, match.eps_attribute) == ("gamma", "tiny")
    assert infer_spec(cls()).spec is None


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (OtherActivation, UNKNOWN),
        (RoundsTheActivation, UNKNOWN),
        (WritesItsGate, "its forward writes to its gate"),
        (Remembers, "its forward writes to the module's own attributes"),
        (ClampsItsEps, "its own tiny=1e-09 does not enter as other values of tiny do"),
    ],
)
def test_look_alikes_are_left_and_named(cls: type[Gated], said: str) -> None:
    match = infer_norm(cls())
    assert (match.spec, match.gating) == (None, None)
    assert match.reason.endswith(said)
    assert match.reason.startswith("its forward needs further arguments (z)")


@pytest.mark.parametrize("cls", [Third, OtherShape])
def test_a_forward_that_takes_something_else_keeps_its_reason(cls: type[Gated]) -> None:
    match = infer_norm(cls())
    assert match.spec is None
    assert match.reason.startswith("its forward needs further arguments (z")
    assert "probe" not in match.reason


def test_an_argument_that_is_never_read_is_no_gate() -> None:
    match = infer_norm(NeverReadsIt())
    assert match.spec is not None
    assert match.gating is None


def test_equal_modules_are_probed_once_and_others_anew() -> None:
    ran = []

    class Counted(Gated):
        def forward(self, x: Any, z: Any) -> torch.Tensor:
            ran.append(x.dtype)
            return super().forward(x, z)

    infer_gated(Counted())
    first = len(ran)
    infer_gated(Counted())
    assert first > 27
    assert len(ran) == first
    assert infer_gated(Counted(eps=1e-2)).spec != infer_gated(Counted()).spec
    assert len(ran) > first


def test_the_plan_shows_the_gate() -> None:
    model = nn.Sequential(Gated())
    plan = rmsnorm_patch.plan(model)
    assert "times silu(gate), N=64" in str(plan)
    assert plan.to_dict()["norms"][0]["gating"] == {"activation": "silu", "order": "norm_first"}
    named = type("GatedNorm", (OtherActivation,), {})
    with pytest.raises(UnsupportedModel, match="no gated RMSNorm that is known"):
        rmsnorm_patch.plan(nn.Sequential(named()))
