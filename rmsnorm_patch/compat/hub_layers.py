"""Forwards for the layers of Hugging Face `kernels`: RMSNorm, zero-centred and gated, found by behaviour.

`kernelize` puts one forward over every class of a model that carries a layer's name, whatever that class computes. So
the forward here asks the class: its own forward is run on probes once (`scan`), and the kernel gets the numerics that
agree bit for bit. The class's own forward stays reachable through `type(module)`, and runs wherever a kernel should
not: on the CPU, in training, under autocast or a gradient, inside `torch.compile`, and where no spec matches.

The layers are stateless, as the library wants them: what was found is kept here, beside the module, for as long as it
lives. `scripts/kernel_folder.py` writes the folder that the library loads.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn

from .. import ops
from ..numerics.spec import NormSpec
from ..ops import dispatch
from ..rewrite import guards
from ..scan.norms import infer_spec
from .gated_norm import ACTIVATIONS, Gated, infer_gated

_is_compiling = torch.compiler.is_compiling
_EPS_OF_NONE = torch.finfo(torch.float32).eps


class Served(NamedTuple):
    """How the calls of one module are served.

    cls: its class when it was probed. run: the bound op, or None where nothing serves it, and `reason` says why.
    weight, eps: names of attributes, read anew at each call; None for none, and for an eps that is a constant.
    activation: of the gate's; "" for a norm without one. automatic: whether CPU tensors stay with the class's forward.
    """

    cls: type[nn.Module]
    run: ops.Bound | None
    reason: str
    weight: str | None = None
    eps: str | None = None
    implied_eps: float = 0.0
    activation: str = ""
    automatic: bool = True


_SERVED: WeakKeyDictionary[nn.Module, Served] = WeakKeyDictionary()


def served(module: nn.Module, gated: bool = False) -> Served:
    """How `module` is served; probed at the first question, and again once it has another class."""
    known = _SERVED.get(module)
    if known is None or known.cls is not type(module):
        known = _SERVED[module] = _find(module, gated)
    return known


def _find(module: nn.Module, gated: bool) -> Served:
    cls, backend = type(module), dispatch.requested_backend()
    if backend == "reference":
        return Served(cls, None, "backend 'reference' was asked for")
    found: Gated | None = None
    spec: NormSpec | None
    weight: str | None
    eps: str | None
    if gated:
        found, reason = infer_gated(module)
        if found is None:
            return Served(cls, None, reason)
        spec, weight, eps = found.spec, found.weight_attribute, found.eps_attribute
    else:
        match = infer_spec(module)
        spec, reason, weight, eps = match.spec, match.reason, match.weight_attribute, match.eps_attribute
    if spec is None:
        return Served(cls, None, reason)
    implied = _EPS_OF_NONE if spec.eps is None else spec.eps
    activation = "" if found is None else found.activation
    run = ops.bind_rms_norm(spec.variant if eps is not None else spec, backend)
    return Served(cls, run, reason, weight, eps, implied, activation, backend == "auto")


def rms_norm(module: nn.Module, hidden_states: Any) -> Any:
    """What `type(module).forward(module, hidden_states)` gives, by a kernel where one may serve.

    hidden_states: [..., N]; the result has its shape, and the dtype that the class's own forward gives. Raises what
    that forward raises.
    """
    if _is_compiling() or module.training:
        return type(module).forward(module, hidden_states)
    known = served(module)
    normed = None if known.run is None else _normed(module, known, hidden_states)
    return type(module).forward(module, hidden_states) if normed is None else normed


def rms_norm_gated(module: nn.Module, hidden_states: Any, gate: Any = None) -> Any:
    """What `type(module).forward(module, hidden_states, gate)` gives: the norm by a kernel, the gate's activation and
    the product in fp32, one rounding at the end.

    hidden_states, gate: [..., N], of one shape and dtype; the result has both.
    """
    own = type(module).forward
    if _is_compiling() or module.training or type(gate) is not torch.Tensor:
        return own(module, hidden_states, gate)
    known = served(module, gated=True)
    if known.run is None or gate.requires_grad or type(hidden_states) is not torch.Tensor:
        return own(module, hidden_states, gate)
    if gate.dtype is not hidden_states.dtype or gate.shape != hidden_states.shape:
        return own(module, hidden_states, gate)
    normed = _normed(module, known, hidden_states)
    if normed is None:
        return own(module, hidden_states, gate)
    return (normed * ACTIVATIONS[known.activation](gate.to(torch.float32))).to(hidden_states.dtype)


def _normed(module: nn.Module, known: Served, x: Any) -> torch.Tensor | None:
    """The kernel's result, or None where the class's own forward should run."""
    if type(x) is not torch.Tensor or (known.automatic and not x.is_cuda):
        return None
    weight = None if known.weight is None else module._parameters.get(known.weight, module._buffers.get(known.weight))
    if (weight is None) is not (known.weight is None):
        return None
    eps = known.implied_eps if known.eps is None else getattr(module, known.eps)
    if eps is None:
        eps = _EPS_OF_NONE
    if type(eps) is not float or not guards.servable(x, weight):
        return None
    assert known.run is not None
    return known.run(x, weight, eps)  # type: ignore[no-any-return]
