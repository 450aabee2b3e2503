"""What of a module the scan looks at, and a throwaway twin to run: the module itself is never called or written to.

A twin is an empty instance of the module's own class with the plain attributes that the class's code names, and a
weight of the scan's choosing. So the scan works on meta, offloaded, quantised and sharded weights alike, and under
accelerate's or anybody else's hooks.
"""

from __future__ import annotations

import copy
import dis
import inspect
import math
import types
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn

from ..patch_state import SLOTS, foreign, is_offloaded, run_by, unpatched_class

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_BY_REFERENCE = (types.FunctionType, types.BuiltinFunctionType, type)
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) | {"forward"}


class Rejected(Exception):
    """The module is not an RMSNorm that can be served; the message says why, in words for the plan's table."""


@dataclass(frozen=True)
class Subject:
    """One module, reduced to what decides how it computes.

    weight_attribute: the one 1-D parameter or buffer, or None. columns: lengths of the last dimension to probe with,
        best guess first. attributes: what a twin carries. codes: code objects that forward can reach. note: what
        stands over the class's own forward on this instance. gated: its forward takes a gate beside its input.
    """

    cls: type[nn.Module]
    weight_attribute: str | None
    weight_is_parameter: bool
    columns: tuple[int, ...]
    attributes: dict[str, Any]
    codes: tuple[types.CodeType, ...]
    note: str
    gated: bool = False

    @property
    def key(self) -> Hashable | None:
        """Equal keys compute alike; None where an attribute is not plain data and nothing can be said."""
        if not all(is_plain(value) for value in self.attributes.values()):
            return None
        named = {name for code in self.codes for name in code.co_names}
        inherited = {name: getattr(self.cls, name, None) for name in named}
        read = {name: value for name, value in inherited.items() if is_plain(value)} | self.attributes
        values = tuple((name, type(value), value) for name, value in sorted(read.items()))
        return self.weight_attribute, self.weight_is_parameter, self.columns, values, self.codes, self.gated

    def twin(self, weight: torch.Tensor | None) -> nn.Module:
        instance = object.__new__(self.cls)  # FSDP's classes override __new__ to build another
        nn.Module.__init__(instance)
        for name, value in self.attributes.items():
            instance.__dict__[name] = value if is_plain(value) else _copied(name, value)
        if self.weight_attribute is not None and weight is not None:
            if self.weight_is_parameter:
                instance._parameters[self.weight_attribute] = nn.Parameter(weight, requires_grad=False)
            else:
                instance._buffers[self.weight_attribute] = weight
        return instance.eval()


_unpatched = lru_cache(maxsize=64)(unpatched_class)  # a class derived from a patched one is derived anew at each call


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without our patch."""
    cls: Any = type(module)
    return _unpatched(cls)


def examine(module: nn.Module, gated: bool = False) -> Subject:
    """The `Subject` of a module whose structure is a norm's; raises `Rejected` otherwise. gated: its forward takes two
    tensors."""
    cls = own_class(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise Rejected("it is compiled by TorchScript, so its code cannot be run on probes")
    if cls.__call__ is not nn.Module.__call__:
        raise Rejected(f"{cls.__name__} overrides __call__")
    children = [name for name, child in module._modules.items() if child is not None]
    if children:
        raise Rejected(f"it has sub-modules ({', '.join(children[:4])})")
    weight_attribute, weight = _weight_of(module)
    codes = reachable_codes(cls)
    if not gated:
        _check_signature(cls)
    names = _names_in(codes)
    attributes = {
        name: value
        for name, value in module.__dict__.items()
        if name in names and name not in _MODULE_INTERNALS and name != weight_attribute
    }
    # Registered but absent (`bias=None`): the code may look at them.
    absent = (*module._parameters.items(), *module._buffers.items())
    attributes.update((name, None) for name, value in absent if value is None)
    for name, value in attributes.items():
        if not is_plain(value) and _holds_tensors(value, depth=4):
            raise Rejected(f"its forward reads {name!r}, which holds tensors or modules")
    return Subject(
        cls=cls,
        weight_attribute=weight_attribute,
        weight_is_parameter=weight_attribute in module._parameters,
        columns=(weight.shape[0],) if weight is not None else _widths_named_by(module),
        attributes=attributes,
        codes=codes,
        note=_instance_forward_note(module),
        gated=gated,
    )


def _weight_of(module: nn.Module) -> tuple[str | None, torch.Tensor | None]:
    tensors = {name: t for store in (module._parameters, module._buffers) for name, t in store.items() if t is not None}
    biases = [name for name in tensors if "bias" in name.lower() or name == "beta"]
    if biases:
        raise Rejected(f"it has a bias ({biases[0]})")
    if len(tensors) > 1:
        raise Rejected(f"it has more than one tensor ({', '.join(tensors)}); an RMSNorm has one weight or none")
    if not tensors:
        return None, None
    [(name, tensor)] = tensors.items()
    if nn.parameter.is_lazy(tensor):
        raise Rejected(f"its {name} is not initialised yet")
    if tensor.dim() != 1:
        raise Rejected(f"its {name} has {tensor.dim()} dimensions ({list(tensor.shape)}); an RMSNorm's weight has 1")
    if tensor.numel() == 0:
        raise Rejected(f"its {name} is empty in this process (a ZeRO-3 shard?)")
    return name, tensor


def _widths_named_by(module: nn.Module) -> tuple[int, ...]:
    """Widths to try for a weightless norm, which fixes none: first a common multiple of its integers (a width that no
    attribute can mean, and that every group divides), then those integers, then a width of our own."""
    widths: list[int] = []
    for value in module.__dict__.values():
        shape = (value,) if isinstance(value, int) else value
        if isinstance(shape, tuple) and shape and all(type(size) is int for size in shape):
            if len(shape) > 1:
                raise Rejected(f"it normalises over {len(shape)} dimensions ({shape}); an RMSNorm takes the last one")
            if 1 < shape[0] <= 1 << 16:
                widths.append(shape[0])
    common = 2 * math.lcm(*widths)
    return (*([common] if widths and common <= 1 << 14 else []), *sorted(set(widths), reverse=True), 64)


def _check_signature(cls: type[nn.Module]) -> None:
    """forward takes exactly one tensor; further arguments have defaults and are never read."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        raise Rejected("its forward has no signature that Python can read") from None
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not required:
        raise Rejected("its forward does not name the one tensor that it takes")
    if len(required) > 1:
        raise Rejected(f"its forward needs further arguments ({', '.join(required[1:])}), as a gated norm does")
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None:
        raise Rejected("its forward is no Python function")
    read = [p.name for p in parameters if p.name != required[0] and _reads(code, p.name)]
    if read:
        raise Rejected(f"its forward takes an optional argument that changes the result ({', '.join(read)})")


def _reads(code: types.CodeType, name: str) -> bool:
    for instruction in dis.get_instructions(code):
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if name in names and instruction.opname.startswith("LOAD"):
            return True
    return any(_reads(const, name) for const in code.co_consts if isinstance(const, types.CodeType))


def reachable_codes(cls: type[nn.Module]) -> tuple[types.CodeType, ...]:
    """Code of `forward` and of every method or property of the class that it names, directly or through another."""
    methods: dict[str, list[types.CodeType]] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            methods.setdefault(name, []).extend(_codes_of(value))
    if not methods.get("forward"):
        raise Rejected(f"{cls.__name__} has no forward in Python")
    codes: dict[types.CodeType, None] = {}
    pending = list(methods["forward"])
    while pending:
        code = pending.pop(0)
        if code in codes:
            continue
        codes[code] = None
        pending.extend(const for const in code.co_consts if isinstance(const, types.CodeType))
        for name in code.co_names:
            pending.extend(methods.get(name, ()))
    return tuple(codes)


def _codes_of(value: object) -> Iterator[types.CodeType]:
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if not callable(value):
        return
    while value is not None:
        code = getattr(value, "__code__", None)
        if isinstance(code, types.CodeType):
            yield code
        value = getattr(value, "__wrapped__", None)


def attributes_named_by(cls: type[nn.Module]) -> frozenset[str]:
    """What the forward of `cls` may read of a module, by name."""
    return frozenset(_names_in(reachable_codes(cls))) - _MODULE_INTERNALS


def reached_by(
    cls: type[nn.Module], named: frozenset[str | None]
) -> tuple[list[types.FunctionType], list[str], tuple[tuple[dict[str, Any], str, Any], ...]]:
    """What decides how the forward of `cls` computes, beside the module: the functions that it calls, the attributes of
    `cls` that it reads, of those `named`, and what it reads of Python modules other than torch's: (variables of a
    module, name, value)."""
    attributes: dict[str, Any] = {}
    for name in sorted(name for name in named if name is not None):
        attribute = inspect.getattr_static(cls, name, _ABSENT)
        of_any_module = attribute is inspect.getattr_static(nn.Module, name, _ABSENT)
        if not of_any_module and (is_plain(attribute) or isinstance(attribute, _METHODS)):
            attributes[name] = attribute
    functions: dict[types.FunctionType, None] = {}
    around: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    pending = [cls.forward, *attributes.values()]
    while pending:
        function = _function_of(pending.pop(0))
        if function is None or function in functions or _is_torchs(function.__module__):
            continue
        functions[function] = None
        names, variables = _globals_in(function.__code__), function.__globals__
        libraries = [vars(each) for name in names if isinstance(each := variables.get(name), types.ModuleType)]
        for read in (variables, *(each for each in libraries if not _is_torchs(each.get("__name__")))):
            for name in sorted(names & read.keys()):
                if not isinstance(read[name], types.ModuleType):
                    around[id(read), name] = read, name, read[name]
                    pending.append(read[name])
    return list(functions), list(attributes), tuple(around.values())


_ABSENT = object()
_METHODS = (types.FunctionType, property, staticmethod)


def _function_of(value: Any) -> types.FunctionType | None:
    """The function under a property or decorators."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else None
    return value if isinstance(value, types.FunctionType) else None


def _is_torchs(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "torch"


def _globals_in(code: types.CodeType) -> set[str]:
    """Names that `code` may read of its Python module, or of another one there."""
    nested = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_globals_in, nested))


def _names_in(codes: tuple[types.CodeType, ...]) -> set[str]:
    names: set[str] = set()
    for code in codes:
        names.update(code.co_names)
        names.update(const for const in code.co_consts if isinstance(const, str))  # getattr(self, "eps")
    return names


def uncompiled_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The class's own forward, from under `torch.compile` (which would compile each probe)."""
    forward = cls.forward
    return getattr(forward, "_torchdynamo_orig_callable", forward)


def _instance_forward_note(module: nn.Module) -> str:
    """Says what stands over the class's own forward; `Rejected` where nobody known put it there."""
    obstacle = foreign(module)
    if obstacle is not None:
        raise Rejected(f"it has {obstacle}; delete it from the module to have the class's own forward considered")
    notes = ["under accelerate's hooks"] if "_hf_hook" in module.__dict__ else []
    notes += ["under compressed-tensors' wrapper"] if is_offloaded(module) else []
    for slot in SLOTS:
        function = run_by(module, slot)
        if function is not None and function is not type(module).forward:
            name = f"{function.__module__}.{function.__qualname__}"
            notes.append(f"its class's own forward was read from under the instance-level {name}")
    return ", ".join(notes)


def is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(is_plain(item) for item in value))


def _copied(name: str, value: object) -> object:
    if isinstance(value, _BY_REFERENCE):
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:
        raise Rejected(f"its forward reads {name!r}, which cannot be copied ({type(error).__name__})") from error


def _holds_tensors(value: object, depth: int) -> bool:
    if isinstance(value, (torch.Tensor, nn.Module)):
        return True
    if depth == 0 or isinstance(value, (*_PLAIN, *_BY_REFERENCE)):
        return False
    items = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        items += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        items += list(value)
    return any(_holds_tensors(item, depth - 1) for item in items)
