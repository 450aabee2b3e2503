"""What generated pages share: tables, figures, lines that fit a screen."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

COLUMNS = 120
MISSING = "Not in this record.\n"


def table(head: list[str], rows: Iterable[list[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def figure(value: float | None, form: str = ".2f") -> str | None:
    return None if value is None else format(value, form)


def wrapped(page: str) -> str:
    """A page of Markdown whose paragraphs and list items have lines of at most COLUMNS; tables and headings stay."""
    lines: list[str] = []
    for line in page.split("\n"):
        if len(line) <= COLUMNS or line.startswith(("|", "#", "![")):
            lines.append(line)
            continue
        indent = " " * len(re.match(r"(?:[-*] )?", line)[0])  # type: ignore[index]
        lines += textwrap.wrap(line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)
