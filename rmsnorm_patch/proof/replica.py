"""A second object graph over the same weights: what a proof hooks, reverts and feeds, so that the served model is not.

Every module is made anew, of the same class, with the same parameters and with what hangs on it: hooks, bound forwards,
links between layers. What refers to a module of the model (a bound method, a closure, a hook's state, a weak reference)
refers to its twin. Other objects are shared, as two requests share them. A deep copy would copy the weights, fail on
locks and process groups, and leave closures with the model that is being served.

Buffers are copied, since a forward may write them (a model's own cache, say), but for those of more than SHARED_BUFFER
bytes: packed weights.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn

from .. import rewrite
from ..errors import PatchConflict, UnsupportedModel
from ..patch_state import is_patched
from ..rewrite.counts import Calls
from ..rewrite.registries import DEFINED_IN_PYTHON

SHARED_BUFFER = 16 << 20
_DEPTH = 12
"""How many objects away from a module a reference to another one is looked for."""
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_IMMUTABLE = (tuple, frozenset)
_LEAVES = frozenset(
    (str, bytes, int, float, bool, type(None), type, torch.Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size)
)
_INTERNALS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Where every module keeps its parameters, buffers, sub-modules and hooks."""
_COMPILED = "_torchdynamo_orig_callable"
"""torch.compile leaves what it compiled under this name."""


def replica(model: nn.Module, patched: bool = True, tensors: Mapping[int, torch.Tensor] | None = None) -> nn.Module:
    """`model` again, in evaluation mode, over the same parameters; `patched` False: with the patch undone.

    Compiled modules and forwards are the code that was compiled: what a compiler makes of it reports no calls, and is
    not this package's arithmetic to prove. tensors: id of a parameter or buffer -> what stands in its place.
    Raises UnsupportedModel where a module cannot be made anew, PatchConflict where something stays patched.
    """
    with rewrite.LOCK:
        copy_of = _Mirror(model, tensors or {}).of(model)
    for module in copy_of.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["training"] = False
    if not patched:
        rewrite.revert_model(copy_of)
        left = [path for path, module in copy_of.named_modules() if is_patched(type(module))]
        if left:
            raise PatchConflict(left[0], "a class that revert left patched", "models that revert", "report this")
    return copy_of


def private_buffers(model: nn.Module) -> Iterable[torch.Tensor]:
    """Those that a replica has for itself."""
    return (b for b in model.buffers() if b.numel() * b.element_size() <= SHARED_BUFFER)


class _Mirror:
    """Twins of one model's objects: `of` gives the twin, or the object itself where nothing of it is the model's."""

    def __init__(self, model: nn.Module, tensors: Mapping[int, torch.Tensor]) -> None:
        modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._twins: dict[int, Any] = {id(m): _empty(m) for m in modules}
        self._kept: list[Any] = list(modules)  # ids are those of living objects
        for buffer in private_buffers(model):
            if id(buffer) not in tensors and buffer.device.type != "meta" and type(buffer) is torch.Tensor:
                self._twins[id(buffer)] = buffer.detach().clone()
        self._twins.update(tensors)
        self._reaching = _reaching(modules)
        for module in modules:
            self._fill(module)

    def _fill(self, module: nn.Module) -> None:
        twin, compiled = self._twins[id(module)].__dict__, _is_compiled(module)
        for name, value in list(module.__dict__.items()):
            if not compiled or name != "dynamo_ctx":
                twin[name] = self.of(value)
        if "_compiled_call_impl" in twin:
            twin["_compiled_call_impl"] = None
        if compiled:
            twin["forward"] = twin["_modules"]["_orig_mod"].__call__

    def of(self, value: Any) -> Any:
        known = self._twins.get(id(value))
        if known is not None:
            return known
        kind = type(value)
        if kind in _CONTAINERS:
            return self._container(value)
        if kind is Calls:  # a proof's calls are not the model's
            return self._remember(value, Calls())
        if id(value) not in self._reaching:
            return value
        return self._made(value, kind)

    def _remember(self, value: Any, twin: Any) -> Any:
        self._twins[id(value)] = twin
        self._kept.append(value)
        return twin

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if kind is defaultdict:
            twin: Any = defaultdict(self.of(value.default_factory))
        else:
            twin = deque(maxlen=value.maxlen) if kind is deque else kind()
        self._remember(value, twin)
        if isinstance(value, dict):
            for key, item in list(value.items()):
                twin[self.of(key)] = self.of(item)
        else:
            (twin.update if isinstance(value, set) else twin.extend)(self.of(item) for item in list(value))
        return twin

    def _made(self, value: Any, kind: type) -> Any:
        if kind is types.MethodType:
            return self._remember(value, types.MethodType(self.of(value.__func__), self.of(value.__self__)))
        if kind is types.FunctionType:
            return self._function(value)
        if kind is functools.partial:
            return self._partial(value)
        if kind is weakref.ref:
            target = value()
            return value if target is None else self._remember(value, weakref.ref(self.of(target)))
        if isinstance(value, _IMMUTABLE):
            items = [self.of(item) for item in value]
            return self._remember(value, kind._make(items) if hasattr(kind, "_make") else kind(items))
        return self._object(value, kind)

    def _function(self, function: types.FunctionType) -> Any:
        compiled = function.__dict__.get(_COMPILED)
        if compiled is not None:
            return self._remember(function, self.of(compiled))
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        names = {name: self.of(item) for name, item in _globals(function)}
        scope = {**function.__globals__, **names} if names else function.__globals__
        function_copy = types.FunctionType(function.__code__, scope, function.__name__, None, cells or None)
        self._remember(function, function_copy)
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            for content in _contents(old):
                cell.cell_contents = self.of(content)
        function_copy.__defaults__ = self.of(function.__defaults__)
        function_copy.__kwdefaults__ = self.of(function.__kwdefaults__)
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(function_copy, name, getattr(function, name))
        function_copy.__dict__.update({name: self.of(item) for name, item in function.__dict__.items()})
        return function_copy

    def _partial(self, value: functools.partial[Any]) -> Any:
        keywords = {name: self.of(item) for name, item in value.keywords.items()}
        partial = functools.partial(self.of(value.func), *map(self.of, value.args), **keywords)
        self._remember(value, partial)
        partial.__dict__.update({name: self.of(item) for name, item in value.__dict__.items()})
        return partial

    def _object(self, value: Any, kind: type) -> Any:
        if isinstance(value, dict):  # a subclass: what it does on insertion has happened
            mirrored = self._remember(value, dict.__new__(kind))
            for key, item in list(value.items()):
                dict.__setitem__(mirrored, self.of(key), self.of(item))
        else:
            mirrored = self._remember(value, object.__new__(kind))
        for name, item in _attributes(value):
            object.__setattr__(mirrored, name, self.of(item))
        return mirrored


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` gave this; its module is imported by nothing else."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _empty(module: nn.Module) -> nn.Module:
    try:
        return object.__new__(type(module))
    except TypeError as error:
        raise UnsupportedModel(
            type(module).__name__,
            f"a module that cannot be made anew ({error})",
            "modules written in Python",
            "verify the part of the model that holds the norms",
        ) from error


def _reaching(modules: list[nn.Module]) -> set[int]:
    """Ids of the objects, at most _DEPTH away from a module, that refer to one of `modules` in some way, or to what
    one keeps its parameters and hooks in: a hook's handle does, and must take the twin's hook off."""
    users: dict[int, set[int]] = {}
    internals = {id(module.__dict__[name]) for module in modules for name in _INTERNALS if name in module.__dict__}
    targets = {id(module) for module in modules} | internals
    kept: list[Any] = []
    seen: set[int] = set(targets)
    front: list[Any] = [module.__dict__ for module in modules]
    for _ in range(_DEPTH):
        following = []
        for value in front:
            kept.append(value)
            for child in _children(value):
                kind = type(child)
                if kind in _LEAVES or (kind in _CONTAINERS and not child):
                    continue
                users.setdefault(id(child), set()).add(id(value))
                if id(child) not in seen:
                    seen.add(id(child))
                    following.append(child)
        front = following
    kept.extend(front)
    reaching = internals
    pending = list(targets)
    while pending:
        for user in users.get(pending.pop(), ()):
            if user not in reaching:
                reaching.add(user)
                pending.append(user)
    return reaching


def _children(value: Any) -> list[Any]:
    """The objects that `value` holds, of the kinds that a mirror can make anew."""
    kind = type(value)
    if isinstance(value, dict):
        children = [*list(value.keys()), *list(value.values())]
        return children if kind in _CONTAINERS else [*children, *(item for _, item in _attributes(value))]
    if kind in _CONTAINERS or isinstance(value, _IMMUTABLE):
        return list(value)
    if kind is types.MethodType:
        return [value.__self__, value.__func__]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values(), *value.__dict__.values()]
    if kind is types.FunctionType:
        held = [content for cell in value.__closure__ or () for content in _contents(cell)]
        held += [item for _, item in _globals(value)]
        return [*held, value.__defaults__, value.__kwdefaults__, *value.__dict__.values()]
    if kind is weakref.ref:
        target = value()
        return [] if target is None else [target]
    return [item for _, item in _attributes(value)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Attributes of an object of a plain Python class; none of what has a life of its own (C state, a finaliser)."""
    kind = type(value)
    if isinstance(value, (torch.Tensor, type, types.ModuleType)) or hasattr(kind, "__del__"):
        return []
    if kind.__new__ not in (object.__new__, dict.__new__) or not kind.__flags__ & DEFINED_IN_PYTHON:
        return []
    attributes = list(getattr(value, "__dict__", {}).items())
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                attributes.append((name, getattr(value, name)))
    return attributes


def _globals(function: types.FunctionType) -> list[tuple[str, Any]]:
    """The modules and bound calls among the global names that `function` reads, as a notebook's wrappers do."""
    read = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
    kinds = (types.MethodType, functools.partial, nn.Module)
    return [(name, item) for name, item in read if isinstance(item, kinds)]


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # an empty cell
        return ()
