"""Failures of a test run that were shown to be the tests' own: in the run's `explained`, {failure: reason}."""

from __future__ import annotations

from typing import Any

from .pytest_runs import NO_REPORT

Run = dict[str, Any]


def unexplained(tests: Run) -> list[str]:
    """What failed in a run and has no explanation."""
    failures, reasons = tests.get("failures", []), tests.get("explained", {})
    unnamed = tests["failed"] - len(failures)
    found = [name for name in failures if name == NO_REPORT or name not in reasons]
    return [*found, f"{unnamed} of no name"] if unnamed else found


def misplaced(tests: Run) -> list[str]:
    """What is wrong with the explanations of a run."""
    failures, reasons = tests.get("failures", []), tests.get("explained", {})
    found = [f"explains {name}, which did not fail" for name in reasons if name not in failures]
    return found + [f"explains {name} without a reason" for name, reason in reasons.items() if not _says(reason)]


def explain(runs: list[Run], name: str, reason: str) -> None:
    """Put the reason beside the failure of this name; a SystemExit, and no change, where it cannot stand there."""
    failed = [tests for tests in runs if name in tests["failures"]]
    if not failed:
        failures = ", ".join(failure for tests in runs for failure in tests["failures"])
        raise SystemExit(f"{name}: did not fail in this record; these did: {failures or 'none'}")
    if name == NO_REPORT:
        raise SystemExit(f"{name}: nobody knows what failed there; run the tests again")
    if not _says(reason):
        raise SystemExit(f"{name}: the reason is empty; say what showed that the test was wrong")
    for tests in failed:
        tests["explained"] = {**tests.get("explained", {}), name: reason}


def _says(reason: object) -> bool:
    return isinstance(reason, str) and bool(reason.strip())
