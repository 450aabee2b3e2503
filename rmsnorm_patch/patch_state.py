"""What tells a patched module from any other, for those who must not change it: its class, its state, its forwards."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch.nn as nn
from torch.nn.modules import module as _module

from .errors import UnsupportedModel

FORWARDS: dict[Any, type] = {}
"""The forward of every patched class -> the class under the patch."""

STATE = "_rmsnorm_patch"
"""The one `__dict__` entry that a patched module may carry (links to other modules, what was displaced); `revert`
removes it."""
SLOTS = ("forward", "_old_forward")
"""Entries of a module's `__dict__` under which libraries keep its forward; accelerate's hooks use the second."""
OFFLOADED = "_original_forward_func"
"""The entry under which compressed-tensors keeps the function that its own wrapper of a forward calls."""


_CALL, _CALL_IMPL = (
    function if function.__module__ == _module.__name__ else None  # replaced by a tool before this import
    for function in (nn.Module._wrapped_call_impl, nn.Module._call_impl)
)


def check_module(model: Any) -> None:
    """Raise UnsupportedModel for what is no module."""
    if not issubclass(type(model), nn.Module):  # a proxy calls itself one, and is replaced in no place
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UnsupportedModel("model", got, "a torch.nn.Module", "pass the model object itself (pipeline.model, say)")


def is_patched(cls: type) -> bool:
    return "_rmsnorm_patch_original" in vars(cls)


def original_class(cls: type) -> type:
    """The class under the patch; `cls` itself where it is not patched."""
    return vars(cls).get("_rmsnorm_patch_original", cls)


class Read(NamedTuple):
    """What a patched class was made for.

    forward: of the class under it. codes: (function, its code) of that one, of what its decorators wrap, and of what it
    calls; a reload puts other code into the same function. named: (name, value) of what it reads of its class. around:
    (globals, name, value) of what it reads of its module.
    """

    forward: Any
    codes: tuple[tuple[FunctionType, CodeType], ...]
    named: tuple[tuple[str, Any], ...] = ()
    around: tuple[tuple[dict[str, Any], str, Any], ...] = ()


def read_of(
    cls: type,
    functions: Iterable[FunctionType] = (),
    names: Iterable[str] = (),
    around: tuple[tuple[dict[str, Any], str, Any], ...] = (),
) -> Read:
    """functions: that the forward of `cls` calls. names: of attributes of `cls` that it reads."""
    forward: Any = getattr(cls, "forward", None)
    chain, wrapped = [], forward
    while isinstance(wrapped, FunctionType) and wrapped not in chain:
        chain.append(wrapped)
        wrapped = getattr(wrapped, "__wrapped__", None)
    codes = tuple((function, function.__code__) for function in dict.fromkeys([*chain, *functions]))
    return Read(forward, codes, tuple((name, getattr(cls, name)) for name in names), around)


def is_as_read(cls: Any, read: Read) -> bool:
    forward, codes, named, around = read
    if cls.forward is not forward:
        return False
    for function, code in codes:
        if function.__code__ is not code:
            return False
    for name, value in named:
        if getattr(cls, name, _ABSENT) is not value:
            return False
    for variables, name, value in around:  # noqa: SIM110 - a generator costs a hot call more
        if variables.get(name, _ABSENT) is not value:
            return False
    return True


_ABSENT = object()


def is_called_by_torch(cls: Any) -> bool:
    """Whether torch's own code calls the forward of modules of `cls`; a tool may replace it for a class or for all."""
    return cls.__call__ is _CALL and cls._call_impl is _CALL_IMPL


def runs_what_was_read(cls: type) -> bool:
    """Whether the class under a patched one, or under a class derived from it, runs what it ran then."""
    patched = next(base for base in cls.__mro__ if is_patched(base))
    return is_as_read(original_class(patched), vars(patched)["_rmsnorm_patch_read"])


def running_now(module: nn.Module, original: type, own: Callable[..., Any]) -> Callable[..., Any]:
    """What a forward of a patched class of `original` runs in its place once `module` is no longer of that class.

    A wrapper, or whoever took the bound method, may hold such a forward beyond `revert`, and beyond another `apply`:
    that of the patched class which the module has now, else `own`, the original's.
    """
    cls = type(module)
    if getattr(cls, "_rmsnorm_patch_original", None) is original:
        own = getattr(cls, "_rmsnorm_patch_forward", own)
    return own


_inside = threading.local()
"""Of a thread: `modules`, those whose class's forward `run_class_forward` runs now."""

REPLACED = "its class's code, or what that reads, has changed since apply"


def outside(module: nn.Module) -> bool:
    """False within `run_class_forward` of this module: what replaced the forward may call that of the patched class."""
    return not any(module is each for each in getattr(_inside, "modules", ()))


def run_class_forward(module: nn.Module, original: type, *args: Any, **named: Any) -> Any:
    """The forward that `original` has now, in place of the one of its patched class, which was made for another."""
    modules: list[nn.Module] = _inside.__dict__.setdefault("modules", [])
    modules.append(module)
    try:
        return class_forward(original)(module, *args, **named)
    finally:
        modules.pop()


def unpatched_forward(function: Any) -> Any:
    """The class's own forward where `function` is a patched class's; else `function`."""
    original = FORWARDS.get(function) if isinstance(function, FunctionType) else None
    return function if original is None else original.forward  # type: ignore[attr-defined]


def role_of(module: nn.Module) -> str | None:
    return vars(type(module)).get("_rmsnorm_patch_role")


def unpatched_class(cls: type) -> type:
    """`original_class`, also for a class that somebody derived from a patched one (FSDP2 and parametrisations do so,
    module by module): then the same class derived from the original."""
    if is_patched(cls) or not derives_from_patched(cls):
        return original_class(cls)
    own = CellType()
    namespace = {
        name: _for_class(value, cls, own)
        for name, value in vars(cls).items()
        if name not in ("__dict__", "__weakref__")
    }
    made = type(cls)(cls.__name__, tuple(unpatched_class(base) for base in cls.__bases__), namespace)
    own.cell_contents = made
    return made


def _for_class(value: Any, cls: type, own: CellType) -> Any:
    """A class attribute of `cls` for the class that `own` will hold: in a method, `super()` reads it from that cell."""
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_for_class(value.__func__, cls, own))
    if isinstance(value, property):
        get, put, drop = (_for_class(f, cls, own) for f in (value.fget, value.fset, value.fdel))
        return property(get, put, drop, value.__doc__)
    if not isinstance(value, FunctionType) or "__class__" not in value.__code__.co_freevars:
        return value
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    closure = tuple(own if name == "__class__" and cell.cell_contents is cls else cell for name, cell in cells)
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    made.__kwdefaults__ = value.__kwdefaults__
    functools.update_wrapper(made, value)
    del made.__wrapped__  # type: ignore[attr-defined]
    return made


def set_class(module: nn.Module, cls: type) -> None:
    """Past a `__setattr__` of the module's own, which may refuse or keep what it is given."""
    object.__setattr__(module, "__class__", cls)


def derives_from_patched(cls: type) -> bool:
    return any(is_patched(base) for base in cls.__mro__)


def foreign(module: nn.Module) -> str | None:
    """Who else replaced this module's forward, in words; None where its class's own code or a known kernel runs."""
    own = class_forward(type(module))
    if "_call_impl" in module.__dict__:
        return "an instance-level _call_impl, and what it computes is unknown"
    for slot in SLOTS:
        method = module.__dict__.get(slot)
        if method is None or (slot == "forward" and "_hf_hook" in module.__dict__):
            continue
        function = unpatched_forward(run_by(module, slot))
        bound_here = isinstance(method, MethodType) and method.__self__ is module
        if not bound_here or not (function is own or is_known_kernel(module, function)):
            return f"an instance-level {slot} ({_name(function or method)}), and what it computes is unknown"
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether compressed-tensors' wrapper stands over the module's forward, as it does once a quantised checkpoint was
    decompressed. It moves tensors to the module's device, where they are on another one, and calls `OFFLOADED`."""
    library, method = sys.modules.get("compressed_tensors.offload.module"), module.__dict__.get("forward")
    if library is None or OFFLOADED not in module.__dict__ or not isinstance(method, MethodType):
        return False
    code = getattr(method.__func__, "__code__", None)
    return method.__self__ is module and code in library.offload_module.__code__.co_consts


def run_by(module: nn.Module, slot: str) -> Any:
    """The function that the method in a slot runs in the end; None where there is none."""
    if slot == "forward" and is_offloaded(module):
        return module.__dict__[OFFLOADED]
    return getattr(module.__dict__.get(slot), "__func__", None)


def class_forward(cls: type) -> Any:
    return cls.forward  # type: ignore[attr-defined]


def is_known_kernel(module: nn.Module, function: Any) -> bool:
    """Whether `function` stands for the class's own arithmetic: a layer that `kernels.kernelize` loaded, or Liger's
    RMSNorm with the settings that Liger itself gives to a class."""
    layers = getattr(sys.modules.get("kernels.layer.layer"), "_CACHED_LAYER", {})
    if any(getattr(layer, "forward", None) is function for layer in list(layers.values())):
        return True
    liger = sys.modules.get("liger_kernel.transformers.rms_norm")
    if liger is None or function is not liger.LigerRMSNorm.forward:
        return False
    # Gemma's (1 + w) with Gemma's rounding, or Llama's: any other combination was somebody's own choice.
    settings = module.__dict__.get("offset"), module.__dict__.get("casting_mode")
    gemma = "gemma" in type(module).__name__.lower()
    return settings == ((1.0, "gemma") if gemma else (0.0, "llama"))


def _name(function: Any) -> str:
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        return f"torch.compile of {_name(compiled)}"
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}.{name}" if module and name else type(function).__name__


def unhooked(norm: nn.Module) -> bool:
    """False where somebody watches or wraps the norm: it is then called as a module."""
    return not (
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or ("forward" in norm.__dict__ and replaced(norm))
    )


def replaced(module: nn.Module) -> bool:
    """Whether another forward than its class's stands in the module's `__dict__`. (accelerate's hooks, taken off again,
    leave the class's own there, and transformers 5.0 after `output_hidden_states=True`; compressed-tensors wraps it.)
    """
    forward = module.__dict__.get("forward")
    bound_here = isinstance(forward, MethodType) and forward.__self__ is module
    return forward is not None and not (bound_here and run_by(module, "forward") is type(module).forward)
