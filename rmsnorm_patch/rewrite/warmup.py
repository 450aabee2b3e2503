"""warmup: compile what a model's norms will launch, before the first request or a CUDA graph's capture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import ops
from ..fused.gated_norm import op as gated_norm
from ..fused.norm_add import op as norm_add
from ..fused.norm_add.op import NORM_ADD, NORM_ADD_NORM
from ..fused.query_key_norm.kernel import bind_rms_norm_pair
from ..fused.query_key_norm.rotated import bind_rms_norm_rotated
from ..numerics.contract import FUNCTIONAL, FUSED_ADD, RMS_NORM
from ..ops import dispatch
from ..scan.dtypes import run_without_memory
from ..scan.plan import NormSite, Plan, QueryKeySite
from ..scan.probe import dtype_name
from ..scan.subject import Rejected
from . import observe


@dataclass(frozen=True)
class Prepared:
    """One op made ready: rows of `n` columns of `dtype`, with a weight of `weight_dtype` (None: weightless).
    residual_dtype: of what is added to them, where that is another."""

    op: str
    n: int
    dtype: str
    weight_dtype: str | None
    backend: str
    device: str
    residual_dtype: str | None = None


def prepare(model: nn.Module, plan: Plan, dtype: torch.dtype | None) -> tuple[Prepared, ...]:
    """Every op that `plan` will call on `model` where it is now, once; nothing for tensors on the CPU."""
    done: dict[Prepared, None] = {}
    looked_at, dtype = dtype is None, _common_dtype(model) if dtype is None else dtype
    paired = {pair.norm for pair in plan.fused_pairs() if pair.kind != "norm_add"}
    added = {pair.norm for pair in plan.fused_pairs("norm_add")}
    sites = {site.path: site for site in plan.fused_norms()}

    def add(site: NormSite, op: str, each: torch.dtype, residual: torch.dtype | None = None) -> None:
        prepared = _prepare_site(model.get_submodule(site.path), site, op, plan, (each, residual), done)
        if prepared is not None:
            done[prepared] = None

    for path, site in sites.items():
        names = FUNCTIONAL if path in paired else (RMS_NORM.name,)
        if path in added:
            names = (*names, NORM_ADD, NORM_ADD_NORM)
        inputs = [getattr(torch, name) for name in site.inputs] if looked_at else []
        for op in names:
            for each in inputs or [dtype]:
                add(site, op, each)
    for both in plan.fused_query_key():
        done.update(dict.fromkeys(_prepare_two(model, both, plan, dtype)))
    if looked_at and done:
        for path, operands in _operands(model).items():
            for left, right in sorted(operands, key=str):
                if path in sites and path in paired:
                    add(sites[path], FUSED_ADD.name, left, right)
    return tuple(done)


def _prepare_two(model: nn.Module, both: QueryKeySite, plan: Plan, dtype: torch.dtype) -> Iterator[Prepared]:
    """The kernels that norm a query and its key, without and with their rotation, as far as they will."""
    site = next(site for site in plan.norms if site.path == both.query)
    assert site.spec is not None
    weight = None if site.weight_attribute is None else getattr(model.get_submodule(site.path), site.weight_attribute)
    if weight is None or weight.is_meta:
        return
    x = torch.empty(1, weight.numel(), dtype=dtype, device=weight.device)
    if ops.bind(RMS_NORM.name, site.spec, plan.backend).backend_for(x, weight) != "cuda":
        return
    pair, rotated = bind_rms_norm_pair(site.spec), bind_rms_norm_rotated(site.spec)
    if pair.why_apart(x, x, weight, weight):
        return
    pair.prepare(x, weight)
    yield Prepared(pair.op, weight.numel(), dtype_name(dtype), dtype_name(weight.dtype), "cuda", str(weight.device))
    row, angle = x[None, None], x[None]
    if both.rotation == "fuse" and not rotated.why_apart(row, row, weight, weight, angle, angle, 2):
        rotated.prepare(x, weight)
        yield Prepared(
            rotated.op, weight.numel(), dtype_name(dtype), dtype_name(weight.dtype), "cuda", str(weight.device)
        )


def _operands(model: nn.Module) -> dict[str, set[tuple[torch.dtype, torch.dtype]]]:
    """Path of a norm -> the dtypes of the two operands of the add in front of it, where they differ (an fp32 residual
    of a half precision model); nothing where the model does not run without memory, as a copy of it does here."""
    dtypes: dict[str, set[tuple[torch.dtype, torch.dtype]]] = {}
    paths: dict[int, str] = {}

    def note(event: observe.Event) -> None:
        if len(event.operands) == 2 and event.operands[0].dtype != event.operands[1].dtype:
            left, right = (operand.dtype for operand in event.operands)
            dtypes.setdefault(paths[id(event.norm)], set()).add((left, right))

    try:
        with observe.observing(note), torch.no_grad():
            run_without_memory(model, lambda copied: paths.update((id(m), path) for path, m in copied.named_modules()))
    except Rejected:
        return {}
    return dtypes


def _prepare_site(
    module: nn.Module,
    site: NormSite,
    op: str,
    plan: Plan,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    done: dict[Prepared, None],
) -> Prepared | None:
    """dtypes: of the rows, and of what is added to them where that is another."""
    assert site.spec is not None
    dtype, residual_dtype = dtypes
    weight = None if site.weight_attribute is None else getattr(module, site.weight_attribute)
    if weight is None or weight.is_meta:  # a weightless norm's width, and an offloaded one's device, show at the call
        return None
    n = weight.numel()
    x = torch.empty(1, n, dtype=dtype, device=weight.device)
    if site.gating is not None:
        return _prepare_gated(site, x, weight, plan, done)
    behind = norm_add.bind(op, site.spec, plan.backend) if op in norm_add.SCHEMAS else None
    residual = None if residual_dtype is None else torch.empty_like(x, dtype=residual_dtype)
    if behind is not None:
        backend = behind.backend_for(x, weight)
    else:
        backend = ops.bind(op, site.spec, plan.backend).backend_for(x, weight, residual)
    named = None if residual_dtype is None else dtype_name(residual_dtype)
    prepared = Prepared(op, n, dtype_name(dtype), dtype_name(weight.dtype), backend, str(weight.device), named)
    if backend == "reference" or (backend == "cuda" and residual_dtype not in (None, dtype)):
        return None  # CUDA's kernels add one dtype: where they are asked for, such an add stays a call of its own
    if prepared not in done and behind is not None:
        behind.warmup(x, weight)
    elif prepared not in done:
        dispatch.warmup(backend, op, site.spec, n, dtype, weight.dtype, weight.device, residual_dtype)
    return prepared


def _prepare_gated(
    site: NormSite, x: torch.Tensor, weight: torch.Tensor, plan: Plan, done: dict[Prepared, None]
) -> Prepared | None:
    """For a gate of x's dtype: both come from one projection."""
    assert site.spec is not None
    assert site.gating is not None
    run = gated_norm.bind(site.spec, site.gating, plan.backend)
    backend = run.backend_for(x, x, weight)
    prepared = Prepared(
        gated_norm.NAME, x.shape[-1], dtype_name(x.dtype), dtype_name(weight.dtype), backend, str(x.device)
    )
    if backend == "reference":
        return None
    if prepared not in done:
        run.prepare(x, x, weight)
    return prepared


def _common_dtype(model: nn.Module) -> torch.dtype:
    """That of most parameters: what the hidden states have."""
    sizes = Counter[torch.dtype]()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype()
