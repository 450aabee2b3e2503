"""What a package index and a reader of the source archive see: metadata, the long description, links, files."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import readme_renderer.markdown

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:)([^)#]+)")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive."""
    folder = tmp_path_factory.mktemp("sdist")
    words = ["-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as packed:
        packed.extractall(folder)
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def metadata(archive: Path) -> Message:
    return Parser().parsestr((archive / "PKG-INFO").read_text())


def test_the_metadata_is_complete(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"] == "the rmsnorm_patch developers"
    assert metadata["Description-Content-Type"] == "text/markdown"
    classifiers = metadata.get_all("Classifier")
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(classifiers)
    minors = [int(c.rpartition(".")[2]) for c in classifiers if c.startswith("Programming Language :: Python :: 3.")]
    assert minors == list(range(int(metadata["Requires-Python"].removeprefix(">=3.")), max(minors) + 1))
    assert "rmsnorm" in metadata["Keywords"].split(",")
    torch = [line for line in metadata.get_all("Requires-Dist") if re.match(r"torch\b", line)]
    assert torch == ["torch>=2.9"]  # no pin and no ceiling: an install leaves the torch that is there
    assert metadata["Version"] == re.search(r'^__version__ = "(.+)"', init(), flags=re.MULTILINE)[1]


def init() -> str:
    return (ROOT / "rmsnorm_patch" / "__init__.py").read_text()


def test_the_long_description_reads_away_from_the_repository(metadata: Message) -> None:
    text = metadata.get_payload()
    assert LINK.findall(text) == []
    assert "![" not in text
    assert "The proof" in text or "Proof (`docs/proof.md`)" in text
    rendered = readme_renderer.markdown.render(text)
    assert rendered is not None
    assert "<table>" in rendered
    assert "rmsnorm_patch.apply(model)" in re.sub(r"<[^>]+>", "", rendered)
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    pages = {target for target in linked if target.endswith(".md")}
    assert all(f"`{page}`" in text for page in pages)


def test_the_archive_has_what_its_pages_link_to(archive: Path) -> None:
    pages = [*archive.glob("*.md"), *(archive / "docs").rglob("*.md"), *(archive / "records").glob("*.md")]
    assert {page.name for page in pages} >= {"README.md", "CHANGELOG.md", "RELEASING.md", "proof.md"}
    for page in pages:
        prose = re.sub(r"`[^`]*`", "", page.read_text())
        missing = [target for target in LINK.findall(prose) if not (page.parent / target).exists()]
        assert missing == [], page.name


def test_the_archive_has_every_file_under_version_control(archive: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    left_out = {name for name in listed if not (archive / name).exists() and (ROOT / name).exists()}
    assert {name for name in left_out if not name.startswith(".ci/")} == set()


def test_no_page_installs_from_an_index_that_has_no_such_package() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "records").glob("*.md")]
    found = [p.name for p in pages if re.search(r"pip install (?:-\S+ )*[\"']?rmsnorm[-_]patch", p.read_text())]
    assert found == []
