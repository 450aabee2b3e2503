"""The fifth judgement: the fused calls that ran, against the plan and the original model's own norm calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch.nn as nn
from torch.nn.modules import module as _module

from ..scan.plan import PairSite, Plan, QueryKeySite
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
    findings = _Findings()
    fused = paired = pairs_expected = 0
    for path in planned:
        expected = original_calls.get(path, 0)
        calls = Counter(ran[path].calls) if path in ran else Counter()
        reasons = "; ".join(ran[path].reasons) if path in ran else ""
        fused += _norm_calls(findings, path, calls, expected, reasons)
        for got, adds in ((calls["in_layer"] + calls["taken"], pairs), (calls["norm_add"], norm_adds)):
            wanted = min(expected, forwards * len(adds.get(path, ())))
            pairs_expected += wanted
            paired += min(got, wanted)
            if got < wanted:
                explained = calls["apart"] + calls["kept"] + calls["refused"] + calls["original"]
                why = reasons if explained else _why_apart(model, prefix, adds[path])
                idle = [pair.layer for pair in adds[path] if _did_not_run(prefix + pair.layer, planned, original_calls)]
                _adds_outside(findings, path, got, wanted, explained, why, idle)
    both = tuple(plan.fused_query_key())
    turned = tuple(site for site in both if site.rotation == "fuse")
    shared = _shared_launches(findings, prefix, both, ran, original_calls, _TOGETHER)
    rotated = _shared_launches(findings, prefix, turned, ran, original_calls, _ROTATED)
    for path in ran.keys() - set(planned):
        findings.miss(path, "ran fused, and the plan leaves it alone")
    if not findings.missing:
        findings.out_of_order(*orders)
    return FiredProof(
        expected=sum(original_calls.get(path, 0) for path in planned),
        fused=fused,
        pairs_expected=pairs_expected,
        pairs_fused=paired,
        fallbacks=tuple(findings.fallbacks),
        missing=tuple(findings.missing),
        site=findings.first,
        strict=strict,
        together_expected=shared[0],
        together=shared[1],
        rotated_expected=rotated[0],
        rotated=rotated[1],
    )


class _Findings:
    """What did not run as planned: with a stated reason, and without. first: the first path of the latter, or ""."""

    def __init__(self) -> None:
        self.fallbacks: list[str] = []
        self.missing: list[str] = []
        self.first = ""

    def fell_back(self, path: str, how: str) -> None:
        self.fallbacks.append(f"{path}: {how}")

    def miss(self, path: str, what: str) -> None:
        self.missing.append(f"{path}: {what}")
        self.first = self.first or path

    def out_of_order(self, original: Sequence[str], patched: Sequence[str]) -> None:
        """Where the norms of the two runs, by their paths, were not called in the same order."""
        if list(original) == list(patched):
            return
        both, shorter = zip(original, patched, strict=False), min(len(original), len(patched))
        at = next((number for number, (one, other) in enumerate(both) if one != other), shorter)
        self.first = original[at] if at < len(original) else ""
        self.missing.append(f"norm call {at} is {self.first} in the original and another one in the patched model")


def _norm_calls(findings: _Findings, path: str, calls: Counter[str], expected: int, reasons: str) -> int:
    """How many calls of one norm were ours."""
    own = calls["norm"] + calls["norm_add"] + calls["in_layer"] + calls["taken"] + calls["together"]
    if own + calls["original"] != expected:
        findings.miss(path, f"{own + calls['original']} calls, {expected} expected")
    if calls["original"]:
        findings.fell_back(
            path, f"{calls['original']} calls by the original arithmetic, {reasons or 'no reason given'}"
        )
    return own


def _adds_outside(
    findings: _Findings, path: str, got: int, wanted: int, explained: int, why: str, idle: Sequence[str]
) -> None:
    """`got` of `wanted` adds ran with their norm. explained: calls that said why they did not; idle: layers of these
    adds that did not run."""
    outside = f"of {wanted} residual-adds outside the norm's call"
    if why:
        listed = min(explained, wanted - got) or wanted - got
        findings.fell_back(path, f"{listed} {outside}, {why}")
        got += listed
    if got < wanted and idle:
        findings.fell_back(path, f"{wanted - got} {outside}, {idle[0]} did not run")
        got = wanted
    if got < wanted:
        findings.miss(path, f"{wanted - got} {outside}")


_TOGETHER = ("together", {"single": "singles"}, "its query or key")
_ROTATED = ("rotated", {"unrotated": "unrotated", "single": "singles"}, "its rotation")
"""What `_shared_launches` looks for: events that did as planned, events that say why not and where their reasons are,
words for what the norm was to share its launch with."""


def _shared_launches(
    findings: _Findings,
    prefix: str,
    sites: Iterable[QueryKeySite],
    ran: Mapping[str, SiteProof],
    original_calls: Mapping[str, int],
    kind: tuple[str, Mapping[str, str], str],
) -> tuple[int, int]:
    """(calls expected, calls that shared a launch) of the norms of queries and keys that the plan puts into one."""
    wanted = together = 0
    did, did_not, other = kind
    for path in dict.fromkeys(prefix + p for site in sites for p in (site.query, site.key)):
        expected, site = original_calls.get(path, 0), ran.get(path)
        calls = site.calls if site is not None else {}
        got, explained = calls.get(did, 0), sum(calls.get(event, 0) for event in did_not)
        wanted += expected
        together += min(got, expected)
        apart = f"{expected - got} of {expected} calls did not share a launch with {other}"
        if got < expected and site is not None and explained:
            whys = [reason for name in did_not.values() for reason in getattr(site, name)]
            findings.fell_back(path, f"{apart}, {'; '.join(dict.fromkeys(whys))}")
        if got + explained < expected:
            findings.miss(path, apart)
    return wanted, together


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
