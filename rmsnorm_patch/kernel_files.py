"""Where the kernel sources are: one answer for a source checkout, an editable install and a built wheel."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from .errors import KernelBuildError


@lru_cache(maxsize=1)
def kernels_dir() -> Path:
    """The folder with `cuda/`, `triton/` and `tuned/`.

    A wheel carries it inside the package; in a checkout it stands beside the package. It is no Python package on
    purpose: a top-level `kernels` would shadow the Hugging Face library of that name.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "kernels", package.parent / "kernels")
    for folder in candidates:
        if (folder / "cuda").is_dir() or (folder / "triton").is_dir():
            return folder
    raise KernelBuildError(
        site="kernels folder",
        got="none of " + ", ".join(map(str, candidates)),
        supported="a wheel, or a checkout with `kernels/` beside `rmsnorm_patch/`",
        next_step="reinstall rmsnorm_patch",
    )
