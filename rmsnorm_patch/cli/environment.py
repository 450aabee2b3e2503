"""What this installation can do, and why not more: the report behind `rmsnorm-patch env`."""

from __future__ import annotations

import difflib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from .. import ops, vllm_plugin
from ..backends import launch_mode
from ..backends.cuda import cache, launcher
from ..compat import sglang_plugin
from ..errors import RMSNormPatchError, UnsupportedInput
from ..kernel_files import kernels_dir
from ..numerics.contract import FUSED_ADD, RMS_NORM
from ..numerics.spec import LLAMA
from ..ops import dispatch
from ..vllm_plugin import settings

PACKAGES = (
    "rmsnorm_patch",
    "torch",
    "transformers",
    "triton",
    "nvidia-cuda-nvrtc",
    "accelerate",
    "kernels",
    "vllm",
    "sglang",
)
PROBED_HIDDEN_SIZE = 4096
ENGINE_SECONDS = 300
PREFIX = "RMSNORM_PATCH_"


def _check_launcher() -> None:
    value = os.environ.get(launcher.VARIABLE) or "auto"
    if value not in launcher.CHOICES:
        supported = ", ".join(launcher.CHOICES)
        raise UnsupportedInput(launcher.VARIABLE, repr(value), supported, "set it to one of these, or unset it")


@dataclass(frozen=True)
class Variable:
    """check: raises for a value that means nothing. page: of the documentation, with more."""

    check: Callable[[], object]
    meaning: str
    page: str = ""


VARIABLES = {
    dispatch.BACKEND_VARIABLE: Variable(
        dispatch.requested_backend,
        "in place of `auto`, on a CPU too: `reference`, `triton` (there with `TRITON_INTERPRET=1`) or `cuda`",
    ),
    ops.COMPILE_VARIABLE: Variable(
        lambda: ops.compile_form("cpu"),
        "in graphs of `torch.compile`: `op` (our kernels) or `decomposed` (the arithmetic, a patched model's default)",
        "huggingface.md#compiled-models",
    ),
    cache.DIRECTORY_VARIABLE: Variable(
        cache.directory, "where compiled kernels are kept; must belong to you and be writable by nobody else"
    ),
    cache.TIMEOUT_VARIABLE: Variable(
        cache.lock_timeout, "seconds to wait for another process that compiles the same kernel; 120 by default"
    ),
    launch_mode.VARIABLE: Variable(
        launch_mode.read,
        "`auto` or `off`: whether kernels start before the one in front has ended (sm_90 and newer)",
    ),
    launcher.VARIABLE: Variable(_check_launcher, "`auto`, `c` or `python`: how kernels are started"),
    settings.VARIABLE: Variable(settings.read, "the route in vLLM: `auto`, `ir`, `oot` or `off`", "vllm.md"),
    settings.LINEAR_VARIABLE: Variable(
        settings.read_linear,
        "how far norms take over products: `auto`, `reorder` or `off`",
        "vllm.md#products-that-come-in-parts",
    ),
    settings.QUANTISED_VARIABLE: Variable(
        settings.read_quantised,
        "engines whose products quantise their rows: `auto` serves them, `off` leaves them",
        "vllm_quantised.md",
    ),
    settings.SILU_QUANTISED_VARIABLE: Variable(
        settings.read_silu_quantised,
        "silu_and_mul in front of a quantised product: `auto` writes rows of FP8 per token, `on` all, `off` none",
        "vllm_quantised.md#silu_and_mul-in-front-of-the-last-product",
    ),
    settings.BLOCKS_VARIABLE: Variable(
        settings.read_blocks,
        "FP8 products that quantise blocks themselves: `auto` lets norms do it, `off` leaves their engines to vLLM",
        "vllm_quantised.md#blocks-for-flashinfer-and-deepgemm",
    ),
    settings.NORM_ADD_VARIABLE: Variable(
        settings.read_norm_add,
        "norms and the adds behind them: `auto` joins them, `off` leaves them",
        "vllm.md#choose-turn-off",
    ),
    settings.NUMERICS_VARIABLE: Variable(
        settings.read_numerics, "whose numerics norms have in vLLM: `engine` or `huggingface`", "vllm_numerics.md"
    ),
    settings.RELEASE_VARIABLE: Variable(
        settings.read_tried,
        "a vLLM release that was not run, to be served all the same: `0.34`",
        "vllm.md#versions",
    ),
    settings.TRACE_VARIABLE: Variable(
        lambda: None,
        "a folder: each process of an engine writes there which of our ops it called",
        "vllm.md#is-it-on",
    ),
    sglang_plugin.VARIABLE: Variable(
        sglang_plugin.read,
        "norms of SGLang's engines: `auto` serves them, `off` leaves them to SGLang",
        "other_frameworks.md#sglang",
    ),
}
"""Every variable that the package reads."""


@dataclass(frozen=True)
class BackendState:
    """Whether a backend runs on a device; `reason` says why not, or in which way."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class DeviceState:
    """One device. auto: the backend that `auto` gives a bf16 row of 4096 elements there, and why."""

    device: str
    name: str
    capability: str | None
    memory_gib: float | None
    backends: tuple[BackendState, ...]
    auto: str
    auto_reason: str


@dataclass(frozen=True)
class CacheState:
    """The on-disk kernel cache. state: "ok", "empty", or why it cannot be used."""

    directory: str
    artefacts: int
    size_bytes: int
    state: str


@dataclass(frozen=True)
class VllmState:
    """version: None = not installed. entry_point: our plugin as vLLM will find it, "" where it is not registered.
    route: "ir", "oot" or "none", what an engine started now would get; reason: why; numerics: "engine" or
    "huggingface", whose are asked for ("" for a value that is neither)."""

    version: str | None
    entry_point: str
    allowed_plugins: str | None
    route: str
    reason: str
    numerics: str = "engine"


@dataclass(frozen=True)
class SglangState:
    """version: None = not installed. entry_point: our plugin as SGLang will find it, "" where it is not registered.
    served: whether an engine started now would ask our kernels; reason: why, or why not."""

    version: str | None
    entry_point: str
    allowed_plugins: str | None
    served: bool
    reason: str


@dataclass(frozen=True)
class EngineState:
    """What `vllm serve MODEL` with `arguments` would do. norms: (path, class, columns, what serves it) of each norm;
    error: why the engine cannot be configured here, then the rest is empty."""

    arguments: tuple[str, ...]
    route: str = ""
    provider: str = ""
    reason: str = ""
    compile_mode: str = ""
    norms: tuple[tuple[str, str, int, str], ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Environment:
    """variables: those of the environment that begin with RMSNORM_PATCH_. variable_faults: what is wrong with some.
    launches: how kernels are launched, or what is wrong with RMSNORM_PATCH_PDL. outlook: (kind of work, what it gets
    on this machine)."""

    outlook: tuple[tuple[str, str], ...]
    python: str
    system: str
    versions: dict[str, str | None]
    devices: tuple[DeviceState, ...]
    kernels: str
    cache: CacheState
    vllm: VllmState
    sglang: SglangState
    variables: dict[str, str]
    variable_faults: dict[str, str]
    launches: str = ""
    engine: EngineState | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def starting() -> str:
    """Who starts CUDA kernels here, the same for all ops, or why nobody can."""
    try:
        why = dispatch.started_from_python(RMS_NORM.name, LLAMA)
    except RMSNormPatchError as error:
        return str(error)
    return f"started from Python, a few microseconds more a call: {why}" if why else "started by launcher.c"


def _device(device: torch.device) -> DeviceState:
    is_gpu = device.type == "cuda"
    backends = [BackendState("reference", True, "the model's own arithmetic")]
    for name in ("triton", "cuda"):
        runs, reason = dispatch.available(name, device)
        backends.append(BackendState(name, runs, starting() if name == "cuda" and runs else reason))
    try:
        choice = dispatch.choose(
            FUSED_ADD.name, LLAMA, torch.bfloat16, torch.bfloat16, 1, PROBED_HIDDEN_SIZE, device=device
        )
        auto, reason = str(choice.backend), choice.reason
    except RMSNormPatchError as error:
        auto, reason = "none", str(error)
    if not is_gpu:
        return DeviceState("cpu", platform.machine(), None, None, tuple(backends), auto, reason)
    properties = torch.cuda.get_device_properties(device)
    return DeviceState(
        str(device),
        properties.name,
        f"{properties.major}.{properties.minor}",
        round(properties.total_memory / 2**30, 1),
        tuple(backends),
        auto,
        reason,
    )


def _cache() -> CacheState:
    try:
        folder = str(cache.directory())
    except RMSNormPatchError as error:
        return CacheState("", 0, 0, str(error))
    try:
        entries = cache.entries()
    except (RMSNormPatchError, OSError) as error:
        return CacheState(folder, 0, 0, str(error))
    damaged = sum(entry.state != "ok" for entry in entries)
    state = f"{damaged} damaged, see `rmsnorm-patch cache verify`" if damaged else "ok" if entries else "empty"
    return CacheState(folder, len(entries), sum(entry.size for entry in entries), state)


def _vllm() -> VllmState:
    plugin = vllm_plugin.describe()
    entry_point = _entry_point("vllm.general_plugins")
    allowed = os.environ.get("VLLM_PLUGINS")
    return VllmState(plugin.version, entry_point, allowed, plugin.route, plugin.reason, plugin.numerics)


def _sglang() -> SglangState:
    plugin = sglang_plugin.describe()
    entry_point = _entry_point(sglang_plugin.GROUP)
    allowed = os.environ.get("SGLANG_PLUGINS")
    return SglangState(plugin.version, entry_point, allowed, plugin.served, plugin.reason)


def _entry_point(group: str) -> str:
    """Our plugin of this group as an engine will find it; "" where it is not registered."""
    ours = {point.value for point in metadata.entry_points(group=group) if point.value.startswith("rmsnorm_patch")}
    return ", ".join(sorted(ours))


def engine(arguments: Sequence[str]) -> EngineState:
    """Ask a vLLM of its own process, configured with `arguments` of `vllm serve`; no weights are read."""
    command = [sys.executable, "-m", "rmsnorm_patch.vllm_plugin.explain", *arguments]
    if vllm_plugin.installed() is None:
        return EngineState(tuple(arguments), error="vLLM is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENGINE_SECONDS)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        return EngineState(tuple(arguments), error=done.stderr.strip()[-500:] or f"exit status {done.returncode}")
    norms = tuple((n["path"], n["class"], n["columns"], n["served_by"]) for n in answer.pop("norms", ()))
    return EngineState(tuple(arguments), norms=norms, **answer)


def variable_fault(name: str) -> str:
    """What is wrong with the variable `name` as it is set; "" if nothing is."""
    if name not in VARIABLES:
        ends = [known.removeprefix(PREFIX) for known in VARIABLES]
        near = difflib.get_close_matches(name.removeprefix(PREFIX), ends, n=1)
        return "unknown, nothing reads it" + (f"; did you mean {PREFIX}{near[0]}?" if near else "")
    try:
        VARIABLES[name].check()
    except RMSNormPatchError as error:
        return str(error)
    return ""


def outlook(devices: Sequence[DeviceState], vllm: VllmState, sglang: SglangState) -> tuple[tuple[str, str], ...]:
    """(kind of work, what it gets) on these devices: the answer in words, before the tables that say why."""
    rows = []
    for device in devices:
        name = device.name if device.device == "cpu" else f"{device.device} ({device.name})"
        rows.append((f"models on {name}", _served(device)))
    rows.append(("training, autocast", "the model's own arithmetic"))
    asked = f"{ops.COMPILE_VARIABLE}=op or apply(compiled='joined')"
    rows.append(("torch.compile", f"the model's own arithmetic, unless {asked} asks for more"))
    if vllm.version is None:
        rows.append(("vLLM", "not installed"))
    elif vllm.route == "none" or not vllm.entry_point:
        rows.append(("vLLM", f"nothing: {vllm.reason if vllm.entry_point else 'the plugin is not registered'}"))
    else:
        rows.append(("vLLM", f"its norms are served, route {vllm.route}"))
    if sglang.version is None:
        rows.append(("SGLang", "not installed"))
    elif not sglang.served or not sglang.entry_point:
        rows.append(("SGLang", f"nothing: {sglang.reason if sglang.entry_point else 'the plugin is not registered'}"))
    else:
        rows.append(("SGLang", f"its norms are served {sglang.reason}"))
    return tuple(rows)


def _served(device: DeviceState) -> str:
    if device.auto in ("cuda", "triton"):
        kernels = "CUDA kernels, compiled here" if device.auto == "cuda" else "Triton kernels"
        why = f": {device.auto_reason}" if device.auto == "triton" else ""
        return f"fused adds and norms in {kernels}{why}"
    if device.device == "cpu":
        return "proved and right, and not faster: the model's own operations"
    return f"the model's own operations: {device.auto_reason}"


def report(engine_arguments: Sequence[str] = ()) -> Environment:
    """Look at packages, devices, cache and variables. Starts CUDA where there is a GPU; builds nothing.

    engine_arguments: those of `vllm serve`, the model first: the report then says what happens to each of its norms.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    try:
        kernels = str(kernels_dir())
    except RMSNormPatchError as error:
        kernels = str(error)
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)}
    versions = {package: _version(package) for package in PACKAGES}
    versions["torch"] = torch.__version__
    if versions["rmsnorm_patch"] is None:  # run from a checkout that is not installed
        from .. import __version__

        versions["rmsnorm_patch"] = __version__
    devices, vllm, sglang = tuple(map(_device, [torch.device("cpu"), *gpus])), _vllm(), _sglang()
    versions["vllm"] = vllm.version  # its wheel for the CPU has another name
    return Environment(
        outlook=outlook(devices, vllm, sglang),
        python=platform.python_version(),
        system=platform.platform(),
        versions=versions,
        devices=devices,
        kernels=kernels,
        cache=_cache(),
        vllm=vllm,
        sglang=sglang,
        variables=variables,
        variable_faults={name: fault for name in variables if (fault := variable_fault(name))},
        launches=launch_mode.describe(),
        engine=engine(engine_arguments) if engine_arguments else None,
    )
