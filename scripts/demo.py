"""Patch the two shipped checkpoints, prove them, compare text and speed: what `make demo` runs.

    python scripts/demo.py [MODEL ...] [options of `rmsnorm-patch demo`]

Exit status 0: every proof passed and the text is the same; 1: something differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rmsnorm_patch.cli import main

SHIPPED = Path(__file__).resolve().parent.parent / "integration_tests" / "data"

if __name__ == "__main__":
    given = sys.argv[1:]
    names_models = bool(given) and not given[0].startswith("-")
    main(["demo", *([] if names_models else [str(SHIPPED / name) for name in ("tiny-llama", "tiny-mistral")]), *given])
