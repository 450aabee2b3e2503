"""Where what a compiler made is kept beyond a run."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def kept_folder(name: str) -> Path:
    """With the environment; among the temporary files where that belongs to somebody else."""
    own = os.access(sys.prefix, os.W_OK)
    folder = Path(sys.prefix if own else tempfile.gettempdir(), f"compiled_{name}{'' if own else f'_{os.getuid()}'}")
    folder.mkdir(exist_ok=True)
    return folder
