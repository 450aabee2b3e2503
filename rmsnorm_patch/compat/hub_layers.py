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
from ..fused.gated_norm import op as gated_norm
from ..ops import dispatch
from ..rewrite import guards
from ..rewrite.attributes import Attributes
from ..scan.norms import infer_gated, infer_spec


class Served(NamedTuple):
    """How the calls of one module are served.

    cls: its class when it was probed. run: the bound op, or None where nothing serves it, and `reason` says why.
    attributes: where it has weight and eps, which are read anew at each call. automatic: whether CPU tensors stay with
    the class's forward.
    """

    cls: type[nn.Module]
    run: Any
    reason: str
    attributes: Attributes | None = None
    automatic: bool = True


_SERVED: dict[bool, WeakKeyDictionary[nn.Module, Served]] = {False: WeakKeyDictionary(), True: WeakKeyDictionary()}
"""By whether the module is asked for a gated norm."""


def served(module: nn.Module, gated: bool = False) -> Served:
    """How calls of `module` with a gate, or without one, are served; probed at the first of them, and again once it
    has another class."""
    known = _SERVED[gated].get(module)
    if known is None or known.cls is not type(module):
        known = _SERVED[gated][module] = _find(module, gated)
    return known


def _find(module: nn.Module, gated: bool) -> Served:
    cls, backend = type(module), dispatch.requested_backend()
    if backend == "reference":
        return Served(cls, None, "backend 'reference' was asked for")
    match = infer_gated(module) if gated else infer_spec(module)
    spec = match.spec
    if spec is None:
        return Served(cls, None, match.reason)
    variant = spec.variant if match.eps_attribute is not None else spec
    run: Any
    if match.gating is None:
        run = ops.bind_rms_norm(variant, backend)
    else:
        run = gated_norm.bind(variant, match.gating, backend)
    attributes = Attributes(match.weight_attribute, match.eps_attribute, spec.eps)
    return Served(cls, run, match.reason, attributes, backend == "auto")


def rms_norm(module: nn.Module, hidden_states: Any) -> Any:
    """What `type(module).forward(module, hidden_states)` gives, by a kernel where one may serve.

    hidden_states: [..., N]; the result has its shape, and the dtype that the class's own forward gives. Raises what
    that forward raises.
    """
    if not (ops.is_traced() or module.training):
        known = served(module)
        given = _weight_and_eps(module, known, hidden_states)
        if given is not None:
            return known.run(hidden_states, *given)  # type: ignore[no-any-return]
    return type(module).forward(module, hidden_states)


def rms_norm_gated(module: nn.Module, hidden_states: Any, gate: Any = None) -> Any:
    """What `type(module).forward(module, hidden_states, gate)` gives, by one kernel where it may serve.

    hidden_states, gate: [..., N], of one shape; the result has it, and the dtype that the class's own forward gives.
    """
    if not (ops.is_traced() or module.training) and type(gate) is torch.Tensor:
        known = served(module, gated=True)
        given = _weight_and_eps(module, known, hidden_states)
        if given is not None and guards.gate_fits(hidden_states, gate):
            return known.run(hidden_states, gate, *given)  # type: ignore[no-any-return]
    return type(module).forward(module, hidden_states, gate)


def _weight_and_eps(module: nn.Module, known: Served, x: Any) -> tuple[torch.Tensor | None, float] | None:
    """Of a call that a kernel serves; None where the class's own forward should run."""
    attributes = known.attributes
    if attributes is None or type(x) is not torch.Tensor or (known.automatic and not x.is_cuda):
        return None
    weight, eps = attributes.weight_of(module), attributes.eps_of(module)
    if not attributes.fits(weight) or type(eps) is not float or not guards.servable(x, weight):
        return None
    return weight, eps
