"""Say of each numbered case which tests hold it and how they last ended: writes docs/reliability.md, and beside it a
page of generated faults.

    python scripts/reliability.py                     write the pages from the cases and the results
    python scripts/reliability.py --check             exit 1 where a page is stale
    python scripts/reliability.py run --where cpu     run the tests that cases name, keep their results, write the pages
    python scripts/reliability.py take REPORT.xml     keep the results in pytest's own reports, write the pages

Cases: `integration_tests/adversarial/cases.toml`. Results: `records/cases`, a file for each machine, and the records of
`scripts/gpu_record.py`; where those of today's code do not have a test, the newest of earlier code that has it. What
was skipped is no result. `--results` names another folder to keep them in, and then no page is written.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchlib.pages import wrapped  # noqa: E402
from benchlib.pytest_runs import by_function  # noqa: E402
from benchlib.stamp import stamp  # noqa: E402
from mutation.equivalents import equivalents  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE, FAULTS_PAGE = ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability_faults.md"
TESTS = ROOT / "integration_tests"
CASES = TESTS / "adversarial" / "cases.toml"
RECORDS = ROOT / "records"
RESULTS = RECORDS / "cases"
MUTANTS, FUZZ = RECORDS / "mutants", RECORDS / "fuzz"
WHERE = {"cpu": "CPU", "vllm": "CPU, with vLLM", "gpu": "GPU"}

EARLIER = "passed on earlier code"

Results = dict[str, list["Result"]]


@dataclass(frozen=True)
class Case:
    """number: of the list, never reused. tests: file::function below `integration_tests`. gap: what no test holds, and
    why. record: a part of a GPU record that speaks of it."""

    number: int
    statement: str
    tests: tuple[str, ...]
    gap: str = ""
    record: str = ""


@dataclass(frozen=True)
class Result:
    """How the runs of one test function ended on one machine: counts over its parameters. digest: of the code that a
    GPU record speaks of. earlier: that is not today's code."""

    machine: str
    passed: int
    failed: int
    date: str
    commit: str
    digest: str = ""
    earlier: bool = False


@dataclass
class Area:
    name: str
    cases: list[Case] = field(default_factory=list)


def read_cases() -> list[Area]:
    """The areas and their cases, in the order of the file."""
    areas = tomllib.loads(CASES.read_text())["area"]
    return [Area(a["name"], [Case(**{**c, "tests": tuple(c["tests"])}) for c in a["case"]]) for a in areas]


def named_tests(areas: Iterable[Area]) -> list[str]:
    """Every test that a case names, once."""
    return list(dict.fromkeys(test for area in areas for case in area.cases for test in case.tests))


def where(test: str) -> str:
    """Which environment runs it: a key of WHERE."""
    return {"gpu": "gpu", "vllm_plugin": "vllm"}.get(test.partition("/")[0], "cpu")


def read_results(folder: Path = RESULTS) -> Results:
    """test -> its last result on each machine."""
    found: Results = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for test, result in record["tests"].items():
            found.setdefault(test, []).append(Result(record["machine"], **result))
    return found


def record_results(folder: Path = RECORDS) -> Results:
    """test -> its result in each record of today's code, else in the newest record of earlier code that has it."""
    found: Results = {}
    for earlier, place in ((False, folder), (True, folder / "superseded")):
        records = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
        parts = [(record[part], record) for record in records for part in ("tests", "engine_tests") if record.get(part)]
        newest: Results = {}
        for tests, record in sorted(parts, key=lambda part: part[0].get("date", ""), reverse=True):
            for test, counts in tests.get("functions", {}).items():
                when = tests["date"], tests["commit"], record["digest"]
                newest.setdefault(test, []).append(Result(record["device"]["name"], *counts.values(), *when, earlier))
        for test, results in newest.items():
            found.setdefault(test, results[:1] if earlier else results)
    return found


def all_results() -> Results:
    """Both kinds of results."""
    found = read_results()
    for test, results in record_results().items():
        found[test] = [*found.get(test, ()), *results]
    return found


def take(reports: Iterable[Path], machine: str, folder: Path = RESULTS) -> int:
    """Keep what the reports say of tests that a case names; how many."""
    wanted = set(named_tests(read_cases()))
    when = stamp()
    new = {test: {**counts, **when} for test, counts in by_function(reports).items() if test in wanted}
    path = folder / (re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json")
    before = json.loads(path.read_text())["tests"] if path.exists() else {}
    kept = {test: result for test, result in sorted({**before, **new}.items()) if test in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "tests": kept}, indent=1) + "\n")
    return len(new)


def run(place: str, machine: str, folder: Path, words: list[str]) -> int:
    """Run the tests of one environment that cases name, with this interpreter; pytest's exit status."""
    tests = [f"{TESTS.name}/{test}" for test in named_tests(read_cases()) if where(test) == place]
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "junit.xml"
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "not long", *tests, f"--junitxml={report}", *words],
            cwd=ROOT, check=False,
        ).returncode  # fmt: skip
        print(f"{take([report], machine, folder)} results kept in {folder}")
    return status


def machine_here(place: str) -> str:
    """The GPU's name, or that of the environment on the CPU."""
    if place != "gpu":
        return WHERE[place]
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("reliability: --where gpu needs a CUDA device; this machine has none")
    return torch.cuda.get_device_name(0)


def verdict(case: Case, results: Results) -> str:
    """One word for the last results of a case's tests, and what is missing."""
    last = [result for test in case.tests for result in results.get(test, ())]
    if any(result.failed for result in last):
        return "**failed**"
    missing = [test for test in case.tests if test not in results]
    if not case.tests:
        return "no test"
    if missing:
        return "not run" if len(missing) == len(case.tests) else f"passed; {len(missing)} not run"
    return EARLIER if any(result.earlier for result in last) else "passed"


def sanitizer_rows() -> tuple[str, list[dict[str, Any]]]:
    """Of the record that last has such rows: its name, and the rows."""
    for path in [*sorted(RECORDS.glob("*.json")), *sorted((RECORDS / "superseded").glob("*.json"), reverse=True)]:
        rows = json.loads(path.read_text()).get("sanitizer")
        if rows:
            return path.relative_to(ROOT).as_posix(), rows
    return "", []


def _table(area: Area, results: Results) -> Iterator[str]:
    yield from (f"## {area.name}", "", "| case | what must hold | last result |", "|---|---|---|")
    for case in area.cases:
        yield f"| {case.number} | {case.statement} | {verdict(case, results)} |"
    yield ""


def _tests(cases: list[Case], results: Results) -> Iterator[str]:
    yield from ("## Tests", "", "Files are below `integration_tests`.", "")
    if not any(result.digest for last in results.values() for result in last):
        counted = "[GPU records](../records/superseded/README.md) so far count their tests and do not name them."
        yield from (counted, "")
    yield from ("| case | test | where | last result |", "|---|---|---|---|")
    for case in cases:
        for test in case.tests:
            text = ", ".join(_ended(result) for result in results.get(test, ())) or "not run"
            yield f"| {case.number} | `{test}` | {WHERE[where(test)]} | {text} |"
    name, rows = sanitizer_rows()
    for case in cases:
        if case.record:
            told = ", ".join(f"{row['tool']} {row['errors']}" for row in rows)
            yield f"| {case.number} | `scripts/gpu_record.py run --parts sanitizer` | GPU | errors: {told}; `{name}` |"
    yield ""


def _gaps(cases: list[Case]) -> Iterator[str]:
    yield from ("## What no test holds", "", "| case | what must hold | what is missing, and why |", "|---|---|---|")
    yield from (f"| {case.number} | {case.statement} | {case.gap} |" for case in cases if case.gap)


def _mutants() -> Iterator[str]:
    """Counts of each run of generated faults, and each survivor of the last run with the reason it has, if any."""
    runs = [json.loads(path.read_text()) for path in sorted(MUTANTS.glob("*.json"))]
    why = equivalents()
    told = "`scripts/mutants.py` changes one constant, bound, operator, branch, call or store at a time and runs the "
    told += "tests that fit, or calls that judge a kernel on a GPU. A run may take a sample by seed, and may be cut "
    told += "short. What was red without a fault is left out. Same code: no probed kernel's machine code changed."
    yield from ("## Generated faults", "", told)
    head = "| suite | faults | run | how they ended | sample | left out | when |"
    yield from ("", head, "|---|---|---|---|---|---|---|")
    for run in runs:
        ends = ", ".join(f"{count} {end}" for end, count in run["ends"].items() if count and end != "not run")
        sample = "all" if run["sample"] is None else f"{run['sample']['size']} by seed {run['sample']['seed']}"
        counts = f"{run['suite']} | {run['faults']} | {run['run']} | {ends} | {sample} | {len(run['left_out'])}"
        yield f"| {counts} | {_stamp(run)} |"
    survivors = [(name, run["suite"]) for run in runs for name in (*run["equivalent"], *run["survived"])]
    killed = [entry for run in runs for entry in run.get("killed_since", ())]
    if survivors:
        yield from ("", "| survivor | why it is none, or nothing of its suite sees it |", "|---|---|")
        yield from (f"| {_cell(name)} | {why.get(name, 'not known yet')} |" for name, _ in survivors)
    if killed:
        yield from ("", "| survived that run | what fails on it since |", "|---|---|")
        yield from (f"| {_cell(entry['fault'])} | `{entry['test']}` |" for entry in killed)
    yield ""


def _fuzz() -> Iterator[str]:
    told = (
        "`scripts/fuzz_kernels.py` makes random calls and holds each against fp64, with canaries around the operands "
    )
    told += "and NaN in the results' memory."
    yield from ("## Fuzzed kernels", "", told)
    found = [json.loads(path.read_text()) for path in sorted(FUZZ.glob("*.json"))]
    if not found:
        yield from ("", "No run is recorded yet.", "")
        return
    yield from ("", "| device | backend | calls | kernels' variants | wrong | when |", "|---|---|---|---|---|---|")
    for run in found:
        made = f"{run['made']} | {run['variants']} | {run['wrong']}"
        yield f"| {run['device']} | {run['backend']} | {made} | {run['date']}, seed {run['seed']} |"
    yield ""


def _stamp(run: dict[str, Any]) -> str:
    return f"{run['date']} at {run['commit']}" if run["commit"] else run["date"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _ended(result: Result) -> str:
    counts = f"{result.passed} passed" + (f", **{result.failed} failed**" if result.failed else "")
    commit = f" at {result.commit}" if result.commit else ""
    code = f", {'earlier code' if result.earlier else 'code'} {result.digest[:12]}" if result.digest else ""
    return f"{counts}, {result.machine}, {result.date}{commit}{code}"


def page(areas: list[Area], results: Results) -> str:
    """The page of cases."""
    cases = [case for area in areas for case in area.cases]
    words = [verdict(case, results) for case in cases]
    in_part = sum(word.startswith("passed;") for word in words)
    lines = [
        "# Reliability",
        "",
        "Written by `scripts/reliability.py` from `integration_tests/adversarial/cases.toml` and what runs recorded. "
        "Each case is a bug that shipped somewhere, or one that was found here. How it last ended is the result of its "
        "tests, with the machine and the commit. A test that was skipped has no result. Generated faults and random "
        f"calls have [a page of their own]({FAULTS_PAGE.name}).",
        "",
        "| cases | passed | passed on earlier code | passed in part | failed | not run | without a test |",
        "|---|---|---|---|---|---|---|",
        f"| {len(cases)} | {words.count('passed')} | {words.count(EARLIER)} | {in_part} "
        f"| {words.count('**failed**')} | {words.count('not run')} | {words.count('no test')} |",
        "",
    ]
    for area in areas:
        lines += _table(area, results)
    lines += [*_tests(cases, results), *_gaps(cases)]
    return wrapped("\n".join(lines).rstrip() + "\n")


def faults_page() -> str:
    """The page of generated faults and random calls."""
    head = "# Generated faults and random calls", "", "Written by `scripts/reliability.py` from `records`.", ""
    return wrapped("\n".join([*head, *_mutants(), *_fuzz()]).rstrip() + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a page is stale")
    verbs = parser.add_subparsers(dest="verb")
    for name in ("run", "take"):
        verb = verbs.add_parser(name)
        verb.add_argument("--where", choices=tuple(WHERE), required=name == "run", default="cpu", help="environment")
        verb.add_argument("--results", type=Path, default=RESULTS, help="folder to keep results in")
    verbs.choices["run"].add_argument("words", nargs="*", metavar="PYTEST_ARGUMENT", help="behind --")
    verbs.choices["take"].add_argument("reports", nargs="+", type=Path, metavar="REPORT.xml")
    verbs.choices["take"].add_argument("--machine", help="its name; default: this one's")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    status = 0
    if args.verb == "run":
        status = run(args.where, machine_here(args.where), args.results, args.words)
    elif args.verb == "take":
        machine = args.machine or machine_here(args.where)
        print(f"{take(args.reports, machine, args.results)} results kept in {args.results}")
    pages = {PAGE: page(read_cases(), all_results()), FAULTS_PAGE: faults_page()}
    if args.check:
        stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]
        raise SystemExit(f"stale in docs: {', '.join(stale)}" if stale else 0)
    if args.verb is None or args.results == RESULTS:
        for path, text in pages.items():
            path.write_text(text)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
