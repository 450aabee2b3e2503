"""A program that a fork runs ends as one of an interpreter: its status, its words, and what it left for its end."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("undefined", 1, "NameError: name 'undefined' is not defined\n"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt\n"),
    ],
)
def test_a_program_ends_with_its_status(code: str, status: int, words: str, environment: Any, run_program: Any) -> None:
    done = run_program(["-c", f"import atexit; atexit.register(print, 'at exit')\n{code}"], environment())
    assert (done.returncode, done.stdout) == (status, "at exit\n")
    assert done.stderr.endswith(words)
    assert done.stderr == "" or words


def test_its_threads_end_first(environment: Any, run_program: Any) -> None:
    code = "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()"
    done = run_program(["-c", code], environment())
    assert (done.returncode, done.stdout) == (0, "late\n")
