"""Where a patched model takes hold of `torch.compile`: one pass among those that Inductor offers to users.

`apply(model, compiled="joined")` installs it, the tracing of a model that was patched so makes sure of it, and the last
such model that is reverted or dropped takes it away. It changes nothing but norms of these models, so that graphs of
others, and passes that somebody put there before or after, are as they were.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import fx

from .. import ops
from ..errors import UnsupportedInput
from ..fused.linear_norm import captured
from ..ops import sources
from ..scan.plan import Compiled

FORMS: tuple[Compiled, ...] = get_args(Compiled)
JOINING = "joining"
"""Key in the state of the module that was given to `apply`; holds its Joining."""
_PLACE = "joint_custom_pre_pass"
"""Of `torch._inductor.config`: the first pass over the graph of aten ops, ahead of all of Inductor's own."""


def check(compiled: Any, backend: str) -> None:
    """Raise UnsupportedInput for a form that is none, and for "joined" where no kernel would be."""
    if compiled not in FORMS:
        raise UnsupportedInput("compiled", repr(compiled), ", ".join(map(repr, FORMS)), "pass one of these")
    if compiled == "joined" and backend in ("reference", "triton"):
        supported = "backend='auto' or 'cuda': the kernel that adds up a product's parts is a CUDA kernel"
        raise UnsupportedInput("compiled", f"'joined' with backend={backend!r}", supported, "pass backend='auto'")
    if compiled == "joined" and not hasattr(_config(), _PLACE):
        got = f"'joined' with torch {torch.__version__}, whose Inductor has no {_PLACE}"
        raise UnsupportedInput("compiled", got, "torch 2.9 to 2.14", "install one of these, or pass compiled='model'")


def joins(compiled: str, device_type: str) -> bool:
    """Whether a norm of this class is joinable in the graph that is being traced. Dynamo runs this once for a graph, in
    the thread that compiles: what Inductor is configured with may hold in one thread alone. `install` tells Dynamo so:
    a decorator would import it with this package."""
    if compiled != "joined" or ops.compile_form(device_type) != "op" or torch.compiler.is_exporting():
        return False
    install()
    return True


def install() -> None:
    """Put the pass behind those that stand there, unless it does so already."""
    torch.compiler.assume_constant_result(joins)
    config = _config()
    found = getattr(config, _PLACE)
    if not any(isinstance(each, _our_pass()) for each in _passes(found)):
        setattr(config, _PLACE, _our_pass()(found))


def uninstall() -> None:
    """Give the place back, unless somebody has put another pass there since: ours does nothing without such a model."""
    config = _config()
    found = getattr(config, _PLACE, None)
    if isinstance(found, _our_pass()):
        setattr(config, _PLACE, found.before)


_LIVE: set[int] = set()
_numbers = itertools.count()


class Joining:
    """Lives as long as a model is patched with "joined"; a copy of the model has one of its own."""

    def __init__(self) -> None:
        number = next(_numbers)
        _LIVE.add(number)  # first: the last of the others may be dropped at any point, by a collection right here
        gone = weakref.finalize(self, _gone, number)
        gone.atexit = False
        try:
            install()
        except BaseException:
            gone()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Joining:
        return Joining()

    def __reduce__(self) -> tuple[Any, ...]:
        return Joining, ()


def _gone(number: int) -> None:
    """A finaliser: no lock, since whoever drops a model may hold one."""
    _LIVE.discard(number)
    if not _LIVE:
        uninstall()
        if _LIVE:  # another thread has patched a model meanwhile, and may have seen the pass still there
            install()


def _config() -> Any:
    from torch._inductor import config

    return config


def _passes(found: Any) -> tuple[Any, ...]:
    """Of what the place holds: none, one, or, in newer versions of torch, several."""
    if isinstance(found, Iterable) and not callable(found):
        return tuple(found)
    return () if found is None else (found,)


_CLASS: list[type] = []


def _our_pass() -> Any:
    """The class of the pass, made when Inductor is first needed: importing it is no small thing."""
    if _CLASS:
        return _CLASS[0]
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class JoinNorms(CustomGraphPass):
        def __init__(self, before: Any) -> None:
            self.before = before

        def __call__(self, graph: fx.Graph) -> None:
            for each in _passes(self.before):
                each(graph)
            try:
                captured.settle(graph, bool(_config().triton.cudagraphs))
            except Exception as error:  # each step leaves a right graph, in which a norm that is left is an op
                why = f"{type(error).__name__}: {error}"  # not the error: it holds the graph's model
                captured.logger.warning("rmsnorm_patch: norms of a graph stay apart: %s", why)

        def uuid(self) -> Any:
            """A part of the key under which Inductor keeps what it compiled; None, keep nothing, where a pass that
            stood here has none."""
            others = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in _passes(self.before)]
            if None in others:
                return None
            return "rmsnorm_patch", sources.digest(), *others

    _CLASS.append(JoinNorms)
    return JoinNorms
