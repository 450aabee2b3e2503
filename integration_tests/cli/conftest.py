"""Run the command line in this process and see exactly what it wrote and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rmsnorm_patch.cli import main


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """stdout as one JSON document; anything beside it fails here."""
        return json.loads(self.stdout)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`command("plan", folder, "--json")` -> exit status and the bytes on both streams, file descriptors included."""

    def run(*args: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in args])
        streams = capfd.readouterr()
        return Ended(int(ended.value.code or 0), streams.out, streams.err)

    return run
