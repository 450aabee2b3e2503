"""The package imports its parts late, so that each of them may be the first that a user imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys, torch
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_module_can_be_imported_first(repository: Path) -> None:
    files = sorted((repository / "rmsnorm_patch").rglob("*.py"))
    names = [".".join(p.relative_to(repository).with_suffix("").parts).removesuffix(".__init__") for p in files]
    words = [sys.executable, "-c", PROGRAM, *(name for name in names if not name.endswith("__main__"))]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == ""
