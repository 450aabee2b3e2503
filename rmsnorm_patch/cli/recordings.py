"""The files of `verify --record` and `--compare`, looked at before the long work and not after it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UnsupportedInput


def check_files(record: Path | None, compare: Path | None) -> None:
    """Raise UnsupportedInput for a `record` that cannot be written, a `compare` that cannot be read, or one file for
    both: it would be compared with itself."""
    if record is not None:
        if compare is not None and os.path.realpath(record) == os.path.realpath(compare):
            raise _refused("--record", f"the file of --compare ({record})", "two files", "name another file")
        from ..proof.options import check_writable

        check_writable("--record", record)
    if compare is not None:
        _check_recording(compare)


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
