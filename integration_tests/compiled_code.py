"""What Inductor makes of a model, to be compared: bits of two compilations of one program may differ, its code not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from torch._inductor import config
from torch._inductor.utils import run_and_get_code

T = TypeVar("T")
_KERNEL = re.compile(r"\b(cpp|triton_[a-z]+)_fused\w*?_(\d+)\b")


def compiled_anew(call: Callable[[], T]) -> tuple[T, str]:
    """What `call` returns, and the `program` of all that is compiled for it, of which nothing comes from a cache."""
    with config.patch(force_disable_caches=True):
        result, codes = run_and_get_code(call)
    if not codes:
        raise AssertionError("nothing was compiled, so there is no code to compare")
    return result, "\n".join(map(program, codes))


def program(code: str) -> str:
    """Code of Inductor's without what computes nothing: comments, which name files and the model's operations, and the
    names of kernels, which are made of those operations."""
    lines = [line for line in code.splitlines() if not line.lstrip().startswith(("#", "//"))]
    return _KERNEL.sub(r"\1_\2", "\n".join(lines))
