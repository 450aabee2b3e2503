"""docs/numerics.md has the tables of its script, which runs the libraries that a CPU can run."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmsnorm_patch.numerics.spec import LLAMA

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_what_the_script_finds() -> None:
    """A process of its own, since Triton decides for its interpreter when it is imported."""
    command = [sys.executable, str(ROOT / "scripts" / "numerics_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_library_that_ran_is_as_it_is_described() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text()
    libraries = page.partition("\n| library | rounds ")[2].partition("\n\n")[0]
    ran = re.findall(r"^\| ([^|]+) \|(?:[^|]*\|){3} (\d+)(?: \(fp16\))? \|", libraries, re.MULTILINE)
    assert len(ran) >= 8
    assert [name for name, count in ran if count != "0"] == []


def test_a_wrong_description_is_counted(script: Any) -> None:
    table = script("numerics_table")
    llama = table.LIBRARIES[0]
    for spec, differs in ((LLAMA, False), (replace(LLAMA, sum="fp32"), True)):
        given = table.operands(adds_one=False)
        assert bool(table.differing(llama.run(*given), table.described(spec, given))) is differs
