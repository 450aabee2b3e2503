"""Where the tests of Triton's kernels find `ahead`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # test folders are not packages
