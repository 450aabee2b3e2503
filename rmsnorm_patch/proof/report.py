"""What a proof found: frozen objects, the same after a trip through JSON."""

from __future__ import annotations

import json
import platform
import shlex
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import metadata
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ..numerics.tolerances import SiteTolerance, scale_bias
from ..page import page, summarised
from ..scan.probe import dtype_name
from .difference import FAR, HUGE, Difference

Verdict = Literal["proved", "failed", "nothing proved"]


@dataclass(frozen=True)
class Measurement:
    """One comparison at one site, summed over the calls of a run.

    name: "captured" (the model's own inputs), "decode" (greedy generation), "driven:<family>" (the patched layers fed
        made hidden states), "norm:<family>"/"pair:<family>" (the fused op alone on made operands).
    max_ulp, differing, bias, sum_mismatches: as in `Difference`, `allowed_*`: the tolerance they were held to.
    fused_error, original_error: relative rms error against fp64, on made operands only.
    severity: the largest of the ratios measured/allowed; above 1 is red.
    """

    name: str
    backend: str
    dtype: str
    elements: int
    max_ulp: int
    allowed_ulp: int
    differing: int
    allowed_differing: int
    bias: float
    allowed_bias: float
    sum_mismatches: int
    violations: tuple[str, ...]
    severity: float
    fused_error: float | None = None
    original_error: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        backend: str,
        dtype: torch.dtype,
        difference: Difference,
        tolerance: SiteTolerance,
        violations: tuple[str, ...],
        fused_error: float | None,
        original_error: float | None,
    ) -> Measurement:
        allowed = tolerance.allowed(difference.elements, difference.width, dtype)
        bias_bound = scale_bias(dtype, difference.elements, difference.width)
        severity = max(
            _ratio(difference.max_ulp, tolerance.max_ulp),
            _ratio(difference.differing, allowed),
            _ratio(abs(difference.bias), bias_bound),
        )
        if not violations:
            severity = min(severity, 1.0)  # a spec that differs by design may be further off than the tolerance
        else:
            severity = max(severity, 2.0**62 if difference.error or difference.sum_mismatches else 1.0)
        return cls(
            name=name,
            backend=backend,
            dtype=dtype_name(dtype),
            elements=difference.elements,
            max_ulp=difference.max_ulp,
            allowed_ulp=tolerance.max_ulp,
            differing=difference.differing,
            allowed_differing=allowed,
            bias=difference.bias,
            allowed_bias=bias_bound,
            sum_mismatches=difference.sum_mismatches,
            violations=violations,
            severity=severity,
            fused_error=fused_error,
            original_error=original_error,
        )

    @property
    def passed(self) -> bool:
        return not self.violations


def _ratio(value: float, bound: float) -> float:
    return 0.0 if not value else value / bound if bound else float(value) + 1.0


@dataclass(frozen=True)
class SiteProof:
    """One norm: how it ran in the model's own run, and how far from the original.

    calls: events by kind ("norm", "norm_add", "in_layer", "cross_layer", "kept", "taken", "together", "single",
        "unrotated"), "original" for norm calls that fell back to the original arithmetic, "apart" for adds that were
        not fused with their norm in the layer, "kept" for last adds of a layer that handed nothing over, "refused" for
        hand-overs that the norm rightly did not take, since something else reached it, "rotated" for those of
        "together" whose rotation was part of the call. reasons: why. singles: why norms of a query and a key did not
        share a call; unrotated: why their rotation was not part of it.
    """

    path: str
    class_name: str
    calls: dict[str, int]
    backends: dict[str, int]
    reasons: dict[str, int]
    measurements: tuple[Measurement, ...]
    singles: dict[str, int] = field(default_factory=dict)
    unrotated: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(m.passed for m in self.measurements)

    @property
    def worst(self) -> Measurement | None:
        return max(self.measurements, key=lambda m: m.severity, default=None)


@dataclass(frozen=True)
class FlowProof:
    """The data flow between the sites: the original model, its norms made to return what the patched run's
    norms returned, must meet bit-equal inputs at every norm and end in bit-equal outputs.

    That leaves a wrong rewrite (a sum not written, a stale or swapped value, a norm left out) nowhere to hide: there is
    no tolerance. calls: norm calls compared. first_difference: "" or the first place that differs, in words.
    reproducible: False where the original model does not reproduce itself bit for bit, which voids this judgement.
    """

    calls: int
    runs: tuple[str, ...]
    first_difference: str
    site: str
    reproducible: bool

    @property
    def passed(self) -> bool:
        return not self.first_difference or not self.reproducible


@dataclass(frozen=True)
class FiredProof:
    """What ran, against what the plan and a count of the original model's norm calls say must run.

    expected: calls of planned norms in the original run. fused: of those, calls that ran patched code. pairs_expected,
    pairs_fused: calls whose residual-add the plan puts into the norm's call, and those for which it happened.
    together_expected, together: calls of queries' and keys' norms that the plan puts into one launch, and those for
    which it happened; rotated_expected, rotated: the same with their rotation.
    fallbacks: "path: n calls, reason". missing: discrepancies without a reason; they are red.
    """

    expected: int
    fused: int
    pairs_expected: int
    pairs_fused: int
    fallbacks: tuple[str, ...]
    missing: tuple[str, ...]
    site: str = ""
    strict: bool = False
    together_expected: int = 0
    together: int = 0
    rotated_expected: int = 0
    rotated: int = 0

    @property
    def passed(self) -> bool:
        return self.fused > 0 and not self.missing and not (self.strict and self.fallbacks)


@dataclass(frozen=True)
class LogitProof:
    """The logits, teacher-forced.

    reference: "float32"/"float64" = a run of the same weights in that dtype; "original" = no wider run, the yardstick
        is then the original under permitted rounding (every norm's output off by the per-site tolerance).
    patched_error, own_error: rms over positions and vocabulary, relative to the logits' rms, against the reference
        (for "original": of the patched run and of the permitted rounding, against the original). own_error covers
        permitted rounding too where the model routes tokens to experts: a tie may then fall either way.
    ratio, allowed_ratio: patched_error / own_error and k.
    kl_mean, kl_max: KL(original || patched) in nats per position.
    undefined: positions at which the original has NaN or Inf (-Inf beside finite logits is a masked token, and counts
        as one); they are left out of all other figures.
    """

    reference: str
    positions: int
    patched_error: float
    own_error: float
    ratio: float
    allowed_ratio: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    max_abs: float
    own_max_abs: float
    bit_identical: bool
    nonfinite_mismatches: int
    experts: bool
    undefined: int = 0

    @property
    def proves_nothing(self) -> str:
        """Why these logits could not have shown a fault; "" where they could."""
        if not self.positions:
            return "no position of the inputs counts: every one is masked"
        if self.undefined:
            return f"the original's logits hold NaN or Inf at {self.undefined} of {self.positions} positions"
        if self.own_error >= HUGE and not self.bit_identical:
            return f"the original's own error is no number (reference {self.reference})"
        return ""

    @property
    def passed(self) -> bool:
        if self.nonfinite_mismatches:
            return False
        return self.bit_identical or self.ratio <= self.allowed_ratio


@dataclass(frozen=True)
class GreedyProof:
    """Greedy tokens of the original and of the patched model on the same prompts.

    first_difference: "" or where they part. margin: the original's best minus second-best logit there.
    allowed_margin: the margin below which the original's own error leaves the order of the two open.
    """

    tokens: int
    equal: bool
    first_difference: str
    margin: float | None
    allowed_margin: float
    strict: bool = False

    @property
    def passed(self) -> bool:
        return self.equal or (not self.strict and self.margin is not None and self.margin <= self.allowed_margin)


_MARKS = {True: "ok ", False: "RED", None: "-- "}


@dataclass(frozen=True)
class Proof:
    """The whole report of `verify`."""

    model_class: str
    source: str
    dtype: str
    device: str
    backend: str
    seed: int
    versions: dict[str, str]
    sites: tuple[SiteProof, ...]
    flow: FlowProof
    logits: LogitProof | None
    greedy: GreedyProof | None
    fired: FiredProof
    notes: tuple[str, ...] = field(default=())
    saved_failure: str = ""
    arguments: tuple[str, ...] = ()
    """Further words for `command`: what the caller gave on the command line."""

    @property
    def passed(self) -> bool:
        return self.verdict == "proved"

    @property
    def verdict(self) -> Verdict:
        """ "failed": something is red. "nothing proved": nothing is, and nothing could have been (`proves_nothing`)."""
        others = [judged for judged in (self.flow, self.logits, self.greedy) if judged is not None]
        red = not all(judged.passed for judged in (*self.sites, *others))
        if red or (not self.fired.passed and (self.fired.expected or self.fired.missing)):
            return "failed"
        return "nothing proved" if self.proves_nothing else "proved"

    @property
    def proves_nothing(self) -> str:
        """Why these inputs could not have shown a fault; "" where they could."""
        if not self.fired.expected:
            return "the inputs reach no norm that the plan fuses"
        if not any(site.measurements for site in self.sites):
            return "no site was judged"
        return "" if self.logits is None else self.logits.proves_nothing

    @property
    def worst_site(self) -> SiteProof | None:
        judged = (site for site in self.sites if site.worst is not None)
        return max(judged, key=lambda site: site.worst.severity if site.worst else 0.0, default=None)

    @property
    def red_site(self) -> str:
        """Path of the site to look at first when the proof is red; "" when it is green or no site is to blame."""
        if self.verdict != "failed":
            return ""
        if any(not site.passed for site in self.sites) and self.worst_site is not None:
            return self.worst_site.path
        return next((p.site for p in (self.flow, self.fired) if not p.passed), "")

    def verdicts(self) -> tuple[str, ...]:
        """One line per judgement, each starting with "ok", "RED", or "--" where it could not have been red."""
        return tuple(f"{_MARKS[passed]} {text}" for passed, text in self._lines())

    def explain(self) -> str:
        """The verdicts, the worst site with its numbers and tolerances, and the command that shows it again."""
        lines = [f"{self.model_class} {self.dtype} on {self.device}, backend {self.backend}: "]
        lines[0] += "NOT proved" if self.verdict == "failed" else self.verdict
        lines[0] += f", {self.proves_nothing}" if self.verdict == "nothing proved" else ""
        lines += [f"  {line}" for line in self.verdicts()]
        worst = self.worst_site
        if worst is not None and worst.worst is not None:
            lines.append(f"  worst site: {worst.path or '(root)'} ({worst.class_name}), {_numbers(worst.worst)}")
            if not worst.passed:
                lines += [f"    {m.name}: {text}" for m in worst.measurements for text in m.violations]
        lines += [f"  fell back: {text}" for text in self.fired.fallbacks]
        lines += [f"  note: {text}" for text in self.notes]
        if self.verdict == "failed":
            lines.append(f"  again: {self.command()}")
        if self.saved_failure:
            lines.append(f"  operands of the failing rows: {self.saved_failure}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """What `explain` says on a page: lines of at most 120 characters, those of a stack's layers counted."""
        return page(summarised(self.explain().splitlines()))

    def command(self) -> str:
        """The command line that repeats this proof, on the site to blame where there is one."""
        words = ["rmsnorm-patch", "verify", self.source or "MODEL", "--backend", self.backend, "--dtype", self.dtype]
        if self.red_site:
            words += ["--site", self.red_site]
        return shlex.join([*words, "--seed", str(self.seed), *self.arguments])

    def _lines(self) -> list[tuple[bool | None, str]]:
        red = [site.path for site in self.sites if not site.passed]
        judged = sum(bool(site.measurements) for site in self.sites)
        shown = ", ".join(red[:3]) + (f" and {len(red) - 3} more" if len(red) > 3 else "")
        outcome = f"{len(red)} outside tolerance: {shown}" if red else "all within"
        lines: list[tuple[bool | None, str]] = [(not red if judged else None, f"sites: {judged} judged, {outcome}")]
        lines.append((self.flow.passed, f"data flow: {_flow(self.flow)}"))
        if self.logits is not None:
            idle = self.logits.passed and self.logits.proves_nothing
            lines.append((None if idle else self.logits.passed, f"logits: {idle or _logits(self.logits)}"))
        if self.greedy is not None:
            lines.append((self.greedy.passed, f"greedy: {_greedy(self.greedy)}"))
        lines.append((self.fired.passed if self.fired.expected else None, f"fired: {_fired(self.fired)}"))
        return lines

    def to_dict(self) -> dict[str, Any]:
        judged = {"passed": self.passed, "verdict": self.verdict, "verdicts": list(self.verdicts())}
        return {**asdict(self), **judged, "red_site": self.red_site, "command": self.command()}

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Proof:
        return _read(cls, json.loads(text))


def _numbers(m: Measurement) -> str:
    distance = "NaN or Inf" if m.max_ulp >= FAR else f"{m.max_ulp} ulp"
    text = (
        f"{m.name} in {m.dtype} by {m.backend}: {distance} (allowed {m.allowed_ulp}), {m.differing} of {m.elements} "
        f"elements differ (allowed {m.allowed_differing}), scale {m.bias:+.1e} (allowed {m.allowed_bias:.1e})"
    )
    if m.sum_mismatches:
        text += f", {m.sum_mismatches} sums not bit-equal"
    if m.fused_error is not None and m.original_error is not None:
        text += f", error against fp64 {m.fused_error:.2e} (original {m.original_error:.2e})"
    return text


def _flow(flow: FlowProof) -> str:
    if flow.first_difference and flow.reproducible:
        return flow.first_difference
    if not flow.reproducible:
        return f"not judged, the original model does not reproduce itself bit for bit ({flow.first_difference})"
    return f"{flow.calls} norm inputs and the outputs of {', '.join(flow.runs)} bit-equal"


def _logits(logits: LogitProof) -> str:
    exact = "bit-identical to the original" if logits.bit_identical else f"ratio {logits.ratio:.3f}"
    return (
        f"{exact}, error {logits.patched_error:.2e} against the original's own {logits.own_error:.2e} "
        f"(allowed {logits.allowed_ratio} x, reference {logits.reference}), KL {logits.kl_mean:.1e}, "
        f"top-1 {logits.top1_agreement:.4f} over {logits.positions} positions, max abs {logits.max_abs:.2e}"
        + (f", {logits.nonfinite_mismatches} NaN or Inf on one side" if logits.nonfinite_mismatches else "")
    )


def _greedy(greedy: GreedyProof) -> str:
    if greedy.equal:
        return f"{greedy.tokens} tokens equal"
    return (
        f"tokens part at {greedy.first_difference}, where the original's two best logits are {greedy.margin} apart "
        f"(its own error leaves {greedy.allowed_margin:.2e} open)"
    )


def _fired(fired: FiredProof) -> str:
    if not fired.fused:
        return f"nothing fused ran, {fired.expected} calls expected" + "".join(
            f"; {text}" for text in fired.missing[:2]
        )
    text = f"{fired.fused} of {fired.expected} norm calls, {fired.pairs_fused} of {fired.pairs_expected} with their add"
    if fired.together_expected:
        text += f", {fired.together} of {fired.together_expected} queries' and keys' in one launch"
    if fired.rotated_expected:
        text += f", {fired.rotated} of {fired.rotated_expected} with their rotation"
    return text + "".join(f"; {line}" for line in fired.missing[:3])


def _read(kind: Any, value: Any) -> Any:
    """`value` (from JSON) as `kind`: dataclasses, tuples, dicts, optionals and plain values."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(next(a for a in arguments if a is not type(None)), value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{f.name: _read(hints[f.name], value[f.name]) for f in fields(kind)})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_read(arguments[0], item) for item in value)
    return value


def versions() -> dict[str, str]:
    """Versions that decide what numbers come out."""
    installed = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton", "rmsnorm_patch"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
