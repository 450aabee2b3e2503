"""What README, CONTRIBUTING and docs/ name exists: files, links, commands, options, environment variables, API."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

import rmsnorm_patch
from rmsnorm_patch.cli.app import app
from rmsnorm_patch.cli.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "records").glob("*.md")])
README = (ROOT / "README.md").read_text()
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


def test_the_commands_in_the_readme_are_those_of_the_program() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    shown = re.findall(r"^rmsnorm-patch (\S+)", README, flags=re.MULTILINE)
    assert set(shown) == set(commands)
    for name, rest in re.findall(r"^rmsnorm-patch (\S+)(.*?)(?:#|$)", README, flags=re.MULTILINE):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options


def test_every_command_takes_json() -> None:
    groups = [get_command(app)]
    leaves = []
    while groups:
        for command in groups.pop().commands.values():  # type: ignore[attr-defined]
            (groups if hasattr(command, "commands") else leaves).append(command)
    assert len(leaves) == 9
    for command in leaves:
        assert any("--json" in parameter.opts for parameter in command.params), command.name


def test_environment_variables_are_documented() -> None:
    documented = set(re.findall(r"^\| `(RMSNORM_PATCH_[A-Z_]+)`", README, flags=re.MULTILINE))
    assert documented == set(VARIABLES)


def test_the_functions_in_the_readme_are_public() -> None:
    called = set(re.findall(r"rmsnorm_patch\.(\w+)\(", README))
    assert called == {"plan", "apply", "verify", "revert", "patched", "warmup"}
    assert called <= set(rmsnorm_patch.__all__)


def test_the_index_of_decisions_has_a_line_for_each() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in sorted((ROOT / "docs" / "decisions").glob("[a-z]*.md")):
        for head in re.findall(r"^## (.+)$", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^- \[{re.escape(head)}\]\({page.name}#", index, flags=re.MULTILINE), (page.name, head)
