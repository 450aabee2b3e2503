"""The backends that a user can ask for."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "reference", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "triton", "cuda")
