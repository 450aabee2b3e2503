"""Failures that were shown to be the tests' own: what may be explained, what the check then says, what a page shows."""

from __future__ import annotations

import json
import sys

import pytest

NAMES = ["a::one[8]", "a::two"]
WHY = "two compilations of stock differ too"


@pytest.fixture(scope="module")
def gpu_record(script):
    return script("gpu_record")


@pytest.fixture(params=["tests", "engine_tests"])
def part(request) -> str:
    return request.param


@pytest.fixture
def record(gpu_record, part):
    """Of no files; two tests of this part failed. Made-up counts."""
    run = {"passed": 3, "failed": 0, "skipped": 1, "failures": []}
    record = {"digest": gpu_record.digest_of({}), "files": {}, "kernels": [], "tests": run, "engine_tests": None}
    record["device"] = {"name": "test data, no GPU"}
    record[part] = {**run, "failed": len(NAMES), "failures": NAMES, "files": gpu_record.plugin_files()}
    return record


@pytest.fixture
def explain(gpu_record, record, tmp_path, monkeypatch):
    """`explain(name, why)`: the record as the command leaves it."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record))

    def run(name: str, why: str) -> dict:
        words = ["gpu_record.py", "explain", "--record", str(path), "--test", name, "--because", why]
        monkeypatch.setattr(sys, "argv", words)
        gpu_record.main()
        return json.loads(path.read_text())

    return run


def test_failures_are_findings_until_each_is_explained(gpu_record, record, explain, part):
    (both,) = gpu_record.findings_of(record)
    assert all(name in both for name in NAMES)
    first = explain(NAMES[0], WHY)
    (other,) = gpu_record.findings_of(first)
    assert NAMES[0] not in other
    assert NAMES[1] in other
    found = explain(NAMES[1], WHY)
    assert gpu_record.findings_of(found) == []
    assert found == {**record, part: {**record[part], "explained": dict.fromkeys(NAMES, WHY)}}


@pytest.mark.parametrize(
    ("name", "why", "said"),
    [
        ("a::one", WHY, r"a::one: did not fail in this record; these did: a::one\[8\], a::two"),
        ("a::two", "", "a::two: the reason is empty"),
        ("a::two", " \n", "a::two: the reason is empty"),
    ],
)
def test_what_the_command_refuses(record, explain, tmp_path, name, why, said):
    with pytest.raises(SystemExit, match=said):
        explain(name, why)
    assert json.loads((tmp_path / "r.json").read_text()) == record


@pytest.mark.parametrize("why", ["", "  ", None])
def test_an_empty_reason_is_a_finding(gpu_record, record, part, why):
    record[part]["explained"] = {NAMES[0]: WHY, NAMES[1]: why}
    assert gpu_record.findings_of(record) == [f"{part} explains a::two without a reason"]


def test_an_explanation_of_a_test_that_did_not_fail_is_a_finding(gpu_record, record, part):
    """Whatever plugin the record speaks of."""
    record[part]["explained"] = {**dict.fromkeys(NAMES, WHY), "a::three": WHY}
    record[part]["files"] = {} if part == "engine_tests" else record[part]["files"]
    assert gpu_record.findings_of(record) == [f"{part} explains a::three, which did not fail"]


def test_a_failure_without_a_name_stays_a_finding(gpu_record, record, part):
    record[part] |= {"failed": 3, "explained": dict.fromkeys(NAMES, WHY)}
    (finding,) = gpu_record.findings_of(record)
    assert "1 of no name" in finding


def test_a_run_without_a_report_is_not_explained(gpu_record, record, explain, part, tmp_path, script):
    name = script("benchlib.pytest_runs").NO_REPORT
    record[part] |= {"failed": 1, "failures": [name]}
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="nobody knows what failed"):
        explain(name, WHY)
    record[part]["explained"] = {name: WHY}
    (finding,) = gpu_record.findings_of(record)
    assert name in finding


def test_nothing_of_kernels_and_sanitizers_is_explained(gpu_record, record, part):
    """Nor a run in which nothing passed."""
    kernel = {"op": "rms_norm", "mode": "cold", "dtype": "bf16", "m": 1, "n": 64, "failed": {"ours": "error 1"}}
    row = {"tool": "memcheck", "errors": 0, "passed": 3, "failed": 1, "failures": ["a::two"]}
    record[part]["explained"] = dict.fromkeys(NAMES, WHY)
    found = gpu_record.findings_of({**record, "kernels": [kernel], "sanitizer": [row]})
    assert [what.split()[0] for what in found] == ["rms_norm", "compute-sanitizer"]
    (finding,) = gpu_record.findings_of({**record, "tests": {**record["tests"], "passed": 0}})
    assert "'passed': 0" in finding


def test_another_run_of_the_tests_is_not_explained(gpu_record, record, explain, part, tmp_path, monkeypatch):
    explain(NAMES[0], WHY)
    failed = {"passed": 3, "failed": 1, "skipped": 1, "failures": NAMES[:1]}
    monkeypatch.setattr(gpu_record, "device", lambda: record["device"])
    monkeypatch.setattr(gpu_record, "digest", lambda: record["digest"])
    monkeypatch.setattr(gpu_record, "run_tests", lambda words: failed)
    words = ["gpu_record.py", "run", "--record", str(tmp_path / "r.json"), "--parts", part]
    monkeypatch.setattr(sys, "argv", words)
    gpu_record.main()
    (finding,) = gpu_record.findings_of(json.loads((tmp_path / "r.json").read_text()))
    assert NAMES[0] in finding


def test_the_results_say_what_failed_and_why(record, part, script):
    results = script("results")
    assert "| failed | why |" not in results.tests_text(record)
    record[part]["explained"] = {NAMES[0]: "either a | b\nor c"}
    head = "3 passed, 2 failed, 1 skipped.\n\n| failed | why |\n|---|---|\n"
    assert head + "| `a::one[8]` | either a \\| b or c |\n" in results.tests_text(record)
