"""Find the norm modules of a model and say what each computes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn as nn

from ..errors import UnsupportedModel
from ..numerics.gating import GateSpec
from ..numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec
from ..patch_state import check_module
from .diagnose import explain
from .gated import UNKNOWN, find_gated, takes_gate
from .plan import NormSite
from .probe import WEIGHTLESS, Found, dtype_name, find_spec, short, undisturbed
from .subject import Rejected, Subject, examine, own_class, reachable_codes

_NAMED_RMS = re.compile(r"RMS|Rms|rms(?=[nN]orm)|(?<![a-zA-Z])rms(?=_|$)")
"""But not the "rms" of "LayerNormSelfAttention", lower-cased, nor that of "Transforms"."""
_NAMED_NORM = re.compile(r"norm", re.IGNORECASE)
_REDUCTIONS = {"mean", "sum", "norm", "vector_norm", "rms_norm", "einsum", "var"}
_FAILS = "its forward fails on a probe"
_NAMES = {
    LLAMA: "llama",
    FP32_WEIGHT_MULTIPLY: "fp32-weight-multiply",
    GEMMA: "gemma",
    T5: "t5",
    WEIGHTLESS: "weightless",
}

Cache = dict[Hashable, "Found | str"]
_BY_CLASS: WeakKeyDictionary[type, Cache] = WeakKeyDictionary()


@dataclass(frozen=True)
class Match:
    """What one module computes.

    spec: None where nothing matched, and `reason` says why. eps_attribute, weight_attribute: names found by behaviour;
        None for an eps that is a constant in the code, and for a norm that uses no weight. gating: of a gated norm,
        whose `spec` is that of the norm in it.
    """

    spec: NormSpec | None
    reason: str
    eps_attribute: str | None = None
    weight_attribute: str | None = None
    hidden_size: int | None = None
    gating: GateSpec | None = None


def variant_name(spec: NormSpec) -> str:
    """A short name for a spec's numerics, e.g. "llama", "gemma", "weightless"; the differing fields otherwise."""
    base = replace(spec, eps=LLAMA.eps, sum=LLAMA.sum, width=None, group=None)
    parts = (
        [_NAMES[base]]
        if base in _NAMES
        else [
            f"round={spec.round_before_weight}",
            f"offset={spec.weight_offset}",
            f"output={spec.output}",
            *([] if spec.has_weight else ["weightless"]),
        ]
    )
    parts += [f"width={spec.width}"] * (spec.width is not None) + [f"group={spec.group}"] * (spec.group is not None)
    return " ".join(parts)


def infer_norm(module: nn.Module, _shared: Cache | None = None) -> Match:
    """`infer_spec`, and for a forward of two tensors the gated norm that it computes."""
    match = infer_spec(module, _shared)
    if match.spec is not None or not takes_gate(own_class(module)):
        return match
    gated = infer_gated(module, _shared)
    if gated.spec is not None or gated.reason.startswith(_FAILS):  # it takes something else than a gate
        return match if gated.spec is None else gated
    return replace(match, reason=f"{match.reason}; {gated.reason}")


def infer_gated(module: nn.Module, _shared: Cache | None = None) -> Match:
    """The gated norm that equals `module`'s own forward of (x, gate) bit for bit, found as `infer_spec` finds one."""
    try:
        subject = examine(module, gated=True)
        found = _find(subject, module, _shared)
    except Rejected as rejection:
        return Match(None, str(rejection))
    numerics = f"{variant_name(found.spec)} numerics {found.gating}"
    reason = f"computes {numerics}, bit for bit in {found.combinations} dtype triples"
    return Match(
        spec=found.spec,
        reason="; ".join(filter(None, (reason, subject.note))),
        eps_attribute=found.eps_attribute,
        weight_attribute=subject.weight_attribute,
        hidden_size=subject.columns[0],
        gating=found.gating,
    )


def infer_spec(module: nn.Module, _shared: Cache | None = None) -> Match:
    """The NormSpec whose reference arithmetic equals `module`'s own forward bit for bit, found by running it.

    The module itself is neither called nor changed: a throwaway instance of its class runs on the CPU, so weights may
    be on any device, meta, sharded or quantised. Modules of one class and configuration are probed once.
    """
    try:
        subject = examine(module)
        found = _find(subject, module, _shared)
    except Rejected as rejection:
        return Match(None, str(rejection))
    spec = found.spec
    reason = f"computes {variant_name(spec)} numerics, bit for bit in {found.combinations} dtype pairs"
    return Match(
        spec=spec,
        reason="; ".join(filter(None, (reason, subject.note))),
        eps_attribute=found.eps_attribute,
        weight_attribute=subject.weight_attribute if spec.has_weight else None,
        hidden_size=subject.columns[0] if subject.weight_attribute else None,
    )


def _find(subject: Subject, module: nn.Module, shared: Cache | None) -> Found:
    """Probe, or take what the same class and configuration gave before; raises `Rejected`."""
    key: Hashable = subject.key
    cache = _BY_CLASS.setdefault(subject.cls, {})
    if key is None and shared is not None:
        # Attributes such as a config object: equal only while they are the very same objects, so for one scan.
        cache = shared
        key = (
            subject.cls,
            subject.gated,
            subject.columns,
            tuple((name, id(v)) for name, v in sorted(subject.attributes.items())),
        )
    known = None if key is None else cache.get(key)
    if known is None:
        known = _probe(subject, module)
        if key is not None:
            cache[key] = known
    if isinstance(known, str):
        raise Rejected(known)
    return known


def _probe(subject: Subject, module: nn.Module) -> Found | str:
    with undisturbed():
        try:
            if subject.gated:
                return find_gated(subject, module) or UNKNOWN
            return find_spec(subject, module) or explain(subject)
        except Rejected as rejection:
            return str(rejection)
        except Exception as error:  # foreign code, which may fail in any way, say in training mode only
            return f"{_FAILS} ({short(error)})"


def scan_norms(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[NormSite, ...]:
    """One site for every module of `model` that looks like a norm, in the order of `named_modules`.

    include, exclude: `fnmatch` patterns on module paths ("*" also spans dots); sites outside them are listed as
        "leave". A module shared at several paths is selected by any of its paths.
    Raises `UnsupportedModel` for an object that is no module, a model without any RMSNorm, and a pattern that matches
    no norm.
    """
    check_module(model)
    shared: Cache = {}
    sites = []
    for module, paths in _modules_with_paths(model):
        match = _match_if_norm(module, shared)
        if match is not None:
            sites.append(_site(module, paths, match))
    _check_holds_rms_norm(model, sites)
    _check_patterns(sites, include, exclude)
    return tuple(_selected(site, include, exclude) for site in sites)


def _modules_with_paths(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Each module once, with every path that leads to it; a cycle is cut where it closes."""
    found: dict[nn.Module, list[str]] = {}

    def walk(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> None:
        found.setdefault(module, []).append(path)
        for name, child in module._modules.items():
            if child is not None and not any(child is m for m in above):
                walk(child, f"{path}.{name}" if path else name, (*above, child))

    walk(model, "", (model,))
    yield from found.items()


def _match_if_norm(module: nn.Module, shared: Cache) -> Match | None:
    """None for a module that does not look like a norm: by its class's name, or by a structure that then matches."""
    name = own_class(module).__name__
    leaf = all(child is None for child in module._modules.values())
    if _NAMED_RMS.search(name) or (leaf and _NAMED_NORM.search(name)):
        return infer_norm(module, shared)
    if not leaf or not _built_like_a_norm(module):
        return None
    match = infer_norm(module, shared)
    return match if match.spec is not None else None


def _built_like_a_norm(module: nn.Module) -> bool:
    """Worth running on probes: one 1-D tensor, or none but an eps, and code that takes some mean."""
    try:
        named = {name for code in reachable_codes(own_class(module)) for name in code.co_names}
    except Rejected:
        return False
    if not named & _REDUCTIONS:
        return False
    tensors = [t for store in (module._parameters, module._buffers) for t in store.values() if t is not None]
    if len(tensors) == 1:
        return not nn.parameter.is_lazy(tensors[0]) and tensors[0].dim() == 1
    return not tensors and any("eps" in name.lower() for name in module.__dict__)


def _site(module: nn.Module, paths: list[str], match: Match) -> NormSite:
    weight: Any = None
    if match.weight_attribute is not None:
        weight = module._parameters.get(match.weight_attribute, module._buffers.get(match.weight_attribute))
    return NormSite(
        path=paths[0],
        class_name=own_class(module).__name__,
        spec=match.spec,
        action="leave" if match.spec is None else "fuse",
        reason=match.reason,
        hidden_size=match.hidden_size,
        weight_dtype=None if weight is None else dtype_name(weight.dtype),
        eps_attribute=match.eps_attribute,
        shared_paths=tuple(paths[1:]),
        weight_attribute=match.weight_attribute,
        gating=match.gating,
    )


def _check_holds_rms_norm(model: nn.Module, sites: list[NormSite]) -> None:
    if any(site.spec is not None for site in sites):
        return
    held = Counter((site.class_name, site.reason) for site in sites)
    listed = "; ".join(f"{count} x {name}: {reason}" for (name, reason), count in held.most_common(4))
    raise UnsupportedModel(
        type(model).__name__,
        f"no module that computes an RMSNorm ({listed or 'no norm module at all'})",
        "models with RMSNorm modules",
        "nothing can be fused here; use the model as it is",
    )


def _matches(site: NormSite, pattern: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in (site.path, *site.shared_paths))


def _check_patterns(sites: list[NormSite], include: Sequence[str], exclude: Sequence[str]) -> None:
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise UnsupportedModel(option, f"the string {patterns!r}", "a sequence of patterns", f"pass [{patterns!r}]")
        for pattern in patterns:
            if not any(_matches(site, pattern) for site in sites):
                raise UnsupportedModel(
                    f"{option}={pattern!r}",
                    "a pattern that matches no norm of this model",
                    f"fnmatch patterns on norm paths such as {sites[0].path!r} and {sites[-1].path!r}",
                    "correct the pattern, or drop it; for all norms under a module write 'path.to.module.*'",
                )


def _selected(site: NormSite, include: Sequence[str], exclude: Sequence[str]) -> NormSite:
    if site.action == "leave":
        return site
    if include and not any(_matches(site, pattern) for pattern in include):
        return replace(site, action="leave", reason=f"not in include={list(include)}; {site.reason}")
    for pattern in exclude:
        if _matches(site, pattern):
            return replace(site, action="leave", reason=f"excluded by {pattern!r}; {site.reason}")
    return site
