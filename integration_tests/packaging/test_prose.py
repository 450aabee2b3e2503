"""Pages read as prose should: short lines, short sentences, one title, a way from README to each of them."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "records").rglob("*.md")])
COLUMNS, CELL, WORDS, FILE_LINES = 120, 120, 25, 450
READ_THROUGH = {
    README: 90,
    ROOT / "docs" / "tutorial.md": 120,
    ROOT / "docs" / "proof.md": 120,
    ROOT / "docs" / "how_it_works.md": 150,
    ROOT / "docs" / "adding_an_op.md": 60,
}
"""Lines of the pages that a reader follows from top to bottom."""
GENERATED = {
    ROOT / "docs" / name
    for name in (
        *("results.md", "results_quantised.md", "results_h100.md", "results_h100_quantised.md"),
        *("support_matrix.md", "support_diffusion.md", "kernels.md", "reliability.md", "reliability_faults.md"),
    )
}
"""Their sentences are a script's, and are not counted."""
WRITTEN = [page for page in PAGES if page not in GENERATED]
SOURCES = ("docs", "integration_tests", "kernels", "records", "rmsnorm_patch", "scripts")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def outside_code(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of all but fenced blocks."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def long_lines(text: str) -> list[int]:
    return [n for n, line in outside_code(text) if len(line) > COLUMNS and not line.lstrip().startswith("|")]


def long_cells(text: str) -> list[str]:
    """As they are read: where a link leads does not count."""
    lines = (re.sub(r"\]\([^)]*\)", "]", line) for _, line in outside_code(text) if line.lstrip().startswith("|"))
    rows = (line.strip().strip("|").split("|") for line in lines)
    return [cell.strip() for row in rows for cell in row if len(cell.strip()) > CELL]


def sentences(text: str) -> list[str]:
    """Of paragraphs and list items; what stands in a table, a heading or a block of code is none."""
    blocks: list[str] = [""]
    for _, line in outside_code(text):
        if re.match(r"\s*(\||#|!\[|$)", line):
            blocks.append("")
        elif re.match(r"\s*([-*]|\d+\.) ", line):
            blocks.append(re.sub(r"^\s*([-*]|\d+\.) ", "", line))
        else:
            blocks[-1] += " " + line.strip()
    found = []
    for block in blocks:
        plain = re.sub(r"`[^`]*`", "`code`", block)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain).replace("**", "")
        found += [part.strip() for part in re.split(r'(?<=[.!?])\)? +(?=[A-Z0-9`"*(-])', plain)]
    return [sentence for sentence in found if sentence]


def long_sentences(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(sentence.split()) > WORDS]


def reached(start: Path) -> set[Path]:
    """Pages to which links lead, from page to page."""
    seen, waiting = {start}, [start]
    while waiting:
        page = waiting.pop()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            linked = (page.parent / target).resolve()
            if linked.suffix == ".md" and linked.exists() and linked not in seen:
                seen.add(linked)
                waiting.append(linked)
    return seen


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_fit_the_screen(page: Path) -> None:
    assert long_lines(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_has_one_title_and_begins_with_it(page: Path) -> None:
    text = page.read_text()
    assert text.startswith("# ")
    assert [n for n, line in outside_code(text) if line.startswith("# ")] == [1]


def test_pages_that_are_read_through_are_short() -> None:
    lines = {named(page): len(page.read_text().splitlines()) for page in READ_THROUGH}
    assert {name: count for name, count in lines.items() if count > READ_THROUGH[ROOT / name]} == {}


@pytest.mark.parametrize("page", [page for page in WRITTEN if "records" not in page.parts], ids=named)
def test_cells_are_short(page: Path) -> None:
    assert long_cells(page.read_text()) == []


def idle_columns(text: str) -> list[str]:
    """Columns of a page's tables in which all rows say one thing; tables of one head are read as one."""
    said: dict[tuple[str, ...], list[list[str]]] = {}
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not head or not cells:
            head = cells
        elif not set(line) <= set("|-: "):
            said.setdefault(tuple(head), []).append(cells)
    return [
        name
        for names, rows in said.items()
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
        if len(rows) > 20 and len(set(column)) == 1
    ]


def test_each_column_of_the_kernels_tells_them_apart() -> None:
    assert idle_columns((ROOT / "docs" / "kernels.md").read_text()) == []


def test_no_file_is_long() -> None:
    """Pages and sources; tables of data and records may be."""
    folders = [ROOT / name for name in SOURCES]
    suffixes = {".py", ".md", ".c", ".h", ".cu", ".cuh"}
    files = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)]
    assert len(files) > 500
    lengths = {named(path): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_every_page_is_reached_from_readme() -> None:
    assert sorted(map(named, set(PAGES) - reached(README))) == []


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_sentences_are_short(page: Path) -> None:
    assert long_sentences(page.read_text()) == []


def timings(source: str) -> list[str]:
    """Strings and comments of Python code that name a time or a rate that somebody measured."""
    words = (token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if is_prose(token))
    return [found for text in words for found in re.findall(r"\b\d[\d.]* ?(?:us|ns|ms|TB/s|GB/s|tokens/s)\b", text)]


def is_prose(token: tokenize.TokenInfo) -> bool:
    docstring = token.type == tokenize.STRING and token.string.lstrip("rf").startswith('"""')
    return docstring or token.type == tokenize.COMMENT


ELSEWHERE = {"file.py"}
"""File names in docstrings that stand for any."""


def files_named(source: str) -> set[str]:
    """Sources of this project's kinds that strings and comments of Python code name, without their folders."""
    prose = (token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if is_prose(token))
    return {
        found for text in prose for found in re.findall(r"(?<![\w*])(\w+(?:\.html)?\.(?:py|cuh?|[ch]|toml|j2))\b", text)
    }


@pytest.mark.parametrize("folder", ["rmsnorm_patch", "kernels", "scripts"])
def test_docstrings_name_files_that_are_there(folder: str) -> None:
    there = ELSEWHERE.union(*({path.name for path in (ROOT / name).rglob("*")} for name in SOURCES))
    gone = {named(path): files_named(path.read_text()) - there for path in sorted((ROOT / folder).rglob("*.py"))}
    assert {path: names for path, names in gone.items() if names} == {}


@pytest.mark.parametrize("folder", ["rmsnorm_patch", "kernels", "scripts", "integration_tests"])
def test_no_docstring_holds_a_time(folder: str) -> None:
    found = {named(path): timings(path.read_text()) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert found
    assert {path: times for path, times in found.items() if times} == {}


def test_the_measures_see_what_they_should() -> None:
    """A page that breaks each rule, for a measure that sees nothing finds nothing."""
    word = "Word "
    assert long_lines(f"short\n\n{'x' * 121}\n\n| {'x' * 200} |\n```\n{'x' * 121}\n```") == [3]
    assert long_cells(f"| {'x' * 121} | y |\n|---|---|\n") == ["x" * 121]
    assert long_cells(f"| [{'x' * 118}]({'y' * 99}) |\n| [{'x' * 119}](y) |\n") == [f"[{'x' * 119}]"]
    paragraph = f"One. {word * 13}\n{word * 13}end."
    text = f"# Title of five more words\n\n{paragraph}\n\n- {word * 25}\n- {word * 26}\n| {word * 30} |"
    assert [len(sentence.split()) for sentence in long_sentences(text)] == [27, 26]
    table = "| a | b |\n|---|---|\n" + "".join(f"| {row} | no |\n" for row in range(12))
    assert idle_columns(f"{table}\n{table}") == ["b"]
    assert timings('def f():\n    """It took 6.5 us."""\n    x = "6.5 us"  # and 44us\n') == ["6.5 us", "44us"]
    assert files_named('"""See gone.py."""\nx = "other.c"  # of `launcher/a_b.h`, or *.cu\n') == {"gone.py", "a_b.h"}
    assert sentences("See `a. B`, [a link. There](x.md) or so. Next: More.") == [
        "See `code`, a link.",
        "There or so.",
        "Next: More.",
    ]
