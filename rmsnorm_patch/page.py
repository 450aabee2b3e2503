"""Sites and reasons as lines of text that fit a page: what plans, reports and proofs print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

WIDTH = 120
SHOWN_RANGES = 4
"""Of layer numbers in one path; of more, the first and the last number are shown."""


def wrapped(text: str, width: int = WIDTH, hanging: str = "") -> list[str]:
    """`text` in lines of at most `width` characters, those after the first indented by `hanging`. Words stay whole; one
    that is longer than a line is parted after a dot or a slash."""
    room = max(width - len(hanging), 8)
    fitting = re.sub(rf"\S{{{room + 1},}}", lambda word: " ".join(_pieces(word.group(), room)), text)
    return textwrap.wrap(fitting, width, subsequent_indent=hanging, break_on_hyphens=False) or [""]


def _pieces(word: str, room: int) -> list[str]:
    """`word` in pieces of at most `room` characters."""
    pieces = []
    while len(word) > room:
        at = max(word.rfind(mark, 0, room) for mark in "./") + 1 or room
        pieces.append(word[:at])
        word = word[at:]
    return [*pieces, word]


def page(lines: Iterable[str], width: int = WIDTH) -> str:
    """`lines`, each wrapped under its own indentation."""
    wrapped_lines: list[str] = []
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        wrapped_lines += wrapped(line, width, f"{indent}    ")
    return "\n".join(wrapped_lines)


def summarised(lines: Iterable[str]) -> list[str]:
    """Lines that differ in numbers alone, as those of the layers of a stack do, as the first of them and a count."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"\d+", "#", line), []).append(line)
    return [first if not more else f"{first} (and {len(more)} more like this)" for first, *more in groups.values()]


def numbered(path: str) -> tuple[str, tuple[int, ...]]:
    """("model.layers.#.norm", (3,)) for "model.layers.3.norm"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path), tuple(int(n) for n in re.findall(r"(?<=\.)(\d+)(?=\.|$)", path))


def folded(paths: Iterable[str]) -> str:
    """One row's paths: layer numbers that follow each other become a range, "layers.[0-1,3].norm"."""
    listed = list(paths)
    pattern, numbers = numbered(listed[0])
    if len(listed) == 1 or len(numbers) != 1:
        return listed[0] or "(root)" if len(listed) == 1 else f"{listed[0]} ... ({len(listed)})"
    indices = sorted(numbered(p)[1][0] for p in listed)
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = ranges[-1][0], index
        else:
            ranges.append((index, index))
    shown = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    if len(ranges) > SHOWN_RANGES:
        shown = f"{indices[0]}..{indices[-1]} ({len(indices)} of them)"
    return pattern.replace("#", f"[{shown}]")
