"""Every numbered case names tests that exist, or says why it has none; the page is that of the cases and results."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType

import pytest

LAST = 103
REPORT = """<testsuites><testsuite>
<testcase classname="integration_tests.test_a" name="test_one[x::y]"/>
<testcase classname="integration_tests.test_a" name="test_one[z]"><failure/></testcase>
<testcase classname="integration_tests.gpu.test_b" name="test_two"><skipped/></testcase>
<testcase classname="integration_tests.gpu.test_b" name="test_three"><error/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def reliability(script) -> ModuleType:
    return script("reliability")


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def marked(function: ast.FunctionDef) -> set[int]:
    """Numbers in `@case(1, 2)` or `@pytest.mark.case(1, 2)`."""
    calls = [d for d in function.decorator_list if isinstance(d, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "case"]
    return {ast.literal_eval(argument) for mark in marks for argument in mark.args}


def test_each_number_is_there_once(reliability):
    numbers = [case.number for area in reliability.read_cases() for case in area.cases]
    assert numbers == list(range(1, LAST + 1))


def test_each_case_has_tests_that_exist_or_says_why_not(reliability):
    known = {path: functions(path) for path in reliability.TESTS.rglob("test_*.py")}
    for area in reliability.read_cases():
        for case in area.cases:
            assert case.tests or case.gap, case
            assert len(set(case.tests)) == len(case.tests), case
            for test in case.tests:
                file, _, name = test.partition("::")
                assert name.startswith("test_"), test
                assert name in known.get(reliability.TESTS / file, {}), test


FILES_OF_CASES = {
    "test_bad_shapes_and_addresses.py",
    "test_difficult_numbers.py",
    "test_devices_streams_and_graphs.py",
}


def test_marks_of_gpu_tests_and_cases_agree(reliability):
    """A test that carries a number is named by that case, and those of the files of cases carry one each."""
    named = {case.number: case.tests for area in reliability.read_cases() for case in area.cases}
    for path in sorted((reliability.TESTS / "gpu").glob("test_*.py")):
        for name, function in functions(path).items():
            numbers = marked(function)
            if path.name in FILES_OF_CASES and name.startswith("test_"):
                assert numbers, name
            assert all(f"gpu/{path.name}::{name}" in named[number] for number in numbers), name


def test_the_pages_are_those_of_cases_and_results(reliability):
    text = reliability.page(reliability.read_cases(), reliability.all_results())
    assert reliability.PAGE.read_text() == text, "run scripts/reliability.py"
    assert reliability.FAULTS_PAGE.read_text() == reliability.faults_page(), "run scripts/reliability.py"


def test_reports_are_counted_by_function_and_a_skip_is_no_result(reliability, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert reliability.by_function([tmp_path / "report.xml"]) == {
        "test_a.py::test_one": {"passed": 1, "failed": 1},
        "gpu/test_b.py::test_three": {"passed": 0, "failed": 1},
    }


def test_results_are_kept_by_machine_and_the_newest_counts(reliability, tmp_path):
    """Of tests that a case names; one that was not run again keeps its result."""
    first, second = reliability.named_tests(reliability.read_cases())[:2]
    line = '<testsuite><testcase classname="{}" name="{}">{}</testcase></testsuite>'

    def report(test: str, inside: str = "") -> Path:
        file, _, name = test.partition("::")
        path = tmp_path / "report.xml"
        path.write_text(line.format(f"integration_tests.{file[:-3].replace('/', '.')}", name, inside))
        return path

    for test, inside in ((first, "<failure/>"), (second, ""), ("test_api.py::test_nothing", ""), (first, "")):
        reliability.take([report(test, inside)], "A GPU", tmp_path / "kept")
    results = reliability.read_results(tmp_path / "kept")
    assert {test: [(r.machine, r.passed, r.failed) for r in last] for test, last in results.items()} == {
        first: [("A GPU", 1, 0)],
        second: [("A GPU", 1, 0)],
    }
    assert set(json.loads((tmp_path / "kept" / "a-gpu.json").read_text())) == {"machine", "tests"}


def test_a_failure_a_gap_and_a_test_that_was_not_run_are_said(reliability):
    def ended(failed: int) -> list:
        return [reliability.Result("CPU", 1, failed, "2026-01-01", "abc")]

    case = reliability.Case(1, "something", ("a.py::test_a", "b.py::test_b"))
    assert reliability.verdict(case, {}) == "not run"
    assert reliability.verdict(case, {"a.py::test_a": ended(0)}) == "passed; 1 not run"
    assert reliability.verdict(case, {"a.py::test_a": ended(0), "b.py::test_b": ended(0)}) == "passed"
    assert reliability.verdict(case, {"a.py::test_a": ended(0), "b.py::test_b": ended(1)}) == "**failed**"
    text = reliability.page([reliability.Area("X", [reliability.Case(2, "else", (), "no reason")])], {})
    assert "| 2 | else | no test |" in text
    assert "| 2 | else | no reason |" in text


def test_gpu_records_of_todays_code_count_before_those_of_earlier_code(reliability, tmp_path):
    """Each of today's, else the newest of earlier code; a record that names no tests says nothing of one."""

    def record(path: str, date: str, name: str, **functions: int) -> None:
        tests = {test: {"passed": passed, "failed": 0} for test, passed in functions.items()}
        tests = {"passed": 9, "failed": 0, "skipped": 0, "failures": [], "functions": tests, "date": date, "commit": ""}
        (tmp_path / path).parent.mkdir(exist_ok=True)
        text = json.dumps({"digest": f"{name}-code", "device": {"name": name}, "tests": tests, "engine_tests": None})
        (tmp_path / path).write_text(text)

    record("a.json", "2026-01-03", "H100", now=1)
    record("b.json", "2026-01-02", "H200", now=2)
    record("superseded/c.json", "2026-01-01", "H100", now=3, before=4, oldest=5)
    record("superseded/d.json", "2026-01-02", "H200", before=6)
    (tmp_path / "superseded" / "e.json").write_text('{"digest": "x", "tests": {"passed": 1, "failed": 0}}')
    found = reliability.record_results(tmp_path)
    assert {test: [(r.machine, r.passed, r.earlier) for r in last] for test, last in found.items()} == {
        "now": [("H100", 1, False), ("H200", 2, False)],
        "before": [("H200", 6, True)],
        "oldest": [("H100", 5, True)],
    }
    cases = [reliability.Case(1, "one", ("now",)), reliability.Case(2, "two", ("now", "before"))]
    assert [reliability.verdict(case, found) for case in cases] == ["passed", reliability.EARLIER]
    text = reliability.page([reliability.Area("X", cases)], found)
    assert "6 passed, H200, 2026-01-02, earlier code H200-code" in text
    assert "1 passed, H100, 2026-01-03, code H100-code, 2 passed, H200" in text
    assert "| 2 | 1 | 1 | 0 | 0 | 0 | 0 |" in text
