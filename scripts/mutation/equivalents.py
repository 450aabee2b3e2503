"""Survivors that are no faults: `equivalent.toml` has their names by the reason."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("equivalent.toml")


def equivalents() -> dict[str, str]:
    """Name of a fault -> why it is none."""
    entries = tomllib.loads(FILE.read_text())["equivalent"]
    return {f"{entry['file']}: {fault}": entry["why"] for entry in entries for fault in entry["faults"]}
