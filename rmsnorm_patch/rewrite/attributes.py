"""What a patched norm class is specialised on, and what its kernel reads from a module at each call: weight and eps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..backends.names import Backend
from ..numerics.gating import GateSpec
from ..numerics.spec import NormSpec
from ..scan.plan import Compiled

_EPS_OF_NONE = torch.finfo(torch.float32).eps
"""What `torch.nn.RMSNorm(eps=None)` adds, whatever the input's dtype (`NormSpec.eps`)."""


class Attributes:
    """Where the modules of one patched norm class have them.

    weight, eps: names of attributes, None where there is none. implied_eps: that of a norm which has no attribute for
    it, or None in it.
    """

    __slots__ = ("eps", "implied_eps", "weight")

    def __init__(self, weight: str | None, eps: str | None, constant: float | None) -> None:
        """constant: `NormSpec.eps` of the class, which counts where no attribute has it."""
        self.weight = weight
        self.eps = eps
        self.implied_eps = _EPS_OF_NONE if eps is not None or constant is None else constant

    def weight_of(self, norm: nn.Module) -> torch.Tensor | None:
        """[N], a parameter or buffer of the module's own; else None."""
        name: Any = self.weight
        weight = norm._parameters.get(name)
        return norm._buffers.get(name) if weight is None else weight

    def eps_of(self, norm: nn.Module) -> Any:
        """A float, or whatever else somebody put there."""
        eps = None if self.eps is None else getattr(norm, self.eps)
        return self.implied_eps if eps is None else eps

    def fits(self, weight: torch.Tensor | None) -> bool:
        """Whether `weight_of` gave one where the class has one."""
        return (weight is None) is (self.weight is None)

    def missing(self) -> str:
        """Why a weight that does not fit is not read."""
        return f"the norm's {self.weight} is not a parameter or buffer of its own"


class NormKey(NamedTuple):
    """What a patched norm class is specialised on; plain data, it travels in pickles."""

    spec: NormSpec
    weight_attribute: str | None
    eps_attribute: str | None
    backend: Backend
    gating: GateSpec | None = None
    compiled: Compiled = "model"

    @property
    def attributes(self) -> Attributes:
        return Attributes(self.weight_attribute, self.eps_attribute, self.spec.eps)
