"""How faults ended, kept in a file while a run goes on, so that a run can be cut short, resumed and merged.

File: {"suite", "left_out": ids of tests that are red without a fault, "files": {file: {"source": its sha256, "ends":
{end: "key key ..."}}}, "seen_by": {id of a test: "key key ..."}}. A key is of the fault's name. Ends of a file that has
changed since are not taken. Which test saw a fault is taken all the same: it tells a run what to ask first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from .faults import Fault

ENDS = ("survived", "killed", "crashed", "hung", "same code", "does not compile")
NOT_SEEN = ("survived", "same code")
"""Ends that another run, with more tests, may better."""


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def key_of(fault: Fault) -> str:
    return _digest(fault.named(), 12)


class Outcomes:
    """Ends of the faults of one suite by key. faults: every fault that the suite has today."""

    def __init__(self, root: Path, suite: str, faults: Iterable[Fault], kept: Path | None = None) -> None:
        self.suite, self.kept = suite, kept
        self.left_out: list[str] = []
        by_key = {key_of(fault): fault for fault in faults}
        self._files = {key: fault.file for key, fault in by_key.items()}
        self._starts = {key: fault.start for key, fault in by_key.items()}
        self._sources = {file: _digest((root / file).read_text(), 64) for file in sorted(set(self._files.values()))}
        self._ends: dict[str, str] = {}
        self._seen_by: dict[str, str] = {}

    def take(self, path: Path) -> None:
        """Add what a file holds. What a test saw once stays seen; otherwise the later end counts."""
        held = json.loads(path.read_text())
        if held["suite"] != self.suite:
            raise SystemExit(f"mutants: {path} is of {held['suite']}, not of {self.suite}")
        self.left_out = sorted({*self.left_out, *held["left_out"]})
        for test, keys in held.get("seen_by", {}).items():
            self._seen_by |= {key: test for key in keys.split() if key in self._files}
        for file, part in held["files"].items():
            if self._sources.get(file) != part["source"]:
                print(f"{path}: {file} has changed since; its faults are to be run again", flush=True)
                continue
            for end, keys in part["ends"].items():
                for key in keys.split():
                    if key in self._files and self._ends.get(key, "survived") in NOT_SEEN:
                        self._ends[key] = end

    def of(self, fault: Fault) -> str | None:
        return self._ends.get(key_of(fault))

    def likely(self, fault: Fault, count: int = 6) -> list[str]:
        """Ids of tests that are likely to see a fault: the one that saw it before, then those that saw its nearest."""
        own = key_of(fault)
        near = [key for key in self._seen_by if self._files[key] == fault.file]
        near.sort(key=lambda key: (key != own, abs(self._starts[key] - fault.start)))
        return list(dict.fromkeys(self._seen_by[key] for key in near))[:count]

    def note(self, fault: Fault, end: str, by: str = "") -> None:
        """Keep an end, in the file too. by: id of the test that saw the fault."""
        self._ends[key_of(fault)] = end
        if by:
            self._seen_by[key_of(fault)] = by
        self.write()

    def write(self) -> None:
        if self.kept is None:
            return
        files: dict[str, dict[str, object]] = {}
        for file, source in self._sources.items():
            by_end = {end: [k for k, e in self._ends.items() if e == end and self._files[k] == file] for end in ENDS}
            files[file] = {"source": source, "ends": {end: " ".join(keys) for end, keys in by_end.items() if keys}}
        seen_by: dict[str, list[str]] = {}
        for key, test in self._seen_by.items():
            seen_by.setdefault(test, []).append(key)
        held = {"suite": self.suite, "left_out": self.left_out, "files": files}
        if seen_by:
            held["seen_by"] = {test: " ".join(keys) for test, keys in sorted(seen_by.items())}
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        new = self.kept.with_name(f".{self.kept.name}.new")
        new.write_text(json.dumps(held, indent=1) + "\n")
        os.replace(new, self.kept)
