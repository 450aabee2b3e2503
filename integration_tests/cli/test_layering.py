"""The files of the command line import downwards, and nothing below imports them."""

from __future__ import annotations

import ast
from pathlib import Path

import rmsnorm_patch

PACKAGE = Path(rmsnorm_patch.__file__).parent


def imported(path: Path) -> set[str]:
    """Full names of what a file of the package imports from it, inside functions too."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    here = parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("rmsnorm_patch")}


def files() -> dict[str, set[str]]:
    return {f"rmsnorm_patch.cli.{path.stem}": imported(path) for path in (PACKAGE / "cli").glob("*.py")}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Names that are left when what imports nothing else of the graph is taken away, again and again."""
    left = {name: {other for other in graph[name] if other in graph and other != name} for name in graph}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_file_imports_itself_through_others() -> None:
    graph = files()
    assert len(graph) > 8
    assert cycle(graph) == []
    graph["rmsnorm_patch.cli.folder"] = {"rmsnorm_patch.cli.output"}  # one that is put in is seen
    assert cycle(graph)


def test_nothing_below_imports_the_command_line() -> None:
    below = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "cli" and path.name != "__main__.py"]
    assert len(below) > 50
    assert [path for path in below if any(name.startswith("rmsnorm_patch.cli") for name in imported(path))] == []
