"""Other versions of the package beside this checkout's, in one process: each is copied, renamed and imported."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gpu_record import digest

from .stamp import stamp

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "rmsnorm_patch"
PARTS = (PACKAGE, "kernels", "pyproject.toml")
COMMIT = "COMMIT"
"""File of an exported tree."""

_RENAMED = re.compile(PACKAGE + "(?! artefact)")
"""The name wherever it stands: module, namespace of ops, marks. Not the head of a cached kernel: equal sources share
their machine code."""
_SOURCES = (".py", ".c", ".h")


@dataclass(frozen=True)
class Tree:
    """commit: "" where it is not known. digest: of the kernels and the launch code, before anything is renamed."""

    name: str
    package: str
    commit: str
    digest: str

    def module(self, *names: str) -> ModuleType:
        """The first of these modules that it has: some stood elsewhere once."""
        for name in names[:-1]:
            with contextlib.suppress(ModuleNotFoundError):
                return importlib.import_module(f"{self.package}.{name}")
        return importlib.import_module(f"{self.package}.{names[-1]}")


def export(commit: str, folder: Path) -> str:
    """Write what a commit's kernels and package are into a new folder, for a machine without git; the short commit."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty")
    words = ["git", "rev-parse", "--short", f"{commit}^{{commit}}"]
    short = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    words = ["git", "archive", short, *PARTS]
    packed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as content:
        content.extractall(folder, filter="data")
    (folder / COMMIT).write_text(short + "\n")
    return short


def this() -> Tree:
    """The checkout's own package, under its own name."""
    return Tree("now", PACKAGE, stamp()["commit"], digest())


def load(name: str, folder: Path, place: Path, number: int) -> Tree:
    """Import a copy of `folder` as `rmsnorm_patch_<name>`, kept in `place` as long as the process needs its sources.

    number: above 1, another one for each tree. Launchers opened their library as /proc/self/fd/N until they spelled the
    path in a way of their own, and N is used again. The dynamic linker takes a path that it knows for the library that
    it has: a tree would get another's launcher.
    """
    renamed = f"{PACKAGE}_{name}"
    copy = place / name
    shutil.copytree(folder / "kernels", copy / "kernels")
    shutil.copytree(folder / PACKAGE, copy / renamed, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy / renamed).rglob("*"):
        if path.suffix in _SOURCES:
            text = _RENAMED.sub(renamed, path.read_text(encoding="utf-8"))
            path.write_text(text.replace("/proc/self/fd/", f"/proc{'/' * number}self/fd/"), encoding="utf-8")
    sys.path.insert(0, str(copy))
    try:
        importlib.import_module(renamed)
    finally:
        sys.path.remove(str(copy))
    commit = folder / COMMIT
    return Tree(name, renamed, commit.read_text().strip() if commit.exists() else "", digest(folder))
