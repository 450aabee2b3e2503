"""Norms whose calls no kernel can take, since modules of another dtype change that of the hidden states.

transformers keeps some modules of a half precision model in float32 (`wo` of T5). What reaches a norm then depends on
the model's code: a residual stream becomes float32, a router's result is cast back. Kernels take a float32 input with a
half precision weight, but not one half type with the other. So a copy of the model without memory runs on the meta
device, and each norm's input is looked at. The model itself is neither called nor changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from ..numerics.spec import SUPPORTED_DTYPES
from .plan import NormSite
from .probe import dtype_name, short, undisturbed
from .subject import Rejected

_HALF = ("float16", "bfloat16")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def expect(model: nn.Module, sites: tuple[NormSite, ...]) -> tuple[tuple[NormSite, ...], tuple[str, ...]]:
    """`sites`, those that will fall back to the original arithmetic with `falls_back`; and notes where that could not
    be found out. Only a model of mixed dtypes is run."""
    sites = tuple(_without_kernels(site) for site in sites)
    half = [site for site in sites if site.action == "fuse" and site.weight_dtype in _HALF]
    other = list(_modules_of_other_dtype(model, {site.weight_dtype for site in half})) if half else []
    if not other:
        return sites, ()
    named = other[0] + (f" and {len(other) - 1} more" if len(other) > 1 else "")
    try:
        seen = _inputs_of(model, half)
    except Rejected as why:
        note = f"{named}: another dtype than the norms' {half[0].weight_dtype}; whether norms fall back is not known"
        return sites, (f"{note} ({why}); status(model) tells once the model has run",)
    return tuple(_judged(site, seen.get(site.path, ()), named) for site in sites), ()


def _without_kernels(site: NormSite) -> NormSite:
    if site.action != "fuse" or site.weight_dtype is None or site.weight_dtype in map(dtype_name, SUPPORTED_DTYPES):
        return site
    return replace(site, falls_back=f"its weight is {site.weight_dtype}, and no kernel takes that")


def _judged(site: NormSite, inputs: Iterable[torch.dtype], other: str) -> NormSite:
    """inputs: dtypes that `site` was called with. A kernel takes a half precision weight with an input of its dtype or
    of float32."""
    names = tuple(sorted({dtype_name(dtype) for dtype in inputs}))
    site = replace(site, inputs=names)
    refused = [name for name in names if name not in (site.weight_dtype, "float32")]
    if not refused:
        return site
    why = f"its input is {' or '.join(refused)} because of {other}, its weight {site.weight_dtype}"
    return replace(site, falls_back=f"{why}; no kernel takes both")


def _modules_of_other_dtype(model: nn.Module, norms: set[str | None]) -> Iterator[str]:
    """Paths of modules with a matrix of none of the dtypes `norms`. (One with a matrix of a byte an element is
    quantised: it computes in another dtype than that of its matrix and that of its scales.)"""
    for path, module in model.named_modules():
        matrices = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
        if any(p.element_size() == 1 for p in matrices):
            continue
        if any(p.is_floating_point() and dtype_name(p.dtype) not in norms for p in matrices):
            yield path


def _inputs_of(model: nn.Module, sites: list[NormSite]) -> dict[str, set[torch.dtype]]:
    """Path -> the dtypes that the norm there is called with. Raises Rejected where the model does not run so."""
    seen: dict[str, set[torch.dtype]] = {site.path: set() for site in sites}

    def watch(made: nn.Module) -> None:
        for path, dtypes in seen.items():
            made.get_submodule(path).register_forward_pre_hook(_recording(dtypes))

    run_without_memory(model, watch)
    return seen


def run_without_memory(model: nn.Module, prepare: Callable[[nn.Module], object]) -> None:
    """Run a copy of `model` on the meta device, after `prepare` has seen that copy. The model itself is neither called
    nor changed. Raises Rejected where it does not run so."""
    if any("forward" in m.__dict__ or any(getattr(m, name) for name in _HOOKS) for m in model.modules()):
        raise Rejected("hooks or forwards of their own stand on its modules")
    with undisturbed():
        try:
            inputs = _inputs(model)
            made = copy.deepcopy(model, _without_memory(model)).eval()
            prepare(made)
            with torch.device("meta"):
                made(**inputs)
        except Rejected:
            raise
        except Exception as error:  # the model's own code without values: anything can happen
            raise Rejected(f"it does not run on the meta device: {short(error)}") from error


def _recording(dtypes: set[torch.dtype]) -> Any:
    def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        dtypes.update(x.dtype for x in arguments[:1] if isinstance(x, torch.Tensor))

    return record


def _inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """transformers' own dummy inputs that the forward takes, without masks, whose values a model may ask for."""
    dummies = getattr(model, "dummy_inputs", None)
    taken = inspect.signature(type(model).forward).parameters
    known = dummies if isinstance(dummies, dict) else {}
    found = {n: v for n, v in known.items() if n in taken and not n.endswith("mask") and isinstance(v, torch.Tensor)}
    if not found:
        raise Rejected("it has no dummy inputs")
    return {name: torch.empty_like(value, device="meta") for name, value in found.items()}


def _without_memory(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: each parameter and buffer is one on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            raise Rejected(f"it has a {type(tensor).__name__}")
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if type(tensor) is nn.Parameter else empty
    return memo
