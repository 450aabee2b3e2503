"""How a patched model's calls went: what `rmsnorm_patch.status` gives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from ..page import folded, numbered, page, summarised
from ..patch_state import STATE, derives_from_patched, original_class, runs_what_was_read
from . import LOCK, applied_report
from .counts import CALLS, Calls
from .handover import LINK, MAX_UNTAKEN, Link

OUTCOMES = {
    "fused": "in one call with the add in front",
    "added": "in one call with the add behind",
    "handed_over": "taken from the layer before, whose last add computed it",
    "alone": "by a kernel, without an add",
    "together": "in one launch, a query's norm and its key's",
    "rotated": "in one launch, a query's norm, its key's and their rotation",
    "reference": "by the model's own operations: no kernel is for this device or backend",
    "fallen_back": "by the original arithmetic, for the reasons below",
}
"""What a norm's call came to; each call counts once."""
NOT_COUNTED = "not counted: calls inside graphs of torch.compile, and replays of CUDA graphs"
SHOWN = 20


@dataclass(frozen=True)
class SiteStatus:
    """The calls of one norm since `apply`.

    path: module path from the model that was asked about. fused, added, handed_over, alone, reference, fallen_back:
        calls by what they came to (`OUTCOMES`). why: reason -> calls that fell back.
    apart: adds that the plan computes with this norm and that were computed apart from it; why_apart: reason -> adds.
    not_taken: hand-overs to this norm that it did not take, one under way among them; they were computed in vain.
    together: calls that shared a launch with the norm of the key, or of the query; rotated: and with their rotation.
        why_single, why_unrotated: reason -> calls that were to and did not.
    """

    path: str
    class_name: str
    fused: int
    added: int
    handed_over: int
    alone: int
    reference: int
    why: Mapping[str, int]
    why_apart: Mapping[str, int]
    not_taken: int
    together: int = 0
    why_single: Mapping[str, int] = field(default_factory=dict)
    rotated: int = 0
    why_unrotated: Mapping[str, int] = field(default_factory=dict)

    @property
    def fallen_back(self) -> int:
        return sum(self.why.values())

    @property
    def apart(self) -> int:
        return sum(self.why_apart.values())

    @property
    def calls(self) -> int:
        return sum(getattr(self, name) for name in OUTCOMES)

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("calls", *OUTCOMES, "apart", "not_taken")}

    def to_dict(self) -> dict[str, Any]:
        plain = {"path": self.path, "class_name": self.class_name, **self.counts()}
        names = ("why", "why_apart", "why_single", "why_unrotated")
        return {**plain, **{name: dict(getattr(self, name)) for name in names}}


@dataclass(frozen=True)
class Status:
    """How the calls of a patched model's norms went since `apply`, in all threads of this process.

    Calls inside graphs of `torch.compile` and replays of CUDA graphs are not counted.
    sites: one for each patched norm. notes: what costs speed and is no call: modules replaced since `apply`, and layers
        that hand nothing over for the time being.
    """

    model_class: str
    sites: tuple[SiteStatus, ...]
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """The sums over all sites, e.g. {"calls": 30, "fused": 12, "handed_over": 12, "alone": 6, ...}."""
        names = SiteStatus("", "", 0, 0, 0, 0, 0, {}, {}, 0).counts()
        return {name: sum(getattr(site, name) for site in self.sites) for name in names}

    def why(self) -> dict[str, int]:
        """Reason -> calls that fell back to the original arithmetic, the most frequent first."""
        return _summed(site.why for site in self.sites)

    def why_apart(self) -> dict[str, int]:
        """Reason -> adds that were computed apart from their norm, the most frequent first."""
        return _summed(site.why_apart for site in self.sites)

    def why_single(self) -> dict[str, int]:
        """Reason -> norms of queries and keys that did not share a launch, the most frequent first."""
        return _summed(site.why_single for site in self.sites)

    def why_unrotated(self) -> dict[str, int]:
        """Reason -> norms of queries and keys whose rotation was not part of their launch, the most frequent first."""
        return _summed(site.why_unrotated for site in self.sites)

    def __str__(self) -> str:
        """A page: the sums and the reasons, lines of at most 120 characters."""
        return page([*self._headlines(), *self._reasons(SHOWN), *summarised(self._notes())])

    def explain(self) -> str:
        """Every site and every reason."""
        return page([*self._headlines(), *self._sites(), *self._reasons(None), *self._notes()])

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_class": self.model_class,
            "counts": self.counts(),
            "why": self.why(),
            "why_apart": self.why_apart(),
            "why_single": self.why_single(),
            "why_unrotated": self.why_unrotated(),
            "sites": [site.to_dict() for site in self.sites],
            "notes": list(self.notes),
            "not_counted": NOT_COUNTED,
        }

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def _headlines(self) -> Iterator[str]:
        counts = self.counts()
        yield f"{self.model_class}: {len(self.sites)} patched norms, {counts['calls']} calls since apply"
        for name, meaning in OUTCOMES.items():
            yield f"  {counts[name]:8} {name.replace('_', ' ')}: {meaning}"
        if counts["not_taken"]:
            yield f"  {counts['not_taken']:8} hand-overs not taken: the norm did not get the sum as it was made"

    def _reasons(self, shown: int | None) -> Iterator[str]:
        for title, name in (
            ("fallen back to the original arithmetic", "why"),
            ("adds computed apart from their norm", "why_apart"),
            ("norms of queries and keys that did not share a launch", "why_single"),
            ("norms of queries and keys that did not share a launch with their rotation", "why_unrotated"),
        ):
            lines = list(_grouped((site.path, getattr(site, name)) for site in self.sites))
            if lines:
                yield title
            yield from lines[:shown]
            if len(lines) > len(lines[:shown]):
                yield f"  ... and {len(lines) - len(lines[:shown])} more reasons, see explain()"

    def _sites(self) -> Iterator[str]:
        yield "sites"
        for site in self.sites:
            counts = [f"{count} {name.replace('_', ' ')}" for name, count in site.counts().items() if count]
            yield f"  {site.path or '(root)'}: {site.class_name}: {', '.join(counts) or 'not called'}"

    def _notes(self) -> Iterator[str]:
        yield from (f"note: {note}" for note in (*self.notes, NOT_COUNTED))


def status_of(model: nn.Module) -> Status | None:
    """The status of `model`; None where nothing of it is patched."""
    modules = list(model.named_modules())
    if not any(derives_from_patched(type(module)) for _, module in modules):
        return None
    links = [link for _, module in modules if (link := module.__dict__.get(STATE, {}).get(LINK)) is not None]
    given: Counter[int] = Counter()
    for link in links:
        given[id(link.norm())] += link.given
    norms = [(path, m) for path, m in modules if getattr(type(m), "_rmsnorm_patch_role", None) == "norm"]
    sites = tuple(_site(path, norm, given[id(norm)]) for path, norm in norms)
    return Status(type(model).__name__, sites, (*_replaced(modules), *_resting(modules)))


def _site(path: str, norm: nn.Module, given: int) -> SiteStatus:
    calls = norm.__dict__.get(STATE, {}).get(CALLS)
    if calls is None:  # it came from a pickle that left private attributes out: from now on it is counted
        with LOCK:
            calls = norm.__dict__.setdefault(STATE, {}).setdefault(CALLS, Calls()) if _is_ours(norm) else Calls()
    handed_over = calls.handed_over
    return SiteStatus(
        path,
        original_class(type(norm)).__name__,
        calls.fused,
        calls.added,
        handed_over,
        calls.alone,
        calls.reference,
        calls.fallen_back.counts(),
        calls.apart.counts(),
        max(given - handed_over, 0),
        calls.together,
        calls.single.counts(),
        calls.rotated,
        calls.unrotated.counts(),
    )


def _is_ours(norm: nn.Module) -> bool:
    return derives_from_patched(type(norm))


def _replaced(modules: list[tuple[str, nn.Module]]) -> Iterator[str]:
    """Sites that an `apply` patched and that are not patched now."""
    now = dict(modules)
    for root, module in modules:
        report = applied_report(module)
        for below in () if report is None else (*report.norms, *report.layers, *report.attentions):
            path = f"{root}.{below}".strip(".")
            standing = now.get(path)
            if standing is None or not _is_ours(standing):
                what = "is gone" if standing is None else f"is a {type(standing).__name__} that is not patched"
                yield f"{path or '(root)'} {what}; it was patched by apply, which can be called again"
    for path, module in modules:
        if _is_ours(module) and not runs_what_was_read(type(module)):
            name = original_class(type(module)).__name__
            yield f"{path or '(root)'} runs what {name} got since apply; after revert, apply reads that"


def _resting(modules: list[tuple[str, nn.Module]]) -> Iterator[str]:
    for path, module in modules:
        link: Link | None = module.__dict__.get(STATE, {}).get(LINK)
        if link is not None and link.untaken >= MAX_UNTAKEN:
            yield f"{path} hands nothing over for now: its last {link.untaken} hand-overs were not taken"


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total.most_common())


def _grouped(sites: Iterable[tuple[str, Mapping[str, int]]]) -> Iterator[str]:
    """A line for each reason and kind of path, the most frequent first; layers of a stack share one."""
    groups: dict[tuple[str, str], tuple[list[str], list[int]]] = {}
    for path, why in sites:
        for reason, count in why.items():
            paths, counts = groups.setdefault((reason, numbered(path)[0]), ([], []))
            paths.append(path)
            counts.append(count)
    for (reason, _), (paths, counts) in sorted(groups.items(), key=lambda item: -sum(item[1][1])):
        yield f"  {sum(counts):8} x {folded(paths)}: {reason}"
