"""What a proof can be asked for: each option is judged before the long work."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from ..errors import UnsupportedInput

REFERENCES = ("auto", "wide", "original")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UnsupportedInput for a keyword argument of `verify` that is not of its kind."""
    for name, value in options.items():
        _CHECKS.get(name, _anything)(name, value)


def check_path(name: str, value: Any) -> None:
    """Raise UnsupportedInput for what names no file."""
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise _refused(name, value, "the path of a file")


def check_writable(name: str, path: str | Path) -> None:
    """Raise UnsupportedInput where `path` cannot be written. A file is opened there, and taken away again if it is
    new."""
    path = Path(path)
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        is_new = not path.exists()
        if not is_new and not path.is_file():
            raise OSError("no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
        for folder in made:
            folder.rmdir()
    except OSError as error:
        got = f"{path}, which cannot be written ({error.strerror or error})"
        raise UnsupportedInput(name, got, "a file in a folder that you may write to", "name another file") from error


def _refused(name: str, value: Any, supported: str) -> UnsupportedInput:
    return UnsupportedInput(name, repr(value), supported, f"correct it, or leave {name} out")


def _anything(name: str, value: Any) -> None:
    """Not judged."""


def _integer(least: int | None = None) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and int(value) < least):
            raise _refused(name, value, "an integer" + ("" if least is None else f" of at least {least}"))

    return check


def _truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refused(name, value, "True or False")


def _words(name: str, value: Any) -> None:
    plain = isinstance(value, Collection) and not isinstance(value, (str, bytes))
    if value is not None and not (plain and all(isinstance(word, str) for word in value)):
        raise _refused(name, value, "a list of strings")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _refused(name, value, "a string")


def _optional_path(name: str, value: Any) -> None:
    if value is not None:
        check_path(name, value)


def _target(name: str, value: Any) -> None:
    if value is not None:
        check_path(name, value)
        check_writable(name, value)


def _reference(name: str, value: Any) -> None:
    if value not in REFERENCES:
        raise UnsupportedInput(name, repr(value), ", ".join(map(repr, REFERENCES)), "pass one of these")


def _function(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise _refused(name, value, "a function of one string")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "sites": _words,
    "seed": _integer(),
    "reference": _reference,
    "greedy_tokens": _integer(0),
    "strict": _truth,
    "record": _target,
    "compare": _optional_path,
    "save_failure": _target,
    "raise_on_failure": _truth,
    "space": _integer(0),
    "source": _text,
    "arguments": _words,
    "progress": _function,
}
