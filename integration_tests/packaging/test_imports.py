"""The package imports its parts late, so that each of them may be the first that a user imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, os, sys, torch
gc.freeze()  # a child would copy what torch made by looking through it
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


UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe(source: str) -> list[str]:
    """What of a source could run code that a file brings: imports, calls and arguments."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] in UNPICKLING]
        elif isinstance(node, ast.Call):
            found += [ast.unparse(node.func)] * (ast.unparse(node.func) in ("torch.load", "torch.hub.load"))
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [name for name in ("trust_remote_code", "allow_pickle") if given.get(name) == "True"]
    return found


def test_nothing_is_unpickled_and_foreign_code_never_switched_on(repository: Path) -> None:
    bad = "import pickle\nfrom dill import load\ntorch.load(f)\nauto(f, trust_remote_code=True)\nf(trust_remote_code=t)"
    assert unsafe(bad) == ["pickle", "dill", "torch.load", "trust_remote_code"]
    paths = [p for room in ("rmsnorm_patch", "kernels", "scripts") for p in (repository / room).rglob("*.py")]
    assert len(paths) > 100
    assert {path.name: found for path in paths if (found := unsafe(path.read_text()))} == {}
