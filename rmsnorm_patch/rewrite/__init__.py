"""Carry out a plan on a model, and undo it.

What a patched model needs at run time lives in its modules' classes and in one `__dict__` entry
(`patch_state.STATE`), so that copies and pickles are patched models of their own. `revert_model` reads only that: it
undoes a deepcopy or an unpickled model, which never had a journal, just as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn as nn

from ..errors import RMSNormPatchError, UnsupportedModel
from ..locks import Lock
from ..pairs.layout import ModelLayout, layout
from ..patch_state import STATE, derives_from_patched, foreign, role_of, set_class, unpatched_class
from ..scan.plan import Plan
from . import instance_forward
from .journal import Journal
from .report import Report

_unfinished: list[Callable[[], None]] = []
"""For each change that is under way: what makes the model whole where the change cannot go on."""


def _finish() -> None:
    """In a child that was forked meanwhile: a model half patched is unpatched again, one half reverted is reverted."""
    while _unfinished:
        _unfinished.pop()()


LOCK = Lock(mend=_finish)
"""Held while a model is being changed; models may share modules, so one lock for all."""

APPLIED = "applied"
"""Key in the state of the module that was given to `apply`; holds its Report."""


def apply_plan(model: nn.Module, plan: Plan, found: ModelLayout | None = None) -> Report:
    """Patch `model` as `plan` says, wholly or not at all. found: what was read from it for the plan; None reads it."""
    from . import inductor, layers, norms, query_key

    journal = Journal()
    with _changing(journal.rollback):
        try:
            for site in plan.fused_norms():
                norms.install(model.get_submodule(site.path), site, plan.backend, journal, plan.compiled)
            found = layout(model, plan.norms) if found is None else found
            layers.install(plan, found, journal)
            query_key.install(plan, found, journal)
            report = Report(plan, *patched_paths(model), _notes(model), wrapped_paths(model))
            journal.set_state(model, APPLIED, report)
            if plan.compiled == "joined":
                journal.set_state(model, inductor.JOINING, inductor.Joining())
        except BaseException as error:
            journal.rollback()
            if isinstance(error, RMSNormPatchError) or not isinstance(error, Exception):
                raise
            raise UnsupportedModel(
                plan.model_class,
                f"{type(error).__name__}: {error}",
                "models whose modules can be given another class",
                "the model is as it was; leave the module out with exclude=, or report this with the traceback",
            ) from error
        return report


def revert_model(model: nn.Module) -> None:
    """Give every module below `model` its class, bound forwards and `__dict__` back; nothing to undo is no error.

    Interrupted at any point, it can be called again and goes on.
    """
    with _changing(partial(revert_model, model)):
        for module in list(model.modules()):
            patched = type(module)
            if derives_from_patched(patched):
                unpatched = unpatched_class(patched)
                instance_forward.release(module, patched, unpatched)
                set_class(module, unpatched)
            module.__dict__.pop(STATE, None)


@contextmanager
def _changing(finish: Callable[[], None]) -> Iterator[None]:
    """Hold LOCK; `finish` makes the model whole if a child is forked meanwhile."""
    with LOCK:
        _unfinished.append(finish)
        try:
            yield
        finally:
            _unfinished.remove(finish)


def applied_report(model: nn.Module) -> Report | None:
    """The report that `apply` left on `model` itself."""
    return model.__dict__.get(STATE, {}).get(APPLIED)


def patched_paths(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Module paths of the patched norms, of the patched layers and of the patched attentions in `model` now."""
    roles = {path: role_of(module) for path, module in model.named_modules()}
    return (
        tuple(path for path, role in roles.items() if role == "norm"),
        tuple(path for path, role in roles.items() if role == "layer"),
        tuple(path for path, role in roles.items() if role == "attention"),
    )


def wrapped_paths(model: nn.Module) -> tuple[str, ...]:
    """Module paths whose forward somebody else has replaced or wrapped now."""
    return tuple(path for path, module in model.named_modules() if foreign(module) is not None)


def _notes(model: nn.Module) -> tuple[str, ...]:
    if not model.training:
        return ()
    return ("the model is in training mode and uses its original arithmetic; model.eval() brings the kernels in",)
