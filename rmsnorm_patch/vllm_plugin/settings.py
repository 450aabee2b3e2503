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
Numerics = Literal["engine", "huggingface"]
NUMERICS: tuple[Numerics, ...] = get_args(Numerics)
NUMERICS_VARIABLE = "RMSNORM_PATCH_VLLM_NUMERICS"
TRACE_VARIABLE = "RMSNORM_PATCH_VLLM_TRACE"

OLDEST, NEWEST = (0, 26), (0, 33)
"""vLLM releases whose interfaces the routes were written against, both included."""


def read() -> Route:
    """The route that `RMSNORM_PATCH_VLLM` asks for; UnsupportedInput names the allowed values."""
    return _one_of(VARIABLE, ROUTES)


def read_linear() -> Linear:
    """Whether `RMSNORM_PATCH_VLLM_LINEAR` lets products be joined with the norms behind them, and take other bits."""
    return _one_of(LINEAR_VARIABLE, LINEARS)


def read_numerics() -> Numerics:
    """Whose arithmetic `RMSNORM_PATCH_VLLM_NUMERICS` asks for: that of the engine, or of transformers' modules."""
    return _one_of(NUMERICS_VARIABLE, NUMERICS)


def check() -> None:
    """Raise UnsupportedInput if one of the variables that engines follow has a value that it must not have."""
    read()
    read_linear()
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


def unsupported_release(version: str) -> str:
    """Why this vLLM is left alone, or "" if it is served."""
    found = release(version)
    if found is not None and OLDEST <= found <= NEWEST:
        return ""
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    return f"vLLM {version} is outside the supported range {oldest} to {newest}"
