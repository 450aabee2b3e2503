"""The patched class of a norm module: take what the layer before handed over, else one kernel call, else the original.

Nothing of ours is kept on the module but its class and its counts, so a copy, a pickle, another dtype or device and new
weights need no care: weight and eps are read from the module at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..backends.names import Backend
from ..errors import PatchConflict
from ..patch_state import (
    REPLACED,
    STATE,
    Read,
    is_as_read,
    is_patched,
    outside,
    read_of,
    run_class_forward,
    running_now,
    set_class,
    unpatched_class,
)
from ..scan.plan import NormSite
from ..scan.subject import attributes_named_by, is_plain, reached_by
from . import gated, guards, inductor, instance_forward, layer_calls, native, observe
from .attributes import NormKey
from .classes import Body, patched_class, register_factory
from .counts import CALLS, Calls, calls_of
from .guise import in_the_guise_of
from .handover import take
from .inductor import Compiled
from .journal import Journal
from .traced import keeps_op

ROLE = "norm"

_Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
_is_dynamo_tracing = torch.compiler.is_dynamo_compiling


def key_of(site: NormSite, backend: Backend, compiled: Compiled = "model") -> NormKey:
    """Modules that differ in nothing but the value of an eps attribute share a class."""
    assert site.spec is not None
    spec = site.spec.variant if site.eps_attribute is not None else site.spec
    compiled = "model" if site.gating is not None else compiled
    return NormKey(spec, site.weight_attribute, site.eps_attribute, backend, site.gating, compiled)


def body(original: type[nn.Module], key: NormKey) -> Body:
    """Factory of `classes`: the patched subclass of `original`."""
    key = NormKey(*key)
    run: Any
    named = attributes_named_by(original) - {key.weight_attribute, key.eps_attribute}
    read = read_of(original, *reached_by(original, named))
    if key.gating is None:
        run = ops.bind_rms_norm(key.spec, key.backend)
        forward, belongs_to = _forward_of(original, key, read)
    else:
        forward, belongs_to, run = gated.forward_of(original, key, read)
    namespace = {
        **_watching(original, named | {"_call_impl"}),
        "_rmsnorm_patch_read": read,
        "forward": forward,
        # A later `kernelize` would put its kernel over this class, instance by instance.
        "kernel_condition": staticmethod(lambda module: False),
        "_rmsnorm_patch_forward": forward,
        "_rmsnorm_patch_run": run,
    }

    def made(cls: type) -> None:
        belongs_to(cls)
        if key.gating is None:
            layer_calls.register(cls)

    return Body(namespace, made)


def _watching(original: type[nn.Module], read: frozenset[str | None]) -> dict[str, Any]:
    """Methods that tell when a module gets another value of what its forward reads beside weight and eps (a flag, a
    helper, a bias that was None): what it computes then was not probed, and it has its own class again. Nothing is
    asked at a call. read: the names."""

    def __setattr__(self, name, value):  # type: ignore[no-untyped-def]
        if name in read and not _is_same(getattr(self, name, _ABSENT), value):
            _let_go(self)
        original.__setattr__(self, name, value)

    def __delattr__(self, name):  # type: ignore[no-untyped-def]
        if name in read:
            _let_go(self)
        original.__delattr__(self, name)

    def register_parameter(self, name, param):  # type: ignore[no-untyped-def]
        if name in read and param is not None:
            _let_go(self)
        original.register_parameter(self, name, param)

    def register_buffer(self, name, tensor, persistent=True):  # type: ignore[no-untyped-def]
        if name in read and tensor is not None:
            _let_go(self)
        original.register_buffer(self, name, tensor, persistent)

    return {each.__name__: each for each in (__setattr__, __delattr__, register_parameter, register_buffer)}


_ABSENT = object()


def _is_same(before: Any, value: Any) -> bool:
    return value is before or (type(value) is type(before) and is_plain(value) and bool(value == before))


def _let_go(module: nn.Module) -> None:
    """Give `module` its own class back, as `revert` does."""
    patched = type(module)
    unpatched = unpatched_class(patched)
    instance_forward.release(module, patched, unpatched)
    set_class(module, unpatched)
    module.__dict__.pop(STATE, None)


def install(
    module: nn.Module, site: NormSite, backend: Backend, journal: Journal, compiled: Compiled = "model"
) -> None:
    """Swap the class of `module`, the one at `site`."""
    original = type(module)
    if is_patched(original):
        raise PatchConflict(
            site.path, f"a {original.__name__} that is patched already", "unpatched modules", "call revert(model) first"
        )
    journal.swap_class(module, patched_class(original, ROLE, key_of(site, backend, compiled)))
    instance_forward.adopt(module, original, journal)
    journal.set_state(module, CALLS, Calls())


def _forward_of(original: type[nn.Module], key: NormKey, read: Read) -> tuple[FunctionType, Callable[[type], None]]:
    """The forward, and a function that tells it the class that it is made for.

    Longer than a screen: what a call reads are variables around it, which cost no look-up.
    """
    patched: type = original
    own, more = read.forward, bool(read.named or read.around or len(read.codes) > 1)
    inner, code = read.codes[0] if read.codes else (is_as_read, is_as_read.__code__)  # no function, no code to change
    run = ops.bind_rms_norm(key.spec, key.backend)
    attributes = key.attributes
    weight_of, eps_of, fits = attributes.weight_of, attributes.eps_of, attributes.fits
    reference_only = key.backend == "reference"
    automatic = key.backend == "auto"
    compiled, arguments = key.compiled, ops.spec_args(key.spec, key.backend, run.dependent)

    def belongs_to(cls: type) -> None:
        nonlocal patched
        patched = cls

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        if type(self) is not patched and not isinstance(self, patched):  # held by somebody beyond `revert`
            return running_now(self, original, own)(self, hidden_states)
        if _is_dynamo_tracing():
            return traced(self, hidden_states)
        if (
            original.forward is not own or inner.__code__ is not code or (more and not is_as_read(original, read))
        ) and outside(self):
            calls_of(self).fallen_back.add(REPLACED)
            return run_class_forward(self, original, hidden_states)
        normed = native.alone(self, hidden_states)
        if normed is not None:
            try:  # noqa: SIM105 - suppress() costs more than the count
                self.__dict__[STATE][CALLS].alone += 1
            except KeyError:  # another thread reverts the model
                pass
            if observe.active:
                report(self, hidden_states, normed, "cuda")
            return normed
        if type(hidden_states) is not _Tensor:  # a subclass, or no tensor at all (`torch.fx` traces with proxies)
            calls_of(self).fallen_back.add(f"input is a {type(hidden_states).__name__}")
            return own(self, hidden_states)
        if not _is_grad_enabled():
            handed_over = take(self, hidden_states)
            if handed_over is not None:
                return handed_over
        if reference_only or (automatic and not hidden_states.is_cuda):
            normed = own(self, hidden_states)
            calls_of(self).reference += 1
            if observe.active:
                report(self, hidden_states, normed, "reference")
            return normed
        weight, eps = weight_of(self), eps_of(self)
        if fits(weight) and type(eps) is float and not self.training and guards.servable(hidden_states, weight):
            normed = run(hidden_states, weight, eps)
            calls_of(self).alone += 1
            if run.table is not None:
                kernel = layer_calls.kernel_of(self)
                if kernel is not None:
                    native.enroll_alone(self.__class__, kernel, run.table)
            if observe.active:
                report(self, hidden_states, normed, run.backend_for(hidden_states, weight))
            return normed
        why = guards.TRAINING if self.training else guards.reason(hidden_states, weight)
        why = why or guards.eps_reason(eps) or attributes.missing()
        calls_of(self).fallen_back.add(why)
        normed = own(self, hidden_states)
        if observe.active:
            report(self, hidden_states, normed, "original", why)
        return normed

    def traced(self, hidden_states):  # type: ignore[no-untyped-def]
        """Inside `torch.compile`: the op where `keeps_op` and a kernel would run, one that Inductor's pass may join
        where that was asked for, else the original arithmetic."""
        if not is_as_read(original, read):
            return original.forward(self, hidden_states)
        kind = hidden_states.device.type
        joinable = inductor.joins(compiled, kind)
        if not joinable and (reference_only or (automatic and kind != "cuda") or not keeps_op(kind)):
            return own(self, hidden_states)
        weight = weight_of(self)
        if fits(weight) and not self.training and guards.traceable(hidden_states, weight):
            compute = joinable_run if joinable else run
            return compute(hidden_states, weight, eps_of(self))
        return own(self, hidden_states)

    def joinable_run(x, weight, eps):  # type: ignore[no-untyped-def]
        return torch.ops.rmsnorm_patch.joinable_rms_norm.default(x, weight, eps, *arguments)

    def report(self, hidden_states, normed, backend, why=""):  # type: ignore[no-untyped-def]
        observe.report(observe.Event("norm", self, (hidden_states,), normed, None, backend, why))

    return in_the_guise_of(original, forward), belongs_to


register_factory(ROLE, body)
