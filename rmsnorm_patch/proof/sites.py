"""The first judgement, of sites: each fused call, while it happens, against the original class on the same operands.

Judging inside the call has three merits: the norm's weights are there (an offloaded module has them only then), the
operands are the real ones, and no tensor has to be kept: beside one call's temporaries, a site costs a checksum per
distinct row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..backends.names import Backend
from ..fused.norm_add.op import bind_norm_add, bind_norm_add_norm
from ..numerics import reference, rotation
from ..numerics.gating import gated_rms_norm_fp64
from ..numerics.spec import SUPPORTED_DTYPES, NormSpec
from ..numerics.tolerances import EXACT, EXACT_ERROR_RATIO, GATED, SITE, SiteTolerance
from ..patch_state import original_class
from ..rewrite import observe
from ..scan.plan import NormSite
from . import probes
from .difference import Difference, bit_mismatches, compare, compare_sum, digest, finite, row_keys
from .report import Measurement, SiteProof

_ORIGINAL_ARITHMETIC = ("reference", "original")
_KEPT_ROWS = 16
"""Rows of failing operands kept for a site, so that the failure can be replayed elsewhere."""


@dataclass
class _Site:
    """What is known so far about one norm."""

    plan: NormSite | None
    calls: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    singles: Counter[str] = field(default_factory=Counter)
    unrotated: Counter[str] = field(default_factory=Counter)
    found: dict[tuple[str, str, torch.dtype], Difference] = field(default_factory=dict)
    exact: dict[str, _Exact] = field(default_factory=dict)
    probed: set[str] = field(default_factory=set)
    failing: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, set[int]] = field(default_factory=dict)
    handed_over: torch.Tensor | None = None
    offered: _Offer | None = None

    @property
    def differs_by_design(self) -> bool:
        """Whether a fused add reads the unrounded sum: its result is then held against the exact value."""
        return self.plan is not None and self.plan.spec is not None and self.plan.spec.sum == "fp32"

    def weight_and_eps(self, norm: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor | None, float]:
        """The module's own, now."""
        assert self.plan is not None
        assert self.plan.spec is not None
        eps = getattr(norm, self.plan.eps_attribute) if self.plan.eps_attribute else self.plan.spec.eps
        weight = getattr(norm, self.plan.weight_attribute) if self.plan.weight_attribute else None
        return weight, self.plan.spec.resolve_eps(dtype) if eps is None else eps

    def judged_dtype(self, norm: nn.Module, x: torch.dtype, result: torch.dtype, backend: str) -> torch.dtype:
        """The dtype in which a result is compared. Where x * rstd was rounded to a half type and an fp32 weight widened
        it again, one honest flip is one unit of the half type and thousands of fp32's: those are compared as halves."""
        if backend in _ORIGINAL_ARITHMETIC or self.plan is None or self.plan.spec is None or result != torch.float32:
            return result
        weight, _ = self.weight_and_eps(norm, x)
        return self.plan.spec.rounded_dtype(x, None if weight is None else weight.dtype)


@dataclass
class _Offer:
    """A sum whose norm was handed over, and has not been taken yet: as it was then."""

    total: torch.Tensor
    digest: int

    def why_refused(self, entered: torch.Tensor) -> str:
        """Why the norm, given `entered`, rightly computes its own; "" where it was given the very sum, unchanged."""
        if digest(entered) == self.digest:
            return "" if entered is self.total else "a copy of the layer's sum reached the norm"
        return "another tensor than the layer's sum reached the norm"


@dataclass
class _Exact:
    """Squared distances from the fp64 value, and its own square, summed over calls."""

    fused: float = 0.0
    original: float = 0.0
    size: float = 0.0

    def add(self, fused: torch.Tensor, original: torch.Tensor, exact: torch.Tensor) -> None:
        self.fused += float((fused.to(torch.float64) - exact).pow(2).sum())
        self.original += float((original.to(torch.float64) - exact).pow(2).sum())
        self.size += float(exact.pow(2).sum())

    def relative(self) -> tuple[float, float]:
        """(fused, original) rms errors relative to the exact value's rms."""
        if not self.size:
            return 0.0, 0.0
        return finite((self.fused / self.size) ** 0.5), finite((self.original / self.size) ** 0.5)


class SiteWatcher:
    """The observer of a proof. `run` names the measurement that calls are put under.

    sites: path -> NormSite of the plan. only: paths to judge; None = all. Calls at other sites are counted alone.
    """

    def __init__(
        self,
        sites: Mapping[str, NormSite],
        backend: Backend,
        seed: int,
        only: frozenset[str] | None = None,
    ) -> None:
        self.run = "captured"
        self.listener: Callable[[str, observe.Event], None] | None = None
        self._plan = sites
        self._backend = backend
        self._seed = seed
        self._only = only
        self._sites: dict[str, _Site] = {}
        self._paths: dict[int, str] = {}
        self.sum_rms: dict[str, float] = {}
        self.sum_width = 0
        self.eps = 1e-6

    def watch(self, model: nn.Module) -> None:
        """Know the norms of `model` by their paths from now on."""
        self._paths = {id(module): path for path, module in model.named_modules()}

    def path_of(self, norm: nn.Module) -> str:
        return self._paths.get(id(norm), f"<{type(norm).__name__} outside the model>")

    def __call__(self, event: observe.Event) -> None:
        with observe.observing(_ignore):
            path = self.path_of(event.norm)
            site = self._sites.setdefault(path, _Site(self._plan.get(path)))
            self._count(site, event)
            if self.listener is not None:
                self.listener(path, event)
            # the norm's own event is judged where an add and its norm were two calls
            paired = event.kind in ("in_layer", "norm_add")
            fell_apart = event.kind in ("kept", "single", "unrotated") or (paired and event.backend == "original")
            self._measure_sum(site, event)
            if not fell_apart and (self._only is None or path in self._only):
                self._judge(site, event)
                if event.backend != "original":
                    self._probe(site, path, event)

    def _count(self, site: _Site, event: observe.Event) -> None:
        if self.run != "captured":
            return
        original = event.backend == "original"
        kind: str = event.kind
        if original and kind in ("norm", "in_layer", "norm_add"):
            kind = "original" if kind == "norm" else "apart"
        if event.reason or kind not in ("apart", "kept"):
            site.calls[kind] += 1
        if event.kind in ("single", "unrotated"):
            (site.singles if event.kind == "single" else site.unrotated)[event.reason] += 1
            return
        if event.rotation is not None:
            site.calls["rotated"] += 1
        site.backends[event.backend] += 1
        if event.reason:
            site.reasons[event.reason] += 1
        self._follow(site, event)

    def _follow(self, site: _Site, event: observe.Event) -> None:
        """What became of the hand-over to this norm. One that was rightly refused is counted, with the reason."""
        if event.kind == "cross_layer":
            assert event.total is not None
            site.offered = _Offer(event.total, digest(event.total))
            return
        offer, site.offered = site.offered, None
        if event.kind != "norm" or offer is None:
            return
        entered = event.operands[0]
        if any(other.offered is not None and other.offered.total is entered for other in self._sites.values()):
            return  # a sum of another layer, whose tail handed it over to another norm
        why = event.reason or offer.why_refused(entered)
        if why:
            site.calls["refused"] += 1
            site.reasons[why] += 1

    def _judge(self, site: _Site, event: observe.Event) -> None:
        """The event's own results against the original arithmetic on the event's operands."""
        left = event.operands[0]
        found = Difference()
        total = left
        if event.kind == "norm_add":  # the sum is of the norm's own bits; where it is None, the reader's event has it
            found = found if event.total is None else compare_sum(event.total, event.normed + event.operands[1])
        elif len(event.operands) == 2:
            total = left + event.operands[1]
            found = (
                Difference(error="no residual sum returned") if event.total is None else compare_sum(event.total, total)
            )
        expected = _original(event.norm, total, event.gate)
        dtype = site.judged_dtype(event.norm, total.dtype, expected.dtype, event.backend)
        kept = self._new_rows(site, total, event.normed)
        named = {"total_expected": total, "normed": event.normed, "normed_expected": expected}
        named |= dict(zip(("left", "right"), event.operands, strict=False))
        named |= {name: tensor for name, tensor in (("total", event.total), ("gate", event.gate)) if tensor is not None}
        if kept is not None:
            named = {name: tensor.detach().reshape(-1, tensor.shape[-1])[kept] for name, tensor in named.items()}
        if site.differs_by_design and event.backend != "original" and event.kind != "norm":
            return self._judge_by_design(site, event, expected, found)
        found = found + _compare_as(dtype, named["normed"], named["normed_expected"]) + _rotation_error(event)
        self._put(site, self.run, event.backend, dtype, found)
        if not site.failing and found.violations(_tolerance(site, event.backend, dtype), dtype):
            site.failing = _excerpt(named, event.norm, found.worst_row)

    def _judge_by_design(self, site: _Site, event: observe.Event, expected: torch.Tensor, found: Difference) -> None:
        """A call that reads the unrounded sum: judged by its error against fp64; what a norm takes, by being that."""
        name = f"{self.run}:fp32 sum"
        if event.kind == "taken":
            kept = site.handed_over
            same = kept is not None and not bit_mismatches(event.normed, kept)
            found = Difference() if same else Difference(error="took another tensor than was handed over to it")
        else:
            self._measure_exact(site, name, event.norm, event.operands, event.normed, expected)
            found = found + compare(event.normed, expected)
            site.handed_over = event.normed if event.kind == "cross_layer" else None
        self._put(site, name, event.backend, expected.dtype, found)

    def _measure_exact(
        self,
        site: _Site,
        name: str,
        norm: nn.Module,
        operands: tuple[torch.Tensor, ...],
        fused: torch.Tensor,
        original: torch.Tensor,
        gate: torch.Tensor | None = None,
    ) -> None:
        """Errors against the norm in fp64 of what the spec says it reads: the sum as it is stored, or the exact one."""
        assert site.plan is not None
        assert site.plan.spec is not None
        if fused.shape != original.shape:
            return
        x = operands[0]
        if len(operands) == 2:
            stored = x + operands[1]
            x = x.to(torch.float64) + operands[1].to(torch.float64) if site.differs_by_design else stored
        weight, eps = site.weight_and_eps(norm, operands[0].dtype)
        if site.plan.gating is None or gate is None:
            exact = reference.rms_norm_fp64(x, weight, site.plan.spec, eps)
        else:
            exact = gated_rms_norm_fp64(x, gate, weight, site.plan.spec, site.plan.gating, eps)
        site.exact.setdefault(name, _Exact()).add(fused, original, exact)

    def _new_rows(self, site: _Site, total: torch.Tensor, normed: torch.Tensor) -> torch.Tensor | None:
        """Indices of the rows whose bits, before and after, this run has not brought to the site yet.

        A token that occurs ten times brings the first norm one row ten times, and its one rounding flip is no ten
        flips. None: rows that cannot be told apart this way, all count.
        """
        if total.shape != normed.shape or total.dim() < 1 or not total.numel():
            return None
        width = total.shape[-1]
        keys = row_keys(total.reshape(-1, width)) * 31 + row_keys(normed.reshape(-1, width))
        seen = site.rows.setdefault(self.run, set())
        new = []
        for index, key in enumerate(keys.tolist()):
            if key not in seen:
                seen.add(key)
                new.append(index)
        return None if len(new) == keys.numel() else torch.tensor(new, dtype=torch.int64, device=total.device)

    def _measure_sum(self, site: _Site, event: observe.Event) -> None:
        """How large the model's own residual sums are, also at sites that are not judged: the driven runs scale them,
        and must be the same runs when one site is judged alone."""
        if self.run != "captured" or len(event.operands) != 2 or site.plan is None or site.plan.spec is None:
            return
        if event.kind == "norm_add":
            return
        total = event.operands[0] + event.operands[1]
        if total.numel():
            self.sum_rms[site.plan.path] = float(total.to(torch.float64).pow(2).mean().sqrt())
            self.sum_width = total.shape[-1]
            _, self.eps = site.weight_and_eps(event.norm, total.dtype)

    def _put(self, site: _Site, name: str, backend: str, dtype: torch.dtype, found: Difference) -> None:
        key = (name, backend, dtype)
        site.found[key] = site.found.get(key, Difference()) + found

    def _probe(self, site: _Site, path: str, event: observe.Event) -> None:
        """Once per site and form of call: the four families through the patched norm, or through the bound op."""
        form = "norm_add" if event.kind == "norm_add" else "norm" if len(event.operands) == 1 else "pair"
        if site.plan is None or site.plan.spec is None or form in site.probed:
            return
        if event.operands[0].dtype not in SUPPORTED_DTYPES:
            return  # the model's own arithmetic ran, and no op has any for it
        site.probed.add(form)
        x, spec = event.operands[0], site.plan.spec
        weight, eps = site.weight_and_eps(event.norm, x.dtype)
        for family in probes.FAMILIES:
            seed = probes.site_seed(self._seed, path, family)
            made = probes.operands(family, len(event.operands), x.shape[-1], x.dtype, x.device, eps, seed)
            gate = None
            if event.gate is not None:
                (gate,) = probes.operands("randn", 1, x.shape[-1], event.gate.dtype, x.device, eps, seed + 1)
            given = made if gate is None else (*made, gate)
            if form == "norm":
                total, found, actual = made[0], Difference(), type(event.norm).forward(event.norm, *given)
            elif form == "norm_add":
                total, (found, actual) = made[0], self._probe_norm_add(spec, made, weight, eps)
                made = made[:1]
            else:
                total = made[0] + made[1]
                actual, returned = ops.bind_fused_add_rms_norm(spec, self._backend)(*made, weight, eps)
                found = compare_sum(returned, total)
            expected = _original(event.norm, total, gate)
            dtype = site.judged_dtype(event.norm, total.dtype, expected.dtype, event.backend)
            found = found + _compare_as(dtype, actual, expected)
            name = f"{form}:{family}"
            self._put(site, name, event.backend, dtype, found)
            self._measure_exact(site, name, event.norm, made, actual, expected, gate)

    def _probe_norm_add(
        self, spec: NormSpec, made: tuple[torch.Tensor, ...], weight: torch.Tensor | None, eps: float
    ) -> tuple[Difference, torch.Tensor]:
        """What the norm gives alone, and how far the ops with the add behind it are from that, an addition and the
        fused op: all in bits."""
        x, residual = made
        normed = ops.bind_rms_norm(spec, self._backend)(x, weight, eps)
        next_normed, total = ops.bind_fused_add_rms_norm(spec, self._backend)(normed, residual, weight, eps)
        found = compare_sum(bind_norm_add(spec, self._backend)(x, residual, weight, eps), total)
        both = bind_norm_add_norm(spec, self._backend)(x, residual, weight, eps, weight, eps)
        for mine, separate in zip(both, (next_normed, total), strict=True):
            found = found + compare_sum(mine, separate)
        return found, normed

    def proofs(self) -> tuple[SiteProof, ...]:
        return tuple(self._proof(path, site) for path, site in self._sites.items())

    def failing_inputs(self, path: str) -> dict[str, torch.Tensor]:
        """A few rows of the operands of the first failing call at `path`, with the weight and both results."""
        return dict(self._sites[path].failing) if path in self._sites else {}

    def _proof(self, path: str, site: _Site) -> SiteProof:
        measured = []
        for (name, backend, dtype), found in site.found.items():
            tolerance = _tolerance(site, backend, dtype)
            violations = found.violations(tolerance, dtype)
            fused_error, original_error = site.exact[name].relative() if name in site.exact else (None, None)
            if site.differs_by_design and (name.startswith("pair:") or name.endswith(":fp32 sum")):
                violations = _exact_violations(found, fused_error, original_error)
            measured.append(
                Measurement.of(name, backend, dtype, found, tolerance, violations, fused_error, original_error)
            )
        return SiteProof(
            path=path,
            class_name=site.plan.class_name if site.plan is not None else "",
            calls=dict(site.calls),
            backends=dict(site.backends),
            reasons=dict(site.reasons),
            measurements=tuple(measured),
            singles=dict(site.singles),
            unrotated=dict(site.unrotated),
        )


def _ignore(event: observe.Event) -> None:
    """Calls that the proof itself makes are not the model's."""


def _original(norm: nn.Module, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    original: Any = original_class(type(norm))
    return original.forward(norm, x) if gate is None else original.forward(norm, x, gate)


def _rotation_error(event: observe.Event) -> Difference:
    """What is wrong with a rotation in the norm's launch: it has the bits of the norm's own result, rotated."""
    made = event.rotation
    if made is None:
        return Difference()
    x = event.normed if made.head_axis == 1 else event.normed.transpose(1, 2)
    expected = rotation.rotate(x, made.cos, made.sin)
    if made.rotated.shape != expected.shape or made.rotated.dtype != expected.dtype:
        return Difference(
            error=f"rotated {tuple(made.rotated.shape)} {made.rotated.dtype}, not {tuple(expected.shape)}"
        )
    wrong = bit_mismatches(made.rotated, expected)
    return (
        Difference(error=f"{wrong} of {expected.numel()} rotated elements have other bits") if wrong else Difference()
    )


def _tolerance(site: _Site, backend: str, dtype: torch.dtype) -> SiteTolerance:
    rows = SITE if site.plan is None or site.plan.gating is None else GATED
    return EXACT if backend in _ORIGINAL_ARITHMETIC else rows.get(dtype, EXACT)


def _compare_as(dtype: torch.dtype, actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    if actual.dtype == expected.dtype:
        actual, expected = actual.to(dtype), expected.to(dtype)
    return compare(actual, expected)


def _exact_violations(found: Difference, fused_error: float | None, original_error: float | None) -> tuple[str, ...]:
    violations = [found.error] if found.error else []
    if found.sum_mismatches:
        violations.append(
            f"residual sum: {found.sum_mismatches} of {found.sum_elements} elements not bit-equal to a + b"
        )
    if fused_error is None or original_error is None:
        return tuple(violations)
    if not fused_error <= EXACT_ERROR_RATIO * original_error:
        violations.append(f"error against fp64 {fused_error:.3e}, the original's is {original_error:.3e}")
    return tuple(violations)


def _excerpt(named: dict[str, torch.Tensor], norm: nn.Module, worst: int) -> dict[str, torch.Tensor]:
    """The rows about `worst`, and the norm's parameters: what a replay needs."""
    kept = {}
    for name, tensor in named.items():
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        start = max(0, min(worst - _KEPT_ROWS // 2, rows.shape[0] - _KEPT_ROWS))
        kept[name] = rows[start : start + _KEPT_ROWS].cpu().clone()
    for name, parameter in norm.named_parameters(recurse=False):
        kept[name] = parameter.detach().cpu().clone()
    return kept
