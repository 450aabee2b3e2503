"""What the user asked for, and which vLLM releases the plugin serves."""

from __future__ import annotations

import os
import re
from typing import Literal, TypeVar, get_args

from ..backends import launch_mode
from ..errors import UnsupportedInput

Route = Literal["auto", "ir", "oot", "off"]
ROUTES: tuple[Route, ...] = get_args(Route)
VARIABLE = "RMSNORM_PATCH_VLLM"
Linear = Literal["auto", "reorder", "off"]
LINEARS: tuple[Linear, ...] = get_args(Linear)
LINEAR_VARIABLE = "RMSNORM_PATCH_VLLM_LINEAR"
Quantised = Literal["auto", "off"]
QUANTISED: tuple[Quantised, ...] = get_args(Quantised)
QUANTISED_VARIABLE = "RMSNORM_PATCH_VLLM_QUANTISED"
SiluQuantised = Literal["auto", "on", "off"]
SILU_QUANTISED: tuple[SiluQuantised, ...] = get_args(SiluQuantised)
SILU_QUANTISED_VARIABLE = "RMSNORM_PATCH_VLLM_SILU_QUANTISED"
Blocks = Literal["auto", "off"]
BLOCKS: tuple[Blocks, ...] = get_args(Blocks)
BLOCKS_VARIABLE = "RMSNORM_PATCH_VLLM_BLOCKS"
NormAdds = Literal["auto", "off"]
NORM_ADDS: tuple[NormAdds, ...] = get_args(NormAdds)
NORM_ADD_VARIABLE = "RMSNORM_PATCH_VLLM_NORM_ADD"
Numerics = Literal["engine", "huggingface"]
NUMERICS: tuple[Numerics, ...] = get_args(Numerics)
NUMERICS_VARIABLE = "RMSNORM_PATCH_VLLM_NUMERICS"
RELEASE_VARIABLE = "RMSNORM_PATCH_VLLM_RELEASE"
TRACE_VARIABLE = "RMSNORM_PATCH_VLLM_TRACE"

OLDEST, NEWEST = (0, 26), (0, 33)
"""vLLM releases whose interfaces the routes were written against, both included."""


def read() -> Route:
    """The route that `RMSNORM_PATCH_VLLM` asks for; UnsupportedInput names the allowed values."""
    return _one_of(VARIABLE, ROUTES)


def read_linear() -> Linear:
    """Whether `RMSNORM_PATCH_VLLM_LINEAR` lets products be joined with the norms behind them, and take other bits."""
    return _one_of(LINEAR_VARIABLE, LINEARS)


def read_quantised() -> Quantised:
    """Whether `RMSNORM_PATCH_VLLM_QUANTISED` lets compiled engines be served whose products may quantise their rows."""
    return _one_of(QUANTISED_VARIABLE, QUANTISED)


def read_silu_quantised() -> SiluQuantised:
    """Where `RMSNORM_PATCH_VLLM_SILU_QUANTISED` lets silu_and_mul write the rows that a quantised product reads: "auto"
    of the schemes whose engines were measured, "on" wherever norms are served."""
    return _one_of(SILU_QUANTISED_VARIABLE, SILU_QUANTISED)


def read_blocks() -> Blocks:
    """Whether `RMSNORM_PATCH_VLLM_BLOCKS` lets norms quantise the rows of products that do it for themselves, with
    FlashInfer and DeepGEMM."""
    return _one_of(BLOCKS_VARIABLE, BLOCKS)


def read_norm_add() -> NormAdds:
    """Whether `RMSNORM_PATCH_VLLM_NORM_ADD` lets norms take the residual-adds behind them into their launches."""
    return _one_of(NORM_ADD_VARIABLE, NORM_ADDS)


def read_numerics() -> Numerics:
    """Whose arithmetic `RMSNORM_PATCH_VLLM_NUMERICS` asks for: that of the engine, or of transformers' modules."""
    return _one_of(NUMERICS_VARIABLE, NUMERICS)


def asks_transformers() -> bool:
    """Whether transformers' numerics are asked for; a value that means nothing asks for none here."""
    return os.environ.get(NUMERICS_VARIABLE, "").strip().lower() == "huggingface"


def check() -> None:
    """Raise UnsupportedInput if one of the variables that engines follow has a value that it must not have."""
    read()
    read_linear()
    read_quantised()
    read_silu_quantised()
    read_blocks()
    read_norm_add()
    read_numerics()
    launch_mode.read()


T = TypeVar("T", bound=str)


def _one_of(variable: str, allowed: tuple[T, ...]) -> T:
    value = os.environ.get(variable, "").strip().lower() or allowed[0]
    for choice in allowed:
        if value == choice:
            return choice
    raise UnsupportedInput(
        variable,
        repr(os.environ[variable]),
        ", ".join(allowed),
        f"correct the variable, or unset it for {allowed[0]!r}",
    )


def release(version: str) -> tuple[int, int] | None:
    """(0, 32) for "0.32.0+cpu"; None for a text that does not begin with a release number."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def read_tried() -> str:
    """The release newer than those that were run which `RMSNORM_PATCH_VLLM_RELEASE` names, to be served all the same:
    "0.34", or a whole version as vLLM gives it; "" for none."""
    return os.environ.get(RELEASE_VARIABLE, "").strip()


def is_tried(version: str, tried: str) -> bool:
    """Whether `tried` names this vLLM."""
    named = release(version)
    return tried != "" and tried in (version, "" if named is None else _text(named))


def unsupported_release(version: str, tried: str = "") -> str:
    """Why this vLLM is left alone, or "" if it is served. tried: as `read_tried` gives it."""
    named = release(version)
    if named is not None and OLDEST <= named <= NEWEST:
        return ""
    outside = f"vLLM {version} is outside the supported range {_text(OLDEST)} to {_text(NEWEST)}"
    if named is not None and named < OLDEST:
        return outside
    if is_tried(version, tried):
        return ""
    return f"{outside}; {RELEASE_VARIABLE}={version if named is None else _text(named)} tries it all the same"


def unknown_without_ir(version: str, tried: str = "") -> str:
    """Why route "auto" leaves a vLLM alone that has no IR ops, or ""."""
    if is_tried(version, tried):
        return ""
    run = f"every release from {_text(OLDEST)} to {_text(NEWEST)} has them"
    return f"vLLM {version} has no IR ops, and {run}; {VARIABLE}=oot tries it all the same"


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
