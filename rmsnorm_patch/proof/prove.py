"""`verify`: run the patched and the original model on the same inputs, and make all five judgements."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from ..errors import NothingProved, UnsupportedInput, UnsupportedModel, VerificationFailed
from ..rewrite import applied_report, observe
from ..scan.plan import NormSite, Plan
from ..scan.probe import dtype_name
from . import driven, flow, logits, memory, wide
from .calls import judge as judge_calls
from .options import check_options
from .recorded import check_recording, compare_logits, record_logits
from .replica import replica
from .report import FlowProof, GreedyProof, LogitProof, Proof, versions
from .runs import FORWARD, GREEDY, Inputs, Run, can_generate, checked, device_name, dtype_of, normalise
from .sites import SiteWatcher

Reference = Literal["auto", "wide", "original"]
DEFAULT_SPACE = 2 << 30
_log = logging.getLogger(__name__)


def verify(
    model: nn.Module,
    inputs: Inputs,
    *,
    sites: Sequence[str] | None = None,
    seed: int = 0,
    reference: Reference = "auto",
    greedy_tokens: int = 16,
    strict: bool = False,
    record: str | Path | None = None,
    compare: str | Path | None = None,
    save_failure: str | Path | None = None,
    raise_on_failure: bool = True,
    space: int = DEFAULT_SPACE,
    source: str = "",
    arguments: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Proof:
    """Prove a patched model against its unpatched self, while it may serve other threads.

    Everything runs on replicas of `model` (`replica`): same classes, hooks and links, the same parameters. `model`
    itself is not called and not changed. An unpatched model is refused: patching here would prove another object.

    inputs: keyword arguments as a dict of tensors, a tensor of token ids, or a list of those; a few hundred tokens say
        as much as many. Logits of three runs are kept on the CPU.
    sites: module paths of norms to judge one by one; the rest is still counted. seed: of the made operands.
    reference: what logits are measured from. "wide": a copy of the weights in fp32 (fp64 for an fp32 model), made for
        that run alone, twice the model's memory. "original": the original under permitted rounding. "auto": "wide"
        where memory and weights allow, else "original" with a note.
    greedy_tokens: generated from the first input by causal models; 0 leaves greedy out.
    strict: red also where a call fell back with a stated reason, and where a greedy token turned on a near-tie.
    record, compare: safetensors file to write this model's logits to, or to hold them against (`record_logits`,
        `compare_logits`), once the proof is green.
    save_failure: safetensors file for the failing rows of the worst site, written only when the proof is red.
    space: bytes of norm outputs kept (on the CPU) for the judgement of data flow; a longer input is shortened for it.
    source, arguments: checkpoint folder or name and further words, for the command that repeats the proof.
    progress: called with what the proof will take in memory, then with each step's number and name; by default they are
        logged (INFO).

    Raises UnsupportedModel (not patched), UnsupportedInput (too little memory for these inputs, among others),
    NothingProved for inputs without a position. Unless `raise_on_failure` is False, raises VerificationFailed, whose
    `proof` is the report, where something is red; NothingProved, one of its kind, where nothing is and nothing could
    have been: NaN or Inf in the original's logits, a mask of zeros, no site judged.
    """
    options: dict[str, Any] = dict(
        sites=sites, seed=seed, reference=reference, greedy_tokens=greedy_tokens, strict=strict
    )
    options |= dict(record=record, compare=compare, save_failure=save_failure, raise_on_failure=raise_on_failure)
    check_options({**options, "space": space, "source": source, "arguments": arguments, "progress": progress})
    plan, prefix = applied_plan(model)
    items = normalise(inputs, model)
    if compare is not None:
        check_recording(model, compare)
    standing = replica(model)  # the model of this moment, whatever other threads do to it from now on
    work = _Work(standing, plan, prefix, seed, strict, space, _Steps(progress or _log.info), sites)
    proof = work.proof(items, reference, greedy_tokens, source)
    proof = replace(proof, arguments=tuple(arguments))
    if save_failure is not None and proof.verdict == "failed":
        proof = work.save_failure(proof, Path(save_failure))
    if proof.passed:
        proof = _with_files(proof, standing, inputs, record, compare)
    if raise_on_failure and proof.verdict == "failed":
        raise VerificationFailed(
            proof.red_site or proof.model_class,
            proof.explain(),
            "the tolerances of rmsnorm_patch.numerics.tolerances",
            f"revert the model, leave the site out with exclude=, and report this; again with: {proof.command()}",
            proof,
        )
    if raise_on_failure and not proof.passed:
        raise NothingProved(
            proof.model_class,
            proof.explain(),
            "inputs and sites at which a fault would show",
            "pass inputs that the model answers with finite logits, and leave sites= out or name one",
            proof,
        )
    return proof


def applied_plan(model: nn.Module) -> tuple[Plan, str]:
    """(plan that was carried out, prefix of its paths below `model`). Raises UnsupportedModel."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        report = applied_report(module)
        if report is not None:
            return report.plan, f"{path}." if path else ""
    raise UnsupportedModel(
        type(model).__name__,
        "a model that is not patched",
        "models that rmsnorm_patch.apply has patched",
        "call rmsnorm_patch.apply(model) first, or rmsnorm_patch.apply(model, verify=inputs)",
    )


@dataclass
class _Seen:
    """What the runs of one proof left behind."""

    original: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    patched: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    tapes: list[tuple[Run, flow.Tape]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    orders: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    wide: list[torch.Tensor] | None = None
    permitted: list[torch.Tensor] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Steps:
    """Numbers the steps that are told."""

    tell: Callable[[str], None]
    total: int = 0
    done: int = 0

    def __call__(self, step: str) -> None:
        self.done += 1
        self.tell(f"{self.done}/{max(self.total, self.done)} {step}")


@dataclass
class _Work:
    """One proof in the making. `model` never runs: each phase has a replica of its own, so that what a forward leaves
    on its modules does not reach the next phase."""

    model: nn.Module
    plan: Plan
    prefix: str
    seed: int
    strict: bool
    space: int
    step: _Steps
    only: Sequence[str] | None

    def __post_init__(self) -> None:
        self.sites: dict[str, NormSite] = {self.prefix + site.path: site for site in self.plan.fused_norms()}
        if self.only is not None and (unknown := [path for path in self.only if path not in self.sites]):
            raise UnsupportedInput(
                f"sites: {unknown[0]}", "a path that the plan does not fuse", ", ".join(self.sites), "pass one of these"
            )
        chosen = None if self.only is None else frozenset(self.only)
        self.watcher = SiteWatcher(self.sites, self.plan.backend, self.seed, chosen)
        self.seen = _Seen()

    def _norms(self, model: nn.Module) -> dict[str, nn.Module]:
        there = dict(model.named_modules(remove_duplicate=False))
        if gone := [path for path in self.sites if path not in there]:
            raise UnsupportedModel(
                gone[0],
                "no module of that path: it was moved or replaced since apply",
                "models whose norms are where apply found them",
                "call apply(model) again, then verify",
            )
        return {path: there[path] for path in self.sites}

    def proof(self, items: list[dict[str, Any]], reference: Reference, tokens: int, source: str) -> Proof:
        runs = [Run(f"{FORWARD} {number}", item) for number, item in enumerate(items)]
        greedy = Run(GREEDY, items[0], tokens) if tokens and can_generate(self.model, items[0]) else None
        everything = [*runs, greedy] if greedy is not None else runs
        self.step.total = 3 * len(everything) + 1 + len(driven.FAMILIES)
        reference = self._room(everything, reference)
        self._original(everything, runs, reference)
        self._patched(everything)
        self._driven(runs[0])
        flow_proof = self._flow()
        logit_proof = self._judge_logits(runs)
        greedy_proof = self._judge_greedy(greedy, logit_proof)
        sites = self.watcher.proofs()
        return Proof(
            model_class=type(self.model).__name__,
            source=source or str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or ""),
            dtype=dtype_name(dtype_of(self.model)),
            device=device_name(self.model),
            backend=self.plan.backend,
            seed=self.seed,
            versions=versions(),
            sites=sites,
            flow=flow_proof,
            logits=logit_proof,
            greedy=greedy_proof,
            fired=judge_calls(
                self.model, self.plan, self.prefix, sites, self.seen.calls, len(runs), self.seen.orders, self.strict
            ),
            notes=tuple(self.seen.notes),
        )

    def save_failure(self, proof: Proof, path: Path) -> Proof:
        from safetensors.torch import save_file

        kept = self.watcher.failing_inputs(proof.red_site)
        if not kept:
            return proof
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, path, metadata={"site": proof.red_site, "model_class": proof.model_class, **proof.versions})
        return replace(proof, saved_failure=str(path))

    def _room(self, everything: list[Run], reference: Reference) -> Reference:
        """Says what the proof takes and refuses what does not fit; without a wide copy where only that is too much."""
        norms = list(self._norms(self.model).values())
        needed = memory.of_proof(self.model, everything, norms, self.space)
        if reference != "original":
            try:
                with_copy = wide.needed(self.model, needed)
            except wide.Unavailable as why:
                self._without_wide_run(why, reference, "models with room for a copy")
                reference = "original"
            else:
                needed = with_copy
        self.step.tell(memory.said(needed))
        memory.check(needed)
        return reference

    def _without_wide_run(self, why: wide.Unavailable, asked: Reference, supported: str) -> None:
        """Notes it, or refuses where a wider run was asked for."""
        if asked == "wide":
            raise UnsupportedInput("reference='wide'", str(why), supported, "pass reference='original'") from why
        self.seen.notes.append(f"logits are measured from the original, not from a wider run: {why}")

    def _original(self, everything: list[Run], forwards: list[Run], reference: Reference) -> None:
        """Runs of the original model: outputs, norm calls, and what logits are measured from."""
        original = replica(self.model, patched=False)
        norms = self._norms(original)
        for run in everything:
            self.step(f"original: {run.name}")
            with flow.counting(norms) as (calls, order):
                self.seen.original.append(checked(run, original))
            if not run.tokens:
                self.seen.calls.update(calls)
                self.seen.orders[0].extend(order)
        if reference != "original":
            self.step(f"original in {wide.wide_dtype(self.model)}")
            try:
                self.seen.wide = wide.wide_outputs(self.model, forwards)
            except wide.Unavailable as why:
                self._without_wide_run(why, reference, "models that run in it")
        if self.seen.wide is None or logits.routes_to_experts(self.model):
            self.step("original under permitted rounding")
            with flow.permitted_rounding(norms, self.seed):
                self.seen.permitted = [run(original)[0] for run in forwards]

    def _patched(self, everything: list[Run]) -> None:
        patched = replica(self.model)
        self.watcher.watch(patched)
        for run in everything:
            self.step(f"patched: {run.name}")
            self.watcher.run = "decode" if run.tokens else "captured"
            order: list[str] = []
            tape = flow.Tape(self.space)
            fits = True

            def listen(path: str, event: observe.Event, order: list[str] = order, tape: flow.Tape = tape) -> None:
                nonlocal fits
                if flow.is_call(event):
                    order.append(path)
                    fits = tape.add(path, event) and fits

            self.watcher.listener = listen
            with observe.observing(self.watcher):
                outputs = run(patched)
            self.seen.patched.append(outputs)
            if not run.tokens:
                self.seen.orders[1].extend(order)
            tape.outputs = outputs
            if not fits:
                run, tape = self._shorter(patched, run, tape)
            if tape.calls:
                self.seen.tapes.append((run, tape))
        self.watcher.listener = None

    def _shorter(self, patched: nn.Module, run: Run, full: flow.Tape) -> tuple[Run, flow.Tape]:
        """The same run over as many leading tokens as fit the tape, and its tape."""
        ids = run.inputs.get("input_ids")
        share = self.space / max(full.wanted, 1) / 2
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or int(ids.shape[1] * share * ids.shape[0]) < 1:
            self.seen.notes.append(f"data flow of {run.name} not judged: its norms' outputs are {full.wanted} bytes")
            return run, flow.Tape(0)
        batch, length = ids.shape
        keep = max(1, min(length, int(length * share * batch)))
        cut = {
            name: value[:1, :keep] if isinstance(value, torch.Tensor) and value.shape[:2] == ids.shape else value
            for name, value in run.inputs.items()
        }
        self.seen.notes.append(
            f"data flow of {run.name} judged on 1 sequence of {keep} tokens, {batch} x {length} do not fit"
        )
        shorter, tape = Run(run.name, cut, min(run.tokens, keep)), flow.Tape(self.space)
        with observe.observing(lambda event: tape.observe(self.watcher.path_of, event)):
            tape.outputs = shorter(patched)
        return shorter, tape

    def _driven(self, run: Run) -> None:
        """The probe families through the patched layers; see `driven`."""
        layers = {self.prefix + pair.layer for pair in self.plan.fused_pairs()}
        size = next((site.hidden_size for site in self.sites.values() if site.hidden_size), None)
        scales = self.watcher.sum_rms
        if not layers or not scales:
            return
        patched = replica(self.model)
        self.watcher.watch(patched)
        embedding, norms = _embedding(patched), self._norms(patched).values()
        hidden = self.watcher.sum_width or size or 0
        dtype, eps = dtype_of(self.model), self.watcher.eps
        modules = [patched.get_submodule(path) for path in sorted(layers)]
        for family in driven.FAMILIES:
            self.step(f"patched, driven: {family}")
            self.watcher.run = f"driven:{family}"
            factor = driven.factors(family, hidden, dtype, eps, statistics.median(scales.values()))
            with driven.scaled(embedding, modules, norms, factor), observe.observing(self.watcher):
                run(patched)

    def _flow(self) -> FlowProof:
        """The original in lockstep with each tape."""
        calls, first, site, reproducible = 0, "", "", True
        original = replica(self.model, patched=False)
        norms = self._norms(original)
        for run, tape in self.seen.tapes:
            self.step(f"data flow: {run.name}")
            done = flow.replay(original, run, tape, norms)
            calls += done.calls
            if done.first_difference and not first:
                first, site = f"{run.name}: {done.first_difference}", done.site
                reproducible = flow.reproducible(replica(self.model, patched=False), run)
        names = tuple(run.name for run, _ in self.seen.tapes)
        return FlowProof(calls, names, first, site, reproducible)

    def _judge_logits(self, runs: list[Run]) -> LogitProof | None:
        def positions(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [logits.rows(out, run.inputs) for out, run in zip(outputs, runs, strict=True)]

        seen = self.seen
        return logits.judge(
            positions([out[0] for out in seen.original[: len(runs)]]),
            positions([out[0] for out in seen.patched[: len(runs)]]),
            None if seen.wide is None else positions(seen.wide),
            None if seen.permitted is None else positions(seen.permitted),
            "original" if seen.wide is None else dtype_name(wide.wide_dtype(self.model)),
            logits.routes_to_experts(self.model),
        )

    def _judge_greedy(self, run: Run | None, logit_proof: LogitProof | None) -> GreedyProof | None:
        if run is None or logit_proof is None:
            return None
        return logits.judge_greedy(self.seen.original[-1], self.seen.patched[-1], logit_proof.own_max_abs, self.strict)


def _with_files(
    proof: Proof, model: nn.Module, inputs: Inputs, record: str | Path | None, compare: str | Path | None
) -> Proof:
    notes = list(proof.notes)
    if record is not None:
        record_logits(model, inputs, record)
        notes.append(f"logits recorded in {record}")
    if compare is not None:
        notes.append(compare_logits(model, compare).explain())
    return replace(proof, notes=tuple(notes))


def _embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError, TypeError):
        return None
