"""Say what the metadata of a release still lacks. Exit status 1 if it lacks anything.

    python scripts/release.py            # this checkout; or the folder of another

`make release` asks before it builds. `make dist` builds without asking, for a trial.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("Repository", "Issues")
"""Of `[project.urls]`. A package index shows them beside the package."""


def missing(folder: Path) -> list[str]:
    """What somebody has to fill in first, a line each."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    urls = project.get("urls", {})
    found = [
        f"pyproject.toml: [project.urls] has no https address for {name}"
        for name in ADDRESSES
        if not re.fullmatch(r"https://[\w.-]+\.\w+/\S+", urls.get(name, ""))
    ]
    source = (folder / "rmsnorm_patch" / "__init__.py").read_text()
    version = re.findall(r'^__version__ = "(.+)"', source, flags=re.MULTILINE)[0]
    dated = rf"^## {re.escape(version)}, \d{{4}}-\d\d-\d\d$"
    if not re.search(dated, (folder / "CHANGELOG.md").read_text(), flags=re.MULTILINE):
        found.append(f"CHANGELOG.md: no part '## {version}, YEAR-MONTH-DAY'")
    return found


def main() -> int:
    found = missing(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    for line in found:
        print(f"release: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
