"""plan, apply, verify, status, revert, patched: what a user calls. `rmsnorm_patch` re-exports all of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from .backends.names import BACKENDS, Backend
from .errors import PatchConflict, UnsupportedInput, UnsupportedModel
from .numerics.spec import SUPPORTED_DTYPES
from .ops import dispatch
from .pairs.layout import ModelLayout, layout
from .patch_state import check_module, derives_from_patched
from .rewrite import (
    LOCK,
    applied_report,
    apply_plan,
    inductor,
    patched_paths,
    registries,
    revert_model,
    wrapped_paths,
)
from .rewrite.classes import install_factories
from .rewrite.report import Report, Settings
from .rewrite.status import Status, status_of
from .scan import quantised
from .scan.dtypes import expect
from .scan.norms import scan_norms
from .scan.plan import Compiled, NormSite, Plan

if TYPE_CHECKING:
    from .rewrite.warmup import Prepared

install_factories()  # now: a child forked while another thread imports a module waits for it for ever


def plan(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    backend: Backend = "auto",
    compiled: Compiled = "model",
) -> Plan:
    """What `apply` would do to `model`, and why; nothing is changed.

    include, exclude: `fnmatch` patterns on module paths of norms, e.g. ["model.layers.*"]; no include means all.
    backend: "auto" is what RMSNORM_PATCH_BACKEND names, else it chooses by device and capability at each call;
        "reference" is the model's own arithmetic in the rewritten layers; "triton" and "cuda" force one.
    compiled: what the graphs of `torch.compile` hold. "model" is the model's own arithmetic. "joined": in graphs that
        are captured (`mode="reduce-overhead"`) a norm takes over the split product in front; its bits are then those of
        the patched model in eager mode, and not those that Inductor gives the unpatched one.
    For a model that is patched with these settings it is the plan that was carried out.
    Raises UnsupportedModel (no module, no RMSNorm, a pattern that matches no norm), UnsupportedInput (another option),
    PatchConflict (patched with other settings).
    """
    settings = _settings(model, include, exclude, backend, compiled)
    with LOCK:
        done = _earlier(model, settings)
        return _scan(model, settings)[0] if done is None else done.plan


def apply(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    backend: Backend = "auto",
    compiled: Compiled = "model",
    verify: Any = None,
    **verify_options: Any,
) -> Report:
    """Patch `model` in place, wholly or not at all.

    Applied again with the same settings it changes nothing; where modules were replaced or wrapped in the meantime it
    patches what is there now. verify: inputs as `rmsnorm_patch.verify` takes them; the model is then proved right
    after patching, and restored if the proof fails or proves nothing. None and False: no proof. verify_options go to
    `verify`.
    Raises what `plan` raises; UnsupportedModel where no norm is left to fuse; VerificationFailed, NothingProved.
    """
    verify = None if verify is False else verify
    _check_options(verify, verify_options)
    settings = _settings(model, include, exclude, backend, compiled)
    with LOCK:
        report = _earlier(model, settings)
        if report is None:
            wanted, found = _scan(model, settings)
            _check_something_to_do(wanted)
            revert_model(model)  # what an earlier apply with these settings left on modules that have moved since
            report = apply_plan(model, wanted, found)
        registries.enter({type(module) for module in model.modules()})
    if verify is None:
        return report
    try:
        proof = globals()["verify"](model, verify, **verify_options)
    except BaseException:
        revert_model(model)
        raise
    return report.with_proof(proof)


def verify(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """Prove a patched model against the unpatched one on `inputs`: per site, logits, and that the fused calls ran.

    The model may serve other threads meanwhile: it is neither called nor changed. Returns the proof's report; raises
    VerificationFailed, which holds it, and NothingProved. See `rmsnorm_patch.proof.verify`.
    """
    from .proof import verify as prove

    _check_known("verify", options, ("model", "inputs", *_proof_options()))
    _check_proof(model, options)
    return prove(model, inputs, **options)


def status(model: nn.Module) -> Status:
    """How the calls of a patched `model` went since `apply`: fused, handed over, alone, fallen back, and why.

    Everything is counted, whether or not somebody asks, in all threads of this process. Copies and pickles start at
    zero, `revert` forgets, a proof's own calls do not count. A forked child goes on from its parent's counts.
    Not counted are calls inside graphs of `torch.compile` and replays of CUDA graphs. Asking runs nothing on a device.
    Raises UnsupportedModel where nothing of `model` is patched.
    """
    check_module(model)
    found = status_of(model)
    if found is None:
        raise _not_patched(model)
    return found


def revert(model: nn.Module) -> None:
    """Give every module of `model` the class, forward and `__dict__` that it had; for an unpatched model, nothing.

    Copies and unpickled copies of a patched model are reverted the same way, each for itself.
    """
    check_module(model)
    revert_model(model)


def warmup(model: nn.Module, dtype: torch.dtype | str | None = None) -> tuple[Prepared, ...]:
    """Compile and load every kernel that a patched `model` uses where it is now; returns what was made ready.

    dtype: of the hidden states, "bfloat16" for example; by default that of most parameters. Kernels are otherwise
        compiled at their first call, which a latency target or the capture of a CUDA graph may not allow. On the CPU
        there is nothing to do: ().
    Raises UnsupportedModel for a model that is not patched, UnsupportedInput for a dtype that has no kernels,
    KernelBuildError where a kernel cannot be built.
    """
    check_module(model)
    wanted = None if dtype is None else _dtype(dtype)
    report = applied_report(model)
    if report is None:
        raise _not_patched(model)
    from .rewrite.warmup import prepare

    return prepare(model, report.plan, wanted)


@contextmanager
def patched(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    backend: Backend = "auto",
    compiled: Compiled = "model",
) -> Iterator[Report]:
    """`model` patched within the block. One that was patched before with the same settings stays so afterwards."""
    before = None if not isinstance(model, nn.Module) else applied_report(model)
    report = apply(model, include=include, exclude=exclude, backend=backend, compiled=compiled)
    try:
        yield report
    finally:
        if before is None:
            revert(model)


def _scan(model: nn.Module, settings: Settings) -> tuple[Plan, ModelLayout]:
    norms, notes = expect(model, scan_norms(model, settings.include, settings.exclude))
    found = layout(model, norms)
    pairs = found.pairs()
    query_key = found.query_key(pairs, dispatch.requested_backend(settings.backend))
    changed = [site.path for site in norms if site.action == "fuse"]
    changed += [pair.layer for pair in pairs if pair.action == "fuse"]
    changed += [site.layer for site in query_key if site.action == "fuse"]
    wanted = Plan(
        model_class=type(model).__name__,
        backend=settings.backend,
        norms=norms,
        pairs=pairs,
        include=settings.include,
        exclude=settings.exclude,
        notes=(
            *notes,
            *quantised.notes(model),
            *registries.notes({type(model.get_submodule(path)): None for path in changed}),
        ),
        query_key=query_key,
        compiled=settings.compiled,
    )
    return wanted, found


def _earlier(model: nn.Module, settings: Settings) -> Report | None:
    """The report of an earlier apply that still holds for the whole of `model`; PatchConflict for other settings."""
    covered: list[str] = []
    for path, module in model.named_modules():
        report = applied_report(module)
        if report is not None:
            if report.settings != settings:
                raise PatchConflict(
                    path or type(model).__name__,
                    f"{settings} for a model that is patched with {report.settings}",
                    "one set of settings at a time",
                    "call revert(model) first, or pass the settings that it has",
                )
            covered.append(path)
        elif derives_from_patched(type(module)) and not any(_is_below(path, root) for root in covered):
            raise PatchConflict(
                path or type(model).__name__,
                "a module that was patched as part of a larger model",
                "applying to that model, or to unpatched modules",
                "call revert on this module first",
            )
    report = applied_report(model)
    if report is None or (report.norms, report.layers, report.attentions) != patched_paths(model):
        return None
    if set(report.wrapped) - set(wrapped_paths(model)):  # a wrapper came off, and what stood under it can be patched
        return None
    return report


def _is_below(path: str, root: str) -> bool:
    return root == "" or path == root or path.startswith(f"{root}.")


def _check_something_to_do(wanted: Plan) -> None:
    if any(wanted.fused_norms()):
        return
    first: NormSite = wanted.norms[0]
    raise UnsupportedModel(
        wanted.model_class,
        f"no norm to fuse out of {len(wanted.norms)} ({first.path}: {first.reason})",
        "models with at least one RMSNorm selected",
        "look at plan(model), and widen include= or narrow exclude=",
    )


def _settings(
    model: Any, include: Sequence[str], exclude: Sequence[str], backend: Any, compiled: Any = "model"
) -> Settings:
    check_module(model)
    chosen = _patterns("include", include), _patterns("exclude", exclude)
    if backend not in BACKENDS:
        raise UnsupportedInput(
            "backend", repr(backend), ", ".join(map(repr, BACKENDS)), "pass one of these; 'auto' chooses by device"
        )
    _check_backend_runs(model, backend)
    requested = dispatch.requested_backend(backend)
    inductor.check(compiled, requested)
    return Settings(requested, *chosen, compiled)


def _patterns(option: str, given: Any) -> tuple[str, ...]:
    """The patterns as a tuple, read once: an iterator would be empty the second time, and no include means all."""
    patterns = () if given is None else given
    if not isinstance(patterns, str) and isinstance(patterns, Iterable):
        patterns = tuple(patterns)
    if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UnsupportedInput(
            option, repr(given), "a sequence of fnmatch patterns on module paths", f"pass {option}=['model.*']"
        )
    return patterns


def _check_backend_runs(model: nn.Module, backend: Backend) -> None:
    """A forced backend must be able to run where the model is."""
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    for device in sorted(devices, key=str):
        if device.type != "meta":  # not loaded yet: where it will be is not known
            check_backend(backend, device)


def check_backend(backend: Backend, device: torch.device) -> None:
    """Raise UnsupportedInput where `backend`, or what RMSNORM_PATCH_BACKEND puts in place of "auto", is forced and
    cannot run on `device`."""
    asked = dispatch.requested_backend(backend)
    why, step = dispatch.cannot_run(asked, device)
    if why:
        by_variable = backend != asked
        raise UnsupportedInput(
            f"{dispatch.BACKEND_VARIABLE if by_variable else 'backend'}={asked!r}",
            f"a model on {device}: {why}",
            "devices on which it runs",
            f"{step}, or " + (f"unset {dispatch.BACKEND_VARIABLE}" if by_variable else "pass backend='auto'"),
        )


def _dtype(given: Any) -> torch.dtype:
    """The dtype, or the one of that name."""
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found not in SUPPORTED_DTYPES:
        names = ", ".join(map(str, SUPPORTED_DTYPES))
        raise UnsupportedInput("dtype", repr(given), names, "pass one of these, or none for that of the model")
    return found  # type: ignore[no-any-return]


def _not_patched(model: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(
        type(model).__name__, "a model that is not patched", "patched models", "call apply(model) first"
    )


def _check_proof(model: Any, options: dict[str, Any]) -> None:
    """What a proof cannot be made with, before the model is run."""
    from .proof.options import check_options

    check_module(model)
    check_options(options)
    weights = list(model.parameters())
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules()) if weights else False
    if weights and all(weight.is_meta for weight in weights) and not is_offloaded:
        raise UnsupportedModel(
            type(model).__name__,
            "a model on the meta device, which has no weights to run with",
            "models that are loaded; plan and apply take this one too",
            "load the weights, then verify",
        )


def _check_options(inputs: Any, options: dict[str, Any]) -> None:
    """Unknown options are refused before anything is patched."""
    named = ("include", "exclude", "backend", "compiled", "verify")
    _check_known("apply", options, named if inputs is None else (*named, *_proof_options()))


def _proof_options() -> tuple[str, ...]:
    from .proof import verify as prove

    return tuple(inspect.signature(prove).parameters)[2:]


def _check_known(function: str, options: dict[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise UnsupportedInput(
            f"{function}({unknown[0]}=...)", "an unknown option", ", ".join(allowed), "correct the name, or drop it"
        )
