"""The tutorial's code, run as it stands, prints what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
LINES = 120
MARK = "\n----- end of a block -----\n"
REST = "..."
"""Stands in an output block for any text, several lines too."""


def steps(page: str) -> list[tuple[str, str]]:
    """(code, shown output) of each block of Python; "" where no output follows it."""
    found: list[tuple[str, str]] = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            found.append((body, ""))
        else:
            assert language == "text", f"a block of {language!r}; supported: python, and text behind it"
            assert found, "output in front of any code"
            assert not found[-1][1], "two outputs of one block"
            found[-1] = (found[-1][0], body)
    return found


def printed(codes: list[str]) -> list[str]:
    """What each block prints, all of them in one new process, at the root of the checkout."""
    script = f"\nprint({MARK!r}, end='')\n".join(codes)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split(MARK)


def shows(shown: str, output: str) -> bool:
    parts = map(re.escape, shown.strip().split(REST))
    return re.fullmatch(".*".join(parts), output.strip(), flags=re.DOTALL) is not None


def test_the_output_is_what_the_page_shows() -> None:
    walk = steps(PAGE)
    outputs = printed([code for code, _ in walk])
    assert len(outputs) == len(walk) == 7
    for (code, shown), output in zip(walk, outputs, strict=True):
        assert shows(shown, output), f"{code}\nprints\n{output}\nthe page shows\n{shown}"


def test_the_tutorial_is_short() -> None:
    assert len(PAGE.splitlines()) <= LINES


@pytest.mark.parametrize(
    ("shown", "output", "same"),
    [
        ("a 1\nb\n", "a 1\nb\n", True),
        ("a ...\nb\n", "a 2\nb\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a ...\nb\n", "a 2\nc\n", False),
        ("a\n", "a\nb\n", False),
        ("a.b\n", "a+b\n", False),
        ("", "a\n", False),
        ("a\n", "", False),
    ],
)
def test_what_counts_as_the_same_output(shown: str, output: str, same: bool) -> None:
    assert shows(shown, output) is same


def test_blocks_are_paired_with_their_output() -> None:
    page = "# T\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n```text\n1\n```\n"
    assert steps(page) == [("x = 1\n", ""), ("print(x)\n", "1\n")]
    with pytest.raises(AssertionError, match="supported"):
        steps("```\nplain\n```\n")
