"""Layer 3: the fused calls that ran, against the plan and the original model's own norm calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch.nn as nn
from torch.nn.modules import module as _module

from ..scan.plan import PairSite, Plan
from .report import FiredProof, SiteProof


def judge(
    model: nn.Module,
    plan: Plan,
    prefix: str,
    sites: Sequence[SiteProof],
    original_calls: Mapping[str, int],
    forwards: int,
    orders: tuple[Sequence[str], Sequence[str]],
    strict: bool,
) -> FiredProof:
    """original_calls: calls of each planned norm in `forwards` forwards of the original model. orders: paths in the
    order of their calls, of the original and of the patched model."""
    ran = {site.path: site for site in sites}
    planned = [prefix + site.path for site in plan.fused_norms()]
    pairs: dict[str, list[PairSite]] = {}
    norm_adds: dict[str, list[PairSite]] = {}
    for pair in plan.fused_pairs():
        adds = norm_adds if pair.kind == "norm_add" else pairs
        adds.setdefault(prefix + pair.norm, []).append(pair)
    missing, fallbacks, first = [], [], ""
    fused = paired = pairs_expected = 0
    for path in planned:
        expected = original_calls.get(path, 0)
        calls = Counter(ran[path].calls) if path in ran else Counter()
        own = calls["norm"] + calls["norm_add"] + calls["in_layer"] + calls["taken"] + calls["together"]
        fused += own
        if own + calls["original"] != expected:
            missing.append(f"{path}: {own + calls['original']} calls, {expected} expected")
            first = first or path
        if calls["original"]:
            reasons = "; ".join(ran[path].reasons) or "no reason given"
            fallbacks.append(f"{path}: {calls['original']} calls by the original arithmetic, {reasons}")
        for got, adds in ((calls["in_layer"] + calls["taken"], pairs), (calls["norm_add"], norm_adds)):
            wanted = min(expected, forwards * len(adds.get(path, ())))
            pairs_expected += wanted
            paired += min(got, wanted)
            if got < wanted:
                explained = calls["apart"] + calls["kept"] + calls["refused"] + calls["original"]
                why = "; ".join(ran[path].reasons) if explained else _why_apart(model, prefix, adds[path])
                outside = f"of {wanted} residual-adds outside the norm's call"
                if why:
                    listed = min(explained, wanted - got) or wanted - got
                    fallbacks.append(f"{path}: {listed} {outside}, {why}")
                    got += listed
                idle = [pair.layer for pair in adds[path] if _did_not_run(prefix + pair.layer, planned, original_calls)]
                if got < wanted and idle:
                    fallbacks.append(f"{path}: {wanted - got} {outside}, {idle[0]} did not run")
                    got = wanted
                if got < wanted:
                    missing.append(f"{path}: {wanted - got} {outside}")
                    first = first or path
    shared = _Shared(prefix, plan, ran, original_calls)
    fallbacks += shared.fallbacks
    missing += shared.missing
    first = first or shared.first
    for path in ran.keys() - set(planned):
        missing.append(f"{path}: ran fused, and the plan leaves it alone")
        first = first or path
    if not missing and list(orders[0]) != list(orders[1]):
        at = next((i for i, (a, b) in enumerate(zip(*orders, strict=False)) if a != b), min(map(len, orders)))
        first = [*orders[0], ""][min(at, len(orders[0]))]
        missing.append(f"norm call {at} is {first} in the original and another one in the patched model")
    return FiredProof(
        expected=sum(original_calls.get(path, 0) for path in planned),
        fused=fused,
        pairs_expected=pairs_expected,
        pairs_fused=paired,
        fallbacks=tuple(fallbacks),
        missing=tuple(missing),
        site=first,
        strict=strict,
        together_expected=shared.expected,
        together=shared.together,
    )


class _Shared:
    """The norms of queries and keys that the plan puts into one launch."""

    def __init__(
        self, prefix: str, plan: Plan, ran: Mapping[str, SiteProof], original_calls: Mapping[str, int]
    ) -> None:
        self.expected = self.together = 0
        self.fallbacks: list[str] = []
        self.missing: list[str] = []
        self.first = ""
        for path in dict.fromkeys(prefix + p for site in plan.fused_query_key() for p in (site.query, site.key)):
            expected, site = original_calls.get(path, 0), ran.get(path)
            calls = site.calls if site is not None else {}
            got, explained = calls.get("together", 0), calls.get("single", 0)
            self.expected += expected
            self.together += min(got, expected)
            apart = f"{path}: {expected - got} of {expected} calls did not share a launch with its query or key"
            if got < expected and site is not None and explained:
                self.fallbacks.append(f"{apart}, {'; '.join(site.singles)}")
            if got + explained < expected:
                self.missing.append(apart)
                self.first = self.first or path


def _did_not_run(layer: str, planned: Sequence[str], original_calls: Mapping[str, int]) -> bool:
    """Whether the original model left `layer` out, as models do that skip layers: none of its norms was called."""
    own = [path for path in planned if path.startswith(f"{layer}.")]
    return bool(own) and not any(original_calls.get(path) for path in own)


def _why_apart(model: nn.Module, prefix: str, pairs: Sequence[PairSite]) -> str:
    """What on the modules keeps the layer's code, and with it what it would have reported, from running; "" where
    nothing does."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "global module hooks are set"
    for pair in pairs:
        norm, layer = model.get_submodule(prefix + pair.norm), model.get_submodule(prefix + pair.layer)
        named = [("norm", norm), ("layer", layer)]
        owner = (prefix + pair.norm).rpartition(".")[0]
        if pair.kind in ("cross_layer", "final") and owner:
            named.append(("next layer", model.get_submodule(owner)))
        for role, module in named:
            if "forward" in module.__dict__:
                return f"the {role} has an instance-level forward"
        if any(p.device.type == "meta" for p in norm.parameters()):
            return "the norm's weight is offloaded"
    return ""
