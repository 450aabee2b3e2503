"""What README, CONTRIBUTING and docs/ name exists: files, links, commands, options, environment variables, API."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rmsnorm_patch
from rmsnorm_patch import errors
from rmsnorm_patch.cli import output
from rmsnorm_patch.cli.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "records").glob("*.md")])
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
FOLDERS = ("docs", "integration_tests", "kernels", "records", "rmsnorm_patch", "scripts")


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    prose = re.sub(r"`[^`]*`", "", text)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), anchor
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def options(command: Any) -> set[str]:
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    return {option for parameter in shown for option in parameter.opts if option.startswith("--")}


def rows(text: str, head: str) -> list[list[str]]:
    """Cells of the table whose first line begins with `head`."""
    table = text[text.index(f"\n| {head} ") + 1 :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_the_reference_has_every_command_and_option(script: Callable[[str], ModuleType]) -> None:
    shared = {name: set(re.findall(r"--[a-z-]+", name)) for name, *_ in rows(REFERENCE, "option")}
    everywhere = set().union(*shared.values())
    own = {re.sub(r"`rmsnorm-patch ([a-z -]*[a-z]).*", r"\1", row[0]): row[2] for row in rows(REFERENCE, "command")}
    commands = script("reference").commands()
    assert set(own) == set(commands)
    for name, command in commands.items():
        assert set(re.findall(r"--[a-z-]+", own[name])) == options(command) - everywhere, name
        assert "--json" in options(command), name
    on_models = {name for name, command in commands.items() if "--backend" in options(command)}
    assert on_models == {name for name in commands if "MODEL" in REFERENCE.split(f"`rmsnorm-patch {name}")[1][:6]}
    for names, which, _ in rows(REFERENCE, "option"):
        for option in re.findall(r"--[a-z-]+", names):
            taking = {name for name, command in commands.items() if option in options(command)}
            expected = {"all": set(commands), "all on a model": on_models}.get(which, on_models - {"demo"})
            assert taking == expected, option


def test_the_tables_of_the_reference_are_those_of_the_program(script: Callable[[str], ModuleType]) -> None:
    """Written by a script: words of `--help`, of the errors, and of the one table of variables."""
    assert script("reference").page(REFERENCE) == REFERENCE
    with pytest.raises(SystemExit, match="no place for the table of errors"):
        script("reference").page(REFERENCE.replace("<!-- errors:", "<!-- other:"))


def test_commands_in_the_pages_exist(script: Callable[[str], ModuleType]) -> None:
    commands = script("reference").commands()
    names = {*commands, *(name.split()[0] for name in commands)}
    for page in PAGES:
        for name in re.findall(r"`(?:\.venv/bin/)?rmsnorm-patch ([a-z][a-z-]*)", page.read_text()):
            assert name in names, (page.name, name)


def test_the_reference_has_every_exit_status() -> None:
    statuses = {output.FAILED, output.USAGE, output.UNSUPPORTED, output.DAMAGED, output.UNUSABLE, output.NOTHING_PROVED}
    assert {int(row[0]) for row in rows(REFERENCE, "exit status")} == {0, *statuses}


def test_the_reference_has_every_error() -> None:
    public = {name for name in rmsnorm_patch.__all__ if isinstance(getattr(rmsnorm_patch, name), type)}
    raised = {name for name in public if issubclass(getattr(rmsnorm_patch, name), Exception)}
    assert {row[0].strip("`") for row in rows(REFERENCE, "error")} == raised
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert raised == kinds


def test_the_reference_has_every_variable() -> None:
    """Those that `rmsnorm-patch env` knows, and whatever else of the name stands in the code."""
    documented = {row[0].strip("`") for row in rows(REFERENCE, "variable")}
    assert documented == set(VARIABLES)
    code = [path for suffix in ("py", "c", "h", "cu", "cuh") for path in (ROOT / "rmsnorm_patch").rglob(f"*.{suffix}")]
    read = {name for path in code for name in re.findall(r"RMSNORM_PATCH_[A-Z_]*[A-Z]", path.read_text())}
    assert read <= documented


def test_the_functions_in_the_pages_are_public() -> None:
    called = set(re.findall(r"rmsnorm_patch\.(\w+)\(", README + (ROOT / "docs" / "huggingface.md").read_text()))
    assert called == {"plan", "apply", "verify", "revert", "patched", "status", "warmup"}
    assert called <= set(rmsnorm_patch.__all__)


def test_the_example_in_the_readme_runs() -> None:
    """As it stands, in a process of its own, from the root of the checkout."""
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    assert "9 of 9 norms fused" in ended.stdout
    assert ": proved" in ended.stdout


def test_the_index_of_decisions_has_a_line_for_each() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in sorted((ROOT / "docs" / "decisions").glob("[a-z]*.md")):
        for head in re.findall(r"^## (.+)$", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^- \[{re.escape(head)}\]\({page.name}#", index, flags=re.MULTILINE), (page.name, head)
