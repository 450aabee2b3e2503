"""Runs of pytest, and how many of their tests passed."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchlib.checkout import python


def run_tests(words: list[str]) -> dict[str, object]:
    """`counts_in` a run of pytest with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        tests = ("-m", "pytest", "-v", "-p", "no:cacheprovider", *words)  # a run that is cut off has named its failures
        python(*tests, f"--junitxml={report}", check=False)  # failures are counted below
        return counts_in(report)


def merged(counts: list[dict]) -> dict[str, object]:
    """Counts of several runs as those of one."""
    found: dict[str, object] = {name: sum(run[name] for run in counts) for name in ("passed", "failed", "skipped")}
    return {**found, "failures": [name for run in counts for name in run["failures"]]}


def counts_in(report: Path) -> dict[str, object]:
    """passed, failed, skipped and the names of failures, from pytest's XML; a run without one has failed."""
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0, "failures": ["pytest wrote no report"]}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped, "failures": names}
