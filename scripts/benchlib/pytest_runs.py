"""Runs of pytest, and how many of their tests passed."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchlib.checkout import python
from benchlib.stamp import stamp

TESTS = "integration_tests"
NO_REPORT = "pytest wrote no report"
"""Stands among the failures of a run that was cut off."""


def run_tests(words: list[str]) -> dict[str, Any]:
    """`counts_in` a run of pytest with these arguments, what each function gave, and when."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        tests = ("-m", "pytest", "-v", "-p", "no:cacheprovider", *words)  # a run that is cut off has named its failures
        python(*tests, f"--junitxml={report}", check=False)  # failures are counted below
        return {**counts_in(report), "functions": by_function([report] if report.exists() else []), **stamp()}


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several runs as those of one, which ended when the last did."""
    found = {name: sum(run[name] for run in runs) for name in ("passed", "failed", "skipped")}
    functions: dict[str, dict[str, int]] = {}
    for run in runs:
        for test, ended in run["functions"].items():
            _add(functions, test, ended)
    return {**runs[-1], **found, "failures": [name for run in runs for name in run["failures"]], "functions": functions}


def totals(tests: dict[str, Any] | None) -> dict[str, Any]:
    """Without what each function gave."""
    return {name: ended for name, ended in (tests or {}).items() if name != "functions"}


def by_function(reports: Iterable[Path]) -> dict[str, dict[str, int]]:
    """ "file.py::test", below `integration_tests` -> passed and failed of its parameters; a test that was only skipped
    is left out."""
    found: dict[str, dict[str, int]] = {}
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            if case.find("skipped") is None:
                file, red = case.get("classname", "").replace(".", "/").removeprefix(f"{TESTS}/"), _is_red(case)
                test = f"{file}.py::{case.get('name', '').partition('[')[0]}"
                _add(found, test, {"passed": int(not red), "failed": int(red)})
    return found


def _add(found: dict[str, dict[str, int]], test: str, ended: dict[str, int]) -> None:
    before = found.get(test, {"passed": 0, "failed": 0})
    found[test] = {name: before[name] + ended[name] for name in before}


def _is_red(case: ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def counts_in(report: Path) -> dict[str, Any]:
    """passed, failed, skipped and the names of failures, from pytest's XML; a run without one has failed."""
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0, "failures": [NO_REPORT]}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    names = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase") if _is_red(case)]
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped, "failures": names}
