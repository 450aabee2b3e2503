"""Programs of this checkout, run by this interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """This process's, with the checkout's package ahead of an installed one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def python(*arguments: str, check: bool = True) -> None:
    """Run this interpreter in the checkout."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), check=check)
