"""What generated pages share: lines that fit a screen."""

from __future__ import annotations

import re
import textwrap

COLUMNS = 120


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
