"""Build the environment of the vLLM tests: `python environment.py VENV --torch torch==2.13.0`.

What vLLM needs is read from the metadata of the wheel in requirements.txt, so that no list here can grow stale.
Exits non-zero, with pip's own message, when any of it cannot be installed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH_FAMILY = ("torch", "torchaudio", "torchvision", "torchcodec")
TEST_TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6")

NEEDS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for text in requires({name!r}) or ():
    need = Requirement(text)
    if need.name not in {skipped!r} and (need.marker is None or need.marker.evaluate({{"extra": ""}})):
        need.marker = None
        print(need)
"""


def run(*command: str, capture: bool = False) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None)
    return done.stdout if capture else ""


def create(venv: Path) -> str:
    """The new environment's interpreter; Debian's Python may come without ensurepip."""
    python = str(venv / "bin" / "python")
    try:
        run(sys.executable, "-m", "venv", str(venv))
    except subprocess.CalledProcessError:
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv))
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip")
    return python


def build(venv: Path, torch: str, pip_args: list[str]) -> None:
    python = create(venv)
    install = (python, "-m", "pip", "install", "--quiet", *pip_args)
    run(*install, torch, "packaging", *TEST_TOOLS)
    run(*install, "--no-deps", "-r", str(HERE / "requirements.txt"))
    pinned = next(line for line in (HERE / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
    name = pinned.partition("==")[0]
    needs = run(python, "-c", NEEDS.format(name=name, skipped=TORCH_FAMILY), capture=True).split("\n")
    run(*install, torch, *filter(None, needs))
    run(*install, torch, "-e", str(ROOT))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0")
    parser.add_argument("--pip-args", type=shlex.split, default=[], help="further arguments of pip install, quoted")
    options = parser.parse_args()
    build(options.venv, options.torch, options.pip_args)
