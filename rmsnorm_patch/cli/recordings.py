"""The files of `verify --record`, `--compare` and `--html`, looked at before the long work and not after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedInput, VerificationFailed

if TYPE_CHECKING:
    from ..scan.plan import Plan


def check_files(record: Path | None, compare: Path | None, html: Path | None = None) -> None:
    """Raise UnsupportedInput for a `record` or `html` that cannot be written, a `compare` that cannot be read, or one
    file for two of them: it would be compared with itself, or be written over."""
    from ..proof.options import check_writable

    if html is not None:
        check_writable("--html", html)
        for option, other in (("--record", record), ("--compare", compare)):
            if other is not None and os.path.realpath(html) == os.path.realpath(other):
                raise _refused("--html", f"the file of {option} ({html})", "two files", "name another file")
    if record is not None:
        if compare is not None and os.path.realpath(record) == os.path.realpath(compare):
            raise _refused("--record", f"the file of --compare ({record})", "two files", "name another file")
        check_writable("--record", record)
    if compare is not None:
        _check_recording(compare)


@dataclass
class ShownProof:
    """proof: what the page will show; a proof that fails comes with its error."""

    proof: Any = None


@contextmanager
def page_written(html: Path | None, plan: Plan) -> Iterator[ShownProof]:
    """Write the page `html` (None: none) of the proof that is made inside, also where it fails."""
    written = ShownProof()
    try:
        yield written
    except VerificationFailed as error:
        written.proof = error.proof
        raise
    finally:
        if html is not None and written.proof is not None:
            from .proof_page import write_page

            write_page(html, written.proof, plan)


def _refused(option: str, got: str, supported: str, step: str) -> UnsupportedInput:
    return UnsupportedInput(option, got, supported, step)


def _check_recording(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    step = "record it with `rmsnorm-patch verify MODEL --record FILE`"
    try:
        if not path.is_file():
            got = f"{path}: {'a folder' if path.is_dir() else 'no such file'}"
            raise _refused("--compare", got, "a recording", step)
        with safe_open(path, framework="numpy") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise _refused("--compare", f"{path}, which cannot be read ({error})", "a recording", step) from error
    if not any(name.startswith("logits.") for name in names):
        raise _refused("--compare", f"{path}, a file without logits", "a recording", step)
