"""A release is refused as long as its metadata lacks what only a person can fill in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("pyproject.toml", "CHANGELOG.md", "rmsnorm_patch/__init__.py")
URLS = '[project.urls]\nRepository = "{0}"\nIssues = "{0}/issues"\n\n'
HERE = "https://forge.example/team/package"


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """What the check reads of this checkout, as if no address and no date had been filled in yet."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(repository / name, tmp_path / name)
    project, changes = tmp_path / "pyproject.toml", tmp_path / "CHANGELOG.md"
    project.write_text(re.sub(r"(?ms)^\[project\.urls\]\n.*?(?=^\[)", "", project.read_text()))
    changes.write_text(re.sub(r"(?m)^(## \S+), .*$", r"\1, not released", changes.read_text()))
    return tmp_path


def fill_in(checkout: Path, address: str = HERE, date: str = "2030-01-31") -> None:
    project, changes = checkout / "pyproject.toml", checkout / "CHANGELOG.md"
    project.write_text(project.read_text().replace("[project.scripts]", URLS.format(address) + "[project.scripts]"))
    changes.write_text(changes.read_text().replace("not released", date, 1))


def asked(repository: Path, checkout: Path) -> tuple[int, list[str]]:
    words = [sys.executable, str(repository / "scripts" / "release.py"), str(checkout)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


def test_what_nobody_filled_in_is_named(repository: Path, checkout: Path) -> None:
    status, lines = asked(repository, checkout)
    assert status == 1
    assert [bool(re.search(word, line)) for word, line in zip(("Repo", "Issues", "CHANGE"), lines, strict=True)] == [
        True
    ] * 3


def test_filled_in_it_passes(repository: Path, checkout: Path) -> None:
    fill_in(checkout)
    assert asked(repository, checkout) == (0, [])


@pytest.mark.parametrize("address", ["", "http://forge.example/team/package", "https://", "https://forge.example"])
def test_what_is_no_address_does_not_count(repository: Path, checkout: Path, address: str) -> None:
    fill_in(checkout, address)
    assert asked(repository, checkout)[0] == 1


def test_a_date_is_asked_for(repository: Path, checkout: Path) -> None:
    fill_in(checkout, date="soon")
    status, lines = asked(repository, checkout)
    assert (status, len(lines)) == (1, 1)


def test_make_release_asks_before_it_builds(repository: Path) -> None:
    done = subprocess.run(["make", "-n", "release"], cwd=repository, capture_output=True, text=True, check=True)
    assert 0 < done.stdout.index("scripts/release.py") < done.stdout.index("-m build ")
