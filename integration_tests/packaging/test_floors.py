"""The rooms of the package lie on floors: every import points down, and no files import each other in a circle."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = (
    ("__init__", "__main__", "cli"),
    ("api",),
    ("vllm_plugin", "proof", "compat", "bench"),
    ("rewrite", "fused"),
    ("ops", "pairs"),
    ("backends", "scan"),
    ("numerics", "kernel_files"),
    ("patch_state", "errors", "locks", "page"),
)
"""Top down, as docs/how_it_works.md draws them."""
LOOSE_FILES = 8

OF_ONE_KIND = {"Bound"}
"""Class names that may stand in two rooms: an op's callable, of the plain ops and of the one with a gate."""

Graph = dict[str, set[str]]


def sources(folder: Path, name: str) -> dict[str, Path]:
    """Module name -> file, below `folder`, a package of this name ("": scripts, which import each other by theirs)."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = [*name.split("."), *path.relative_to(folder).with_suffix("").parts]
        parts = [part for part in parts if part]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path) -> Iterator[str]:
    """Full names of all that a file imports, inside functions and for type checkers too."""
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:
                stem = importlib.util.resolve_name("." * node.level + stem, package)
            yield from (name for alias in node.names for name in (f"{stem}.{alias.name}", stem))


def graph_of(modules: dict[str, Path]) -> Graph:
    """Each module, and those that it imports: of `from a import b` the module a.b where there is one, else a."""
    graph: Graph = {}
    for module, path in modules.items():
        graph[module] = set()
        names = list(imported(module, path))
        for name in names:
            holder = name.rpartition(".")[0]
            is_holder = any(other.rpartition(".")[0] == name and other in modules for other in names)
            if name in modules and name != module and not is_holder:
                graph[module].add(name)
            elif holder in modules and name not in modules and holder != module:
                graph[module].add(holder)
    return graph


def floor_of(module: str) -> int:
    room = [*module.split("."), "__init__"][1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def upwards(graph: Graph) -> list[str]:
    pairs = ((module, other) for module, others in graph.items() for other in others)
    return sorted(f"{module} imports {other}" for module, other in pairs if floor_of(other) < floor_of(module))


def circle(graph: Graph) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture
def package(repository: Path) -> Graph:
    return graph_of(sources(repository / "rmsnorm_patch", "rmsnorm_patch"))


def test_every_import_points_down(package: Graph) -> None:
    assert len(package) > 80
    assert upwards(package) == []
    package["rmsnorm_patch.numerics.spec"].add("rmsnorm_patch.ops.dispatch")  # one that is put in is seen
    assert upwards(package) == ["rmsnorm_patch.numerics.spec imports rmsnorm_patch.ops.dispatch"]


def test_no_circle(package: Graph) -> None:
    assert circle(package) == []
    package["rmsnorm_patch.scan.plan"].add("rmsnorm_patch.scan.norms")
    assert set(circle(package)) == {"rmsnorm_patch.scan.plan", "rmsnorm_patch.scan.norms"}


def test_no_circle_in_scripts(repository: Path) -> None:
    graph = graph_of(sources(repository / "scripts", ""))
    assert "benchlib.aims" in graph["results"]
    assert circle(graph) == []
    graph["benchlib.aims"].add("results")
    assert set(circle(graph)) == {"benchlib.aims", "results"}


def test_few_files_lie_loose(repository: Path) -> None:
    loose = sorted(path.stem for path in (repository / "rmsnorm_patch").glob("*.py"))
    assert len(loose) <= LOOSE_FILES, loose
    rooms = {path.name for path in (repository / "rmsnorm_patch").iterdir() if (path / "__init__.py").exists()}
    assert {*rooms, *loose} == {room for floor in FLOORS for room in floor}


def rooms_of_classes(folder: Path) -> dict[str, set[str]]:
    """Name of each class below `folder` -> the rooms that have one."""
    rooms: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        room = path.relative_to(folder).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                rooms.setdefault(node.name, set()).add(room)
    return rooms


def test_no_class_name_stands_in_two_rooms(repository: Path, tmp_path: Path) -> None:
    """A reader who looks a name up finds one thing."""
    rooms = rooms_of_classes(repository / "rmsnorm_patch")
    assert len(rooms) > 100
    assert {name: where for name, where in rooms.items() if len(where) > 1 and name not in OF_ONE_KIND} == {}
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "a.py").write_text("class Case: ...")
    (tmp_path / "api.py").write_text("def f():\n    class Case: ...")
    assert rooms_of_classes(tmp_path) == {"Case": {"scan", "api"}}


def test_tests_mirror_the_rooms(repository: Path) -> None:
    """Each folder of tests is a room of the package, or says what crosses rooms."""
    crossing = {"adversarial", "data", "gpu", "packaging", "scripts"}
    folders = {path.name for path in (repository / "integration_tests").iterdir() if any(path.glob("**/test_*.py"))}
    rooms = {room for floor in FLOORS for room in floor}
    assert folders - crossing <= rooms, sorted(folders - crossing - rooms)
