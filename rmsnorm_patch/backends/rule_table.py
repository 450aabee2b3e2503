"""The format of every file of schedules: a TOML table, a line a rule, read so that a mistake names file and key.

`columns` names the cells of a rule; "-" stands for nothing said, and a column `reason` holds a key of `reasons`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import KernelBuildError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNBOUNDED = 2**63 - 1
Range = tuple[int, int]


class Table:
    """One table of a file: typed reads that leave nothing unread."""

    def __init__(self, file: Path, where: str, values: object) -> None:
        self.file, self.where = file, where
        if not isinstance(values, dict):
            raise self.error(where, values, "a table")
        self.values: dict[str, Any] = dict(values)

    def error(self, key: str, got: object, allowed: str) -> KernelBuildError:
        """For a value that this file must not have. (Methods that read a value take it out, and raise this.)"""
        return KernelBuildError(
            site=f"{self.file}: {key}", got=repr(got), supported=allowed, next_step="correct this key or remove it"
        )

    def _key(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def text(self, key: str, default: str | None = None, allowed: Collection[str] | None = None) -> str:
        """A string, one of those allowed."""
        value = self.values.pop(key, default)
        if not isinstance(value, str) or (allowed is not None and value not in allowed):
            raise self.error(self._key(key), value, "one of " + ", ".join(allowed) if allowed else "a string")
        return value

    def texts(self, key: str, allowed: tuple[str, ...], default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of at least one of those allowed."""
        value = self.values.pop(key, default)
        if not isinstance(value, list | tuple) or not value or any(item not in allowed for item in value):
            raise self.error(self._key(key), value, "a list out of " + ", ".join(allowed))
        return tuple(value)

    def integer(self, key: str, default: int | None, allowed: Collection[int] | None = None, low: int = 1) -> int:
        """An integer from `low` on, one of those allowed."""
        value = self.values.pop(key, default)
        wrong = type(value) is not int or value < low or (allowed is not None and value not in allowed)
        if wrong:
            raise self.error(self._key(key), value, f"one of {tuple(allowed)}" if allowed else f"an integer >= {low}")
        return value  # type: ignore[return-value]

    def span(self, key: str, default: Range | None, low: int = 1) -> Range:
        """[min] or [min, max], or the minimum alone."""
        value = self.values.pop(key, default)
        if type(value) is int:
            value = (value, UNBOUNDED)
        allowed = f"[min] or [min, max], integers, {low} <= min <= max"
        if not isinstance(value, list | tuple) or len(value) not in (1, 2) or any(type(v) is not int for v in value):
            raise self.error(self._key(key), value, allowed)
        first, last = value[0], value[1] if len(value) == 2 else UNBOUNDED
        if not low <= first <= last:
            raise self.error(self._key(key), value, allowed)
        return first, last

    def itemsizes(self) -> tuple[int, ...]:
        """Bytes of the elements of x that are served: 2, 4 or both, which is the default."""
        value = self.values.pop("itemsize", [2, 4])
        if not isinstance(value, list) or not value or any(v not in (2, 4) for v in value):
            raise self.error(self._key("itemsize"), value, "a list out of 2, 4 (bytes of one element of x)")
        return tuple(value)

    def rules(self) -> list[Table]:
        """The rules by the names of their columns: only what they say, with the reason spelled out."""
        columns, rules = self.values.pop("columns", None), self.values.pop("rules", None)
        if not isinstance(columns, list) or not columns or len(set(map(str, columns))) < len(columns):
            raise self.error("columns", columns, "a list of different names")
        if not isinstance(rules, list) or not rules:
            raise self.error("rules", rules, "a list of rules")
        reasons = self.values.pop("reasons", {})
        if not isinstance(reasons, dict) or any(not isinstance(text, str) for text in reasons.values()):
            raise self.error("reasons", reasons, "a table of number = text")
        found, unused = [], set(reasons)
        for i, cells in enumerate(rules):
            where = f"rules[{i}]"
            if not isinstance(cells, list) or len(cells) != len(columns):
                raise self.error(where, cells, f"{len(columns)} cells: {', '.join(map(str, columns))}")
            values = {str(column): cell for column, cell in zip(columns, cells, strict=True) if cell != "-"}
            if "reason" in values:
                number = str(values["reason"])
                if number not in reasons:
                    raise self.error(f"{where}.reason", values["reason"], f"a key of reasons: {', '.join(reasons)}")
                values["reason"] = reasons[number]
                unused.discard(number)
            found.append(Table(self.file, where, values))
        if unused:
            raise self.error("reasons", sorted(unused), "reasons that a rule names")
        return found

    def done(self, known: str) -> None:
        if self.values:
            key = next(iter(self.values))
            raise self.error(self._key(key), self.values[key], f"only the keys {known}")


def content_of(file: Path, next_step: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KernelBuildError(str(file), str(error), "a readable TOML file", next_step) from error
