"""What the user asked for, and which vLLM releases the plugin serves."""

from __future__ import annotations

import os
import re
from typing import Literal, get_args

from ..errors import UnsupportedInput

Route = Literal["auto", "ir", "oot", "off"]
ROUTES: tuple[Route, ...] = get_args(Route)
VARIABLE = "RMSNORM_PATCH_VLLM"
TRACE_VARIABLE = "RMSNORM_PATCH_VLLM_TRACE"

OLDEST, NEWEST = (0, 26), (0, 33)
"""vLLM releases whose interfaces the routes were written against, both included."""


def read() -> Route:
    """The route that `RMSNORM_PATCH_VLLM` asks for; UnsupportedInput names the allowed values."""
    value = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    for route in ROUTES:
        if value == route:
            return route
    raise UnsupportedInput(
        VARIABLE, repr(os.environ[VARIABLE]), ", ".join(ROUTES), f"correct the variable, or unset it for {ROUTES[0]!r}"
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
