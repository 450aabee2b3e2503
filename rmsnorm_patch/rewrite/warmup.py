"""warmup: compile what a model's norms will launch, before the first request or a CUDA graph's capture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import ops
from ..fused.query_key_norm.kernel import bind_rms_norm_pair
from ..numerics.contract import FUNCTIONAL, RMS_NORM
from ..ops import dispatch
from ..scan.plan import NormSite, Plan, QueryKeySite


@dataclass(frozen=True)
class Prepared:
    """One op made ready: rows of `n` columns of `dtype`, with a weight of `weight_dtype` (None: weightless)."""

    op: str
    n: int
    dtype: str
    weight_dtype: str | None
    backend: str
    device: str


def prepare(model: nn.Module, plan: Plan, dtype: torch.dtype | None) -> tuple[Prepared, ...]:
    """Every op that `plan` will call on `model` where it is now, once; nothing for tensors on the CPU."""
    done: dict[Prepared, None] = {}
    looked_at, dtype = dtype is None, _common_dtype(model) if dtype is None else dtype
    paired = {pair.norm for pair in plan.fused_pairs()}
    for site in plan.fused_norms():
        names = FUNCTIONAL if site.path in paired else (RMS_NORM.name,)
        inputs = [getattr(torch, name) for name in site.inputs] if looked_at else []
        for op in names:
            for each in inputs or [dtype]:
                made = _prepare_site(model.get_submodule(site.path), site, op, plan, each, done)
                if made is not None:
                    done[made] = None
    for both in plan.fused_query_key():
        made = _prepare_two(model, both, plan, dtype)
        if made is not None:
            done[made] = None
    return tuple(done)


def _prepare_two(model: nn.Module, both: QueryKeySite, plan: Plan, dtype: torch.dtype) -> Prepared | None:
    """The kernel that norms a query and its key; None where none will."""
    site = next(site for site in plan.norms if site.path == both.query)
    assert site.spec is not None
    weight = None if site.weight_attribute is None else getattr(model.get_submodule(site.path), site.weight_attribute)
    if weight is None or weight.is_meta:
        return None
    x = torch.empty(1, weight.numel(), dtype=dtype, device=weight.device)
    if ops.bind(RMS_NORM.name, site.spec, plan.backend).backend_for(x, weight) != "cuda":
        return None
    pair = bind_rms_norm_pair(site.spec)
    if pair.why_apart(x, x, weight, weight):
        return None
    pair.prepare(x, weight)
    return Prepared(pair.op, weight.numel(), _name(dtype), _name(weight.dtype), "cuda", str(weight.device))


def _prepare_site(
    module: nn.Module, site: NormSite, op: str, plan: Plan, dtype: torch.dtype, done: dict[Prepared, None]
) -> Prepared | None:
    assert site.spec is not None
    weight = None if site.weight_attribute is None else getattr(module, site.weight_attribute)
    if weight is None or weight.is_meta:  # a weightless norm's width, and an offloaded one's device, show at the call
        return None
    n = weight.numel()
    x = torch.empty(1, n, dtype=dtype, device=weight.device)
    backend = ops.bind(op, site.spec, plan.backend).backend_for(x, weight)
    made = Prepared(op, n, _name(dtype), _name(weight.dtype), backend, str(weight.device))
    if backend == "reference":
        return None
    if made not in done:
        dispatch.warmup(backend, op, site.spec, n, dtype, weight.dtype, weight.device)
    return made


def _common_dtype(model: nn.Module) -> torch.dtype:
    """That of most parameters: what the hidden states have."""
    found = Counter[torch.dtype]()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            found[parameter.dtype] += parameter.numel()
    return found.most_common(1)[0][0] if found else torch.get_default_dtype()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
