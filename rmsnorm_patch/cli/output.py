"""How a command ends: what it prints, its exit status, and, with --json, the one document on stdout.

Every exception passes through `finish`, so that status 1 keeps its one meaning and no program reads a traceback.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import (
    NothingProved,
    PatchConflict,
    RMSNormPatchError,
    UnsupportedInput,
    UnsupportedModel,
    VerificationFailed,
)
from .folder import BrokenCheckpoint

FAILED, USAGE, UNSUPPORTED, DAMAGED, UNUSABLE, NOTHING_PROVED = 1, 2, 3, 4, 5, 6
STATUSES = {
    0: "done",
    FAILED: "a proof failed, a text differs, or a cached kernel is damaged, and nothing else",
    USAGE: "wrong usage, or no folder with a model",
    UNSUPPORTED: "a model that cannot be patched, or cannot do what the command needs",
    DAMAGED: "a damaged checkpoint, or files that do not belong together",
    UNUSABLE: "kernels, their cache, memory or a disk cannot be used here, or an unforeseen error",
    NOTHING_PROVED: "nothing was proved: NaN or Inf in the logits, no position that counts, no norm that ran",
}
"""What each exit status means."""
INTERRUPTED, CLOSED_PIPE = 130, 141
"""What a shell reports for a program that SIGINT and SIGPIPE ended."""

UNFORESEEN = "rmsnorm_patch itself"

_CommandError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Wrong usage. typer carries its own click since 0.26 and exports no base class; older ones use the package's."""

_STATUS_OF: tuple[tuple[type[Exception], int], ...] = (
    (NothingProved, NOTHING_PROVED),
    (VerificationFailed, FAILED),
    (BrokenCheckpoint, DAMAGED),
    (UnsupportedInput, USAGE),
    (UnsupportedModel, UNSUPPORTED),
    (PatchConflict, UNSUPPORTED),
)
"""Kinds of errors, a kind in front of what it derives from, and their statuses; of any other UNUSABLE."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process with status 1."""
        raise BrokenPipeError


class Output:
    """Where a command prints: tables for people, or one document for programs."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout
        self.console = _Console(file=sys.stderr) if as_json else _Console()
        self.progress_console = _Console(stderr=True)
        self.warnings: list[str] = []

    def document(self, value: dict[str, Any]) -> None:
        if self.as_json:
            print_document({**value, "warnings": self.warnings} if self.warnings else value, self.stdout)

    def warn(self, text: str) -> None:
        """On stderr and in the document."""
        self.warnings.append(text)
        self.progress_console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, total: int | None, text: str) -> Iterator[Any]:
        """A bar on stderr; yields step(text). total None: a spinner with the step's name."""
        counted = () if total is None else (BarColumn(), MofNCompleteColumn())
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *counted, TimeElapsedColumn())
        with Progress(*columns, console=self.progress_console, transient=True) as bar:
            task = bar.add_task(text, total=total)

            def step(text: str | None = None) -> None:
                bar.update(task, advance=1, description=text)

            yield step


def print_document(value: dict[str, Any], stream: Any) -> None:
    print(json.dumps(_plain(value), indent=2, allow_nan=False), file=stream)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings, which no program takes for a number by mistake."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """With --json, what libraries print on stdout goes to stderr."""
    out = Output(as_json)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield out


def finish(run: Callable[[], object], as_json: bool) -> int:
    """The exit status of `run`, a command; its exceptions become a message and, with --json, a document."""
    stdout = sys.stdout
    if hasattr(stdout, "reconfigure"):  # a terminal of another encoding shows \u2026 in place of what it lacks
        stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            run()
            status = 0
        except typer.Exit as ended:
            status = ended.exit_code
        except (Exception, SystemExit) as error:  # code of a checkpoint may want to end the process
            status = _told(error, as_json, stdout)
        if stdout is not None:
            stdout.flush()
        return status
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except OSError as error:
        _drop(stdout)
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE
        _say(f"error: the output could not be written: {error}")
        return UNUSABLE


def _drop(stdout: Any) -> None:
    """What stdout still holds goes nowhere: the interpreter would try again, and end with a status of its own."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _told(error: BaseException, as_json: bool, stdout: Any) -> int:
    if isinstance(error, (BrokenPipeError, typer.Abort)):
        raise error
    status, described = described_error(error)
    if as_json:
        proof = getattr(error, "proof", None)
        proved = {"proof": proof.to_dict()} if proof is not None else {}
        print_document({"error": described, "exit_status": status, **proved}, stdout)
    if isinstance(error, _CommandError):
        error.show(file=sys.stderr)
    else:
        if described["site"] == UNFORESEEN:
            _say("".join(traceback.format_exception(error)))
        clauses = (f"got {described['got']}", f"supported: {described['supported']}", f"next: {described['next_step']}")
        _say(f"error: {described['site']}: {'; '.join(clauses)}")
    return status


def described_error(error: BaseException) -> tuple[int, dict[str, str]]:
    """(exit status, what the document says) of an exception."""
    kind = type(error).__name__
    if isinstance(error, RMSNormPatchError):
        status = next((number for cause, number in _STATUS_OF if isinstance(error, cause)), UNUSABLE)
        words = {"site": error.site, "got": error.got, "supported": error.supported, "next_step": error.next_step}
        return status, {"type": kind, **words}
    if isinstance(error, _CommandError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "rmsnorm-patch"
        words = {"site": command, "got": error.format_message(), "supported": f"what `{command} --help` lists"}
        return USAGE, {"type": kind, **words, "next_step": "correct the command"}
    if isinstance(error, OSError) or kind == "SafetensorError":
        site, supported = str(getattr(error, "filename", None) or "a file"), "files that can be read and written"
        step = "check the path, its permissions and the space on its disk"
    elif isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        site, step = "memory", "use a smaller dtype or a shorter prompt, or free memory"
        supported = "models that fit"
    else:
        site, step = UNFORESEEN, "report this with the traceback on stderr"
        supported = "a failure that was foreseen"
    got = f"{kind}: {error}"
    return UNUSABLE, {"type": kind, "site": site, "got": got, "supported": supported, "next_step": step}


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
