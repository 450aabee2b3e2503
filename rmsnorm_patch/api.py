"""plan, apply, verify, revert, patched: what a user calls. `rmsnorm_patch` re-exports all of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from .errors import PatchConflict, UnsupportedInput, UnsupportedModel
from .plan import BACKENDS, Backend, NormSite, Plan
from .rewrite import LOCK, applied_report, apply_plan, install_factories, patched_paths, revert_model
from .rewrite.classes import derives_from_patched
from .rewrite.report import Report, Settings
from .scan import scan_norms
from .scan.pairs import find_pairs

if TYPE_CHECKING:
    from .prepare import Prepared

install_factories()  # now: a child forked while another thread imports a module waits for it for ever


def plan(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), backend: Backend = "auto"
) -> Plan:
    """What `apply` would do to `model`, and why; nothing is changed.

    include, exclude: `fnmatch` patterns on module paths of norms, e.g. ["model.layers.*"]; no include means all.
    backend: "auto" chooses by device and capability at each call; "reference" is the model's own arithmetic in the
        rewritten layers; "triton" and "cuda" force one.
    For a model that is patched with these settings it is the plan that was carried out.
    Raises UnsupportedModel (no module, no RMSNorm, a pattern that matches no norm), UnsupportedInput (backend),
    PatchConflict (patched with other settings).
    """
    settings = _settings(model, include, exclude, backend)
    with LOCK:
        done = _earlier(model, settings)
        return _scan(model, settings) if done is None else done.plan


def apply(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    backend: Backend = "auto",
    verify: Any = None,
    **verify_options: Any,
) -> Report:
    """Patch `model` in place, wholly or not at all.

    Applied again with the same settings it changes nothing; where modules were replaced or wrapped in the meantime it
    patches what is there now. verify: inputs as `rmsnorm_patch.verify` takes them; the model is then proved right
    after patching, and restored if the proof fails. verify_options go to `verify`.
    Raises what `plan` raises; UnsupportedModel where no norm is left to fuse; VerificationFailed.
    """
    _check_options(verify, verify_options)
    settings = _settings(model, include, exclude, backend)
    with LOCK:
        report = _earlier(model, settings)
        if report is None:
            wanted = _scan(model, settings)
            _check_something_to_do(wanted)
            revert_model(model)  # what an earlier apply with these settings left on modules that have moved since
            report = apply_plan(model, wanted)
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

    Returns the proof's report; raises VerificationFailed, which holds it. See `rmsnorm_patch.proof.verify`.
    """
    from .proof import verify as prove

    return prove(model, inputs, **options)


def revert(model: nn.Module) -> None:
    """Give every module of `model` the class, forward and `__dict__` that it had; for an unpatched model, nothing.

    Copies and unpickled copies of a patched model are reverted the same way, each for itself.
    """
    _check_module(model)
    revert_model(model)


def warmup(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[Prepared, ...]:
    """Compile and load every kernel that a patched `model` uses where it is now; returns what was made ready.

    dtype: of the hidden states; by default that of most parameters. Kernels are otherwise compiled at their first call,
    which a latency target or the capture of a CUDA graph may not allow. On the CPU there is nothing to do: ().
    Raises UnsupportedModel for a model that is not patched, KernelBuildError where a kernel cannot be built.
    """
    _check_module(model)
    report = applied_report(model)
    if report is None:
        raise UnsupportedModel(
            type(model).__name__, "a model that is not patched", "patched models", "call apply(model) first"
        )
    from .prepare import prepare

    return prepare(model, report.plan, dtype)


@contextmanager
def patched(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = (), backend: Backend = "auto"
) -> Iterator[Report]:
    """`model` patched within the block. One that was patched before with the same settings stays so afterwards."""
    before = None if not isinstance(model, nn.Module) else applied_report(model)
    report = apply(model, include=include, exclude=exclude, backend=backend)
    try:
        yield report
    finally:
        if before is None:
            revert(model)


def _scan(model: nn.Module, settings: Settings) -> Plan:
    norms = scan_norms(model, settings.include, settings.exclude)
    return Plan(
        model_class=type(model).__name__,
        backend=settings.backend,
        norms=norms,
        pairs=find_pairs(model, norms),
        include=settings.include,
        exclude=settings.exclude,
    )


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
    if report is None or (report.norms, report.layers) != patched_paths(model):
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


def _settings(model: Any, include: Sequence[str], exclude: Sequence[str], backend: Any) -> Settings:
    _check_module(model)
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
            raise UnsupportedInput(
                option, repr(patterns), "a sequence of fnmatch patterns on module paths", f"pass {option}=['model.*']"
            )
    if backend not in BACKENDS:
        raise UnsupportedInput(
            "backend", repr(backend), ", ".join(map(repr, BACKENDS)), "pass one of these; 'auto' chooses by device"
        )
    _check_backend_runs(model, backend)
    return Settings(backend, tuple(include), tuple(exclude))


def _check_backend_runs(model: nn.Module, backend: Backend) -> None:
    """A forced backend must be able to run where the model is."""
    if backend not in ("cuda", "triton"):
        return
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    for device in sorted(devices, key=str):
        if device.type == "meta":  # not loaded yet; where it will be is not known
            continue
        if backend == "cuda":
            from . import cuda_backend as chosen
        else:
            from . import triton_backend as chosen  # type: ignore[no-redef]
        runs, why = chosen.available(device)
        if not runs:
            raise UnsupportedInput(
                f"backend={backend!r}", f"a model on {device}: {why}", "devices on which it runs",
                "move the model there, or pass backend='auto'",
            )


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UnsupportedModel("model", got, "a torch.nn.Module", "pass the model object itself (pipeline.model, say)")


def _check_options(inputs: Any, options: dict[str, Any]) -> None:
    """Unknown options are refused before anything is patched."""
    allowed = ["include", "exclude", "backend", "verify"]
    if inputs is not None:
        from .proof import verify as prove

        allowed += list(inspect.signature(prove).parameters)[2:]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise UnsupportedInput(
            f"apply({unknown[0]}=...)", "an unknown option", ", ".join(allowed), "correct the name, or drop it"
        )
