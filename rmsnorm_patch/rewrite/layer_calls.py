"""What a rewritten layer calls in place of `a + b` and of its first norm: the fused call where the guards hold, else
the original arithmetic.

`in_layer`, `tail` and `entry` are the hot path of an eager decode step. Between the operations of a whole model every
Python function costs several times what a tight loop shows, so they first ask `native`, which makes all checks and
the call in one C function; whatever it is not sure of, and the first call of each kind, goes through the guards here.
Each counts its call (`counts.py`), in place where it is hot. A norm without counts is being reverted by another thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..fused.norm_add.op import bind_norm_add, bind_norm_add_norm
from ..numerics.operands import mixes_dtypes
from ..numerics.spec import SUPPORTED_DTYPES
from ..pairs.source import RENAMING
from ..patch_state import STATE, Read, is_as_read, is_called_by_torch, original_class, replaced, unhooked
from . import guards, native, observe, traced
from .attributes import Attributes
from .counts import CALLS, calls_of
from .handover import CARRIED, LINK, MAX_UNTAKEN, Carry, Link, LinkThrough, put
from .places import edits_result

_is_tracing = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_servable = guards.servable
_DTYPES = frozenset(SUPPORTED_DTYPES)
_getframe = sys._getframe
_CALL_IMPL = nn.Module._call_impl.__code__
_MODULE_FILE = _CALL_IMPL.co_filename
_PASSING = ("transformers.modeling_layers", *RENAMING)
"""Frames of torch's module call and of these modules lie between a layer and what called it: of `modeling_layers`
(`GradientCheckpointingLayer`) around its `__call__` up to transformers 5.17 at least, around its `forward` in 5.23; of
the decorators that rename arguments around its `forward` in 5.24."""


class NormKernel:
    """What the pair helpers need to know of one patched norm class.

    cls: that class. unpatched: the class under it. read: its functions when this was made. original: its forward then.
    fused: the bound op, or None for the reference backend, which is `a + b` and then `original`.
    on_cpu: whether CPU tensors go to `fused` too (a backend that was forced). mixes: whether it adds tensors of two
    dtypes, as Triton does.
    attributes: where a module has its weight and eps; weight_of, eps_of: its methods. plain: the bound op of the norm
    alone.
    norm_add, norm_add_norm: those of an add behind the norm, without and with the norm of the sum; None as `fused`.
    joined: whether a pass of Inductor's joins norms with what stands in front, so that a graph has them apart.
    """

    __slots__ = (
        "attributes",
        "cls",
        "eps_of",
        "fused",
        "joined",
        "mixes",
        "norm_add",
        "norm_add_norm",
        "on_cpu",
        "original",
        "plain",
        "read",
        "spec",
        "unpatched",
        "weight_of",
    )

    def __init__(self, cls: type) -> None:
        key: Any = cls._rmsnorm_patch_key  # type: ignore[attr-defined]
        self.cls = cls
        self.unpatched = original_class(cls)
        self.read: Read = cls._rmsnorm_patch_read  # type: ignore[attr-defined]
        self.original: Callable[..., torch.Tensor] = self.read.forward
        self.spec = key.spec
        self.plain = ops.bind_rms_norm(key.spec, key.backend)
        self.fused = self.norm_add = self.norm_add_norm = None
        if key.backend != "reference":
            self.fused = ops.bind_fused_add_rms_norm(key.spec, key.backend)
            self.norm_add = bind_norm_add(key.spec, key.backend)
            self.norm_add_norm = bind_norm_add_norm(key.spec, key.backend)
        self.joined = key.compiled != "model"
        self.mixes = key.backend != "cuda"
        self.on_cpu = key.backend not in ("auto", "reference")
        self.attributes: Attributes = key.attributes
        self.weight_of, self.eps_of = self.attributes.weight_of, self.attributes.eps_of

    def serves(self, x: torch.Tensor) -> bool:
        """False where the reference backend is what there is for this tensor: `a + b` and then `original`. For what is
        no tensor (the 0 to which a first layer adds) the guards say what becomes of it."""
        return self.fused is not None and (self.on_cpu or getattr(x, "is_cuda", True) is True)

    def adds(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether `fused` takes operands of these dtypes."""
        return not mixes_dtypes(a, b) or (self.mixes and b.dtype in _DTYPES)

    def run(
        self, norm: nn.Module, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None, eps: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(norm(a + b), a + b), or None where a guard says no."""
        if norm.training or type(eps) is not float or not pair_servable(self, a, b, weight):
            return None
        if not self.serves(a):
            total = a + b
            return self.original(norm, total), total
        assert self.fused is not None
        normed, total = self.fused(a, b, weight, eps)
        if self.fused.table is not None:
            native.enroll(norm.__class__, self)
        return normed, total

    def backend(self, x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor) -> str:
        served = self.fused is not None and self.serves(x)
        return self.fused.backend_for(x, weight, residual) if self.fused is not None and served else "reference"


_KERNELS: dict[type, NormKernel] = {}
_watched: tuple[tuple[type, Read, type], ...] = ()
"""(the class under a patched norm class, its functions then, the patched class) of all of them."""


def register(cls: type) -> None:
    """Make the kernel of a patched norm class; called once, when the class is made. (Made at a first call, it would
    change a dictionary inside a traced region: every graph was compiled twice.)"""
    global _watched
    if cls.__call__ is nn.Module.__call__:
        _KERNELS[cls] = NormKernel(cls)
        _watched = tuple((kernel.unpatched, kernel.read, kernel.cls) for kernel in _KERNELS.values())


def kernel_of(norm: nn.Module) -> NormKernel | None:
    """The kernel of a patched norm; None for any other module, and where its class runs something else since."""
    kernel = _KERNELS.get(norm.__class__)
    if kernel is None or not (is_as_read(kernel.unpatched, kernel.read) and is_called_by_torch(kernel.unpatched)):
        return None
    return kernel


def unpatched_reason(norm: nn.Module) -> str:
    """Why `kernel_of` gives None."""
    if type(norm) in _KERNELS:
        return f"the norm's own class, {type(norm).__name__}, runs or reads something else since apply"
    return f"the norm is a {type(norm).__name__} that is not patched"


def watch() -> None:
    """First in a rewritten forward: the C functions, which do not ask, serve no norm whose class runs something else.
    They serve it again once it runs its own, from the first call on that the guards in Python let through."""
    if _is_tracing():
        return
    for unpatched, read, cls in _watched:
        if not (is_as_read(unpatched, read) and is_called_by_torch(unpatched)):
            native.forget(cls)


def in_layer(norm: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(a + b), a + b), in one call where the guards hold."""
    if _is_tracing():
        return traced.in_layer(norm, kernel_of(norm), a, b)
    done = native.in_layer(norm, a, b)
    if done is None:
        return _in_layer(norm, a, b)
    try:  # noqa: SIM105 - suppress() costs more than the count
        norm.__dict__[STATE][CALLS].fused += 1
    except KeyError:
        pass
    normed, total = done
    if observe.active:
        observe.report(observe.Event("in_layer", norm, (a, b), normed, total, "cuda"))
    return normed, total


def tail(layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b; where the layer has a Link and the guards hold, with the next norm's result riding on it."""
    if _is_tracing():
        return a + b
    total: torch.Tensor | None = native.hand_over(layer, a, b)
    if total is None:
        return _tail(layer, a, b)
    carried: Carry = total.__dict__[CARRIED]
    carried.link.given += 1
    if observe.active:
        observe.report(observe.Event("cross_layer", carried.norm, (a, b), carried.normed, total, "cuda"))
    return total


def entry(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """norm(hidden_states), without calling the module where the layer before has left it there."""
    if not _is_tracing():
        carried: Carry | None = hidden_states.__dict__.get(CARRIED) if observe.active else None
        normed: torch.Tensor | None = native.take(norm, hidden_states)
        if normed is not None:
            try:  # noqa: SIM105
                norm.__dict__[STATE][CALLS].handed_over += 1
            except KeyError:
                pass
            if carried is not None:
                backend = carried.backend or carried.kernel.backend(hidden_states, carried.weight, hidden_states)
                observe.report(observe.Event("taken", norm, (hidden_states,), normed, None, backend))
            return normed
    return norm(hidden_states)  # type: ignore[no-any-return]


def _in_layer(norm: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`in_layer` with every check in Python."""
    kernel = kernel_of(norm)
    if kernel is not None and unhooked(norm):
        if not kernel.serves(a):
            return _in_layer_reference(norm, kernel, a, b)
        weight, eps = kernel.weight_of(norm), kernel.eps_of(norm)
        done = kernel.run(norm, a, b, weight, eps)
        if done is not None:
            calls_of(norm).fused += 1
            if observe.active:
                backend = kernel.backend(a, weight, b)
                observe.report(observe.Event("in_layer", norm, (a, b), *done, backend))
            return done
    reason = why_not(norm, kernel, a, b)
    calls_of(norm).apart.add(reason)
    total = a + b
    normed = norm(total)
    if observe.active:
        observe.report(observe.Event("in_layer", norm, (a, b), normed, total, "original", reason))
    return normed, total


def _in_layer_reference(
    norm: nn.Module, kernel: NormKernel, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = a + b
    normed = kernel.original(norm, total)
    calls_of(norm).reference += 1
    if observe.active:
        observe.report(observe.Event("in_layer", norm, (a, b), normed, total, "reference"))
    return normed, total


def _tail(layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`tail` with every check in Python."""
    link, norm = link_of(layer)
    if link is None or norm is None:
        return a + b
    kept = why_kept(layer, link, norm, a, b)
    return hand_over(link, norm, kept, a, b)


def link_of(layer: nn.Module) -> tuple[Link | None, nn.Module | None]:
    """The layer's link, and the norm at its other end while there is one."""
    state = layer.__dict__.get(STATE)
    link: Link | None = None if state is None else state.get(LINK)
    return link, None if link is None else link.norm()


def why_kept(layer: nn.Module, link: Link, norm: nn.Module, a: torch.Tensor, b: torch.Tensor) -> str:
    """Why nothing is handed over now, or "". Called by what the helper calls that the layer's forward calls."""
    kernel = kernel_of(norm)
    if kernel is None or _is_grad_enabled() or not unhooked(norm):
        return "a gradient may be wanted" if _is_grad_enabled() else why_not(norm, kernel, a, b)
    if link.untaken >= MAX_UNTAKEN and link.rests(getattr(a, "shape", None)):
        return f"the last {link.untaken} hand-overs were not taken; it is tried again from time to time"
    if not _undisturbed(layer, link):
        return "a module was hooked, wrapped, moved or put between the layer and the norm since apply"
    if not _called_by_loop(link):
        return "the layer was not called by the loop that was read"
    if not link.passive and torch.is_inference_mode_enabled():
        return "code between the layer and the norm may edit the sum, and inference mode counts no edits"
    return ""


def hand_over(link: Link, norm: nn.Module, kept: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, with the result of `norm` riding on it unless it is `kept` for that reason."""
    kernel, done = kernel_of(norm), None
    if kernel is not None and not kept:
        weight, eps = kernel.weight_of(norm), kernel.eps_of(norm)
        done = kernel.run(norm, a, b, weight, eps)
    if kernel is None or done is None:
        reason = kept or why_not(norm, kernel, a, b)
        calls_of(norm).apart.add(reason)
        total = a + b
        if observe.active:
            observe.report(observe.Event("kept", norm, (a, b), total, total, "original", reason))
        return total
    normed, total = done
    backend = ""
    if observe.active:
        backend = kernel.backend(a, weight, b)
        observe.report(observe.Event("cross_layer", norm, (a, b), normed, total, backend))
    put(normed, total, norm, weight, eps, kernel, link, backend)
    return total


def _called_by_loop(link: Link) -> bool:
    """Whether the layer that is running now was called, as a module, by the loop that was read.

    The walk up the stack is done once for a link. Later calls look at two frames: the loop's, as far up as it was, and
    the one that called the layer's forward (past the wrappers that stand around it in the class), which tells a
    wrapper that calls `layer.forward` itself. Of a module in between `LinkThrough.loop` has seen that it runs what it
    ran when the stack was walked.
    """
    loop = link.loop
    through = [*(link.passages.codes or ())] if isinstance(link, LinkThrough) else []
    tail_frame = 3  # past this function, `why_kept` and `_tail`
    try:
        if (
            _getframe(tail_frame + link.depth).f_code is loop
            and _getframe(tail_frame + link.caller).f_code is _CALL_IMPL
        ):
            return True
    except ValueError:  # called from less deep than before
        pass
    depth = caller = 2  # past `tail` and the layer's own forward
    frame = _getframe(tail_frame + depth)
    passing = [getattr(sys.modules.get(module), "__file__", None) for module in _PASSING]
    while frame.f_code is not loop or through:
        in_passing = frame.f_code.co_filename in passing
        if through and frame.f_code is through[0]:
            through.pop(0)
        elif not (in_passing or frame.f_code.co_filename == _MODULE_FILE):
            return False
        if frame.f_back is None:
            return False
        caller += in_passing and caller == depth
        frame, depth = frame.f_back, depth + 1
    link.depth, link.caller = depth, caller
    return True


def pair_servable(kernel: NormKernel, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether a kernel may add `a` and `b` and norm the sum."""
    return (
        _servable(a, weight)
        and type(b) is torch.Tensor
        and kernel.adds(a, b)
        and a.shape == b.shape
        and a.get_device() == b.get_device()
        and not b.is_meta  # as a CPU tensor, it has device index -1
        and b.layout is torch.strided
        and kernel.attributes.fits(weight)
        and not (b.requires_grad and _is_grad_enabled())
    )


def why_not(norm: nn.Module, kernel: NormKernel | None, a: torch.Tensor, b: torch.Tensor) -> str:
    """Why an add and its norm are not one call here, in words."""
    if kernel is None:
        return unpatched_reason(norm)
    if not unhooked(norm):
        return "the norm has hooks or a forward of its own: it is called as a module"
    if norm.training:
        return guards.TRAINING
    watched = guards.reason(a, None) or guards.reason(b, None)
    if watched:
        return watched
    if type(a) is not type(b) or not kernel.adds(a, b) or a.shape != b.shape or a.device != b.device:
        sides = (f"{type(x).__name__} {x.dtype} {tuple(x.shape)} on {x.device}" for x in (a, b))
        return f"the operands differ: {', '.join(sides)}"
    weight = kernel.weight_of(norm)
    if not kernel.attributes.fits(weight):
        return kernel.attributes.missing()
    return guards.eps_reason(kernel.eps_of(norm)) or guards.reason(a, weight)


def _undisturbed(layer: nn.Module, link: Link) -> bool:
    """True where no foreign code can see the sum between the add and the norm that reads it."""
    if edits_result(layer) or replaced(layer) or not link.places.unchanged():
        return False
    if isinstance(link, LinkThrough) and not link.passages.unchanged():
        return False
    if link.receiver is None:
        return True
    receiver = link.receiver()
    return receiver is not None and not receiver._forward_pre_hooks and not replaced(receiver)
