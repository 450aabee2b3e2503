"""The record: parts that replace their own rows, stale code that is refused, findings that fail the check."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

KERNEL = {"op": "rms_norm", "mode": "cold", "dtype": "bf16", "m": 1, "n": 64, "us": {"ours": 1.0}, "failed": {}}
NO_RECORD = "no record has {}; run scripts/gpu_record.py run on a GPU"


@pytest.fixture(scope="module")
def gpu_record(script):
    return script("gpu_record")


def record_of(gpu_record, files):
    """A record of these files in which everything passed; made-up figures, for these tests alone."""
    return {
        "digest": gpu_record.digest_of(files),
        "files": files,
        "device": {"name": "test data, no GPU"},
        "versions": {},
        "tests": {"passed": 3, "failed": 0, "skipped": 1, "failures": []},
        "kernels": [KERNEL],
        "sanitizer": [
            {"tool": "memcheck", "errors": 0, "passed": 3, "failed": 0, "skipped": 0},
            {"tool": gpu_record.sanitizer.PLANTED, "errors": 60},
        ],
    }


@pytest.fixture
def record(gpu_record):
    return record_of(gpu_record, gpu_record.files())


@pytest.fixture
def checkout(gpu_record, repository, tmp_path, monkeypatch):
    """A copy of the kernels and the package, to be changed, which the script takes for its own."""
    for folder in ("kernels", "rmsnorm_patch"):
        shutil.copytree(repository / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(gpu_record, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def check(gpu_record, tmp_path, monkeypatch, capsys):
    """`check(name=record, ...)`: the lines of the command where there are these records alone; errors if it fails."""

    def run(**records: dict) -> list[str]:
        folder = tmp_path / "records"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, record in records.items():
            (folder / f"{name}.json").write_text(json.dumps(record))
        monkeypatch.setattr(gpu_record, "RECORDS", folder)
        monkeypatch.setattr(sys, "argv", ["gpu_record.py", "check"])
        failed = False
        try:
            gpu_record.main()
        except SystemExit as ended:
            failed = ended.code == 1
        said = capsys.readouterr()
        return (said.err if failed else said.out).splitlines()

    return run


def test_a_right_record_has_no_problems(gpu_record, record):
    assert gpu_record.problems_of(record, gpu_record.files()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "0" * 64}, "digest 000000000000 does not follow from its files"),
        ({"files": {}}, "does not follow from its files"),
        ({"tests": None}, "holds no test run"),
        ({"tests": {"passed": 3, "failed": 1, "skipped": 0, "failures": ["a::b"]}}, "a::b"),
        ({"tests": {"passed": 0, "failed": 0, "skipped": 9, "failures": []}}, "'passed': 0"),
        ({"kernels": [{**KERNEL, "failed": {"ours": "relative error 1"}}]}, "relative error 1"),
        ({"sanitizer": [{"tool": "racecheck", "errors": 2, "passed": 3, "failed": 0}]}, "racecheck"),
        ({"sanitizer": [{"tool": "racecheck", "errors": None, "passed": 3, "failed": 0}]}, "racecheck"),
        ({"sanitizer": [{"tool": "memcheck", "errors": 0, "passed": 0, "failed": 0}]}, "memcheck"),
        ({"sanitizer": [{"tool": "planted fault", "errors": 0}]}, "planted fault"),
        ({"sanitizer": [{"tool": "planted fault", "errors": None}]}, "planted fault"),
    ],
)
def test_what_the_check_refuses(gpu_record, record, change, said):
    (problem,) = gpu_record.problems_of({**record, **change}, gpu_record.files())
    assert said in problem


def test_a_failing_peer_is_no_problem_of_ours(gpu_record, record):
    record["kernels"] = [{**KERNEL, "failed": {"quack": "relative error 1"}}]
    assert gpu_record.problems_of(record, gpu_record.files()) == []


def test_runs_of_tests_are_counted_together(gpu_record):
    good, bad = {"passed": 2, "failed": 0}, {"passed": 1, "failed": 1}
    one = {"passed": 3, "failed": 0, "skipped": 1, "failures": [], "functions": {"a.py::b": good}}
    other = {"passed": 2, "failed": 1, "skipped": 0, "failures": ["a::b"]}
    assert gpu_record.merged([one, {**other, "functions": {"a.py::b": bad, "c.py::d": good}, "date": "later"}]) == {
        "passed": 5,
        "failed": 1,
        "skipped": 1,
        "failures": ["a::b"],
        "functions": {"a.py::b": {"passed": 3, "failed": 1}, "c.py::d": good},
        "date": "later",
    }


@pytest.mark.parametrize("workers", [0, 4])
def test_tests_that_want_the_device_run_last_and_those_of_engines_apart(gpu_record, monkeypatch, workers):
    runs = []

    def run(words):
        runs.append(words)
        return {"passed": 10 ** len(runs), "failed": 0, "skipped": 0, "failures": [], "functions": {}}

    monkeypatch.setattr(gpu_record, "run_tests", run)
    assert gpu_record.kernel_tests(workers)["passed"] == (110 if workers else 10)
    assert all(f"--ignore={path}" in words for words in runs for path in gpu_record._engine_tests())
    last = [["-m", "not alone"], ["-m", "alone"]]
    assert [words[-2:] for words in runs] == (last if workers else [runs[0][-2:]])
    runs.clear()
    found = gpu_record.engine_tests(workers)
    assert found["passed"] == (110 if workers else 10)
    assert "rmsnorm_patch/vllm_plugin/hooks.py" in found["files"]
    assert all(set(words) >= {str(path) for path in gpu_record._engine_tests()} for words in runs)
    assert [words[-2:] for words in runs] == (last if workers else [runs[0][-2:]])
    assert ["loadfile" in words for words in runs] == ([True, False] if workers else [False])


def test_a_failure_of_engines_with_this_plugin_is_a_problem(gpu_record, record):
    failed = {"passed": 3, "failed": 1, "skipped": 0, "failures": ["a::b"], "files": gpu_record.plugin_files()}
    (problem,) = gpu_record.problems_of({**record, "engine_tests": failed}, gpu_record.files())
    assert "a::b" in problem
    other = {**failed["files"], "rmsnorm_patch/vllm_plugin/hooks.py": "0" * 64}
    assert gpu_record.problems_of({**record, "engine_tests": {**failed, "files": other}}, gpu_record.files()) == []


@pytest.mark.parametrize("content", ["0" * 64, "no hexadecimal"])
def test_files_edited_by_hand_are_refused(gpu_record, record, content):
    record["files"] = {**record["files"], "kernels/cuda/schedules/long_rows.toml": content}
    stale, edited = gpu_record.problems_of(record, gpu_record.files())
    assert "kernels/cuda/schedules/long_rows.toml" in stale
    assert "does not follow from its files" in edited
    assert gpu_record.proved_by(record, gpu_record.files()) == []


@pytest.mark.parametrize("removed", [False, True])
def test_a_listed_file_that_changed_or_went_makes_a_record_stale(gpu_record, checkout, check, removed):
    record = record_of(gpu_record, gpu_record.files())
    name = "kernels/cuda/rms_norm_pair.cu"
    path = checkout / name
    path.unlink() if removed else path.write_text(path.read_text() + "\n")
    stale, *rest = check(old=record)
    assert stale == (
        f"old.json: recorded for code {record['digest'][:12]}, changed or removed since: {name}; "
        "run scripts/gpu_record.py run on that GPU and commit the result"
    )
    assert rest == ([] if removed else [NO_RECORD.format(name)])
    assert check(old=record, new=record_of(gpu_record, gpu_record.files())) == [stale]


def test_of_many_changed_files_the_first_are_named(gpu_record, checkout):
    record = record_of(gpu_record, gpu_record.files())
    names = list(record["files"])[:5]
    for name in names:
        (checkout / name).write_text("")
    (stale,) = gpu_record.problems_of(record, gpu_record.files())
    assert f"changed or removed since: {', '.join(names[:3])} and 2 more;" in stale


def test_an_added_file_needs_a_record_and_leaves_older_ones_valid(gpu_record, checkout, check):
    old = record_of(gpu_record, gpu_record.files())
    (checkout / "kernels/cuda/added.cu").write_text("// added\n")
    tree = gpu_record.files()
    assert gpu_record.problems_of(old, tree) == []
    assert check(old=old) == [NO_RECORD.format("kernels/cuda/added.cu")]
    (line,) = check(old=old, new=record_of(gpu_record, tree))
    assert line == (
        f"2 record(s) match the code ({gpu_record.digest()[:12]}, {len(tree)} files); "
        f"old.json: {len(tree) - 1} of {len(tree)} files"
    )


def test_records_cover_the_tree_together(gpu_record, check):
    tree = gpu_record.files()
    kernels = {name: content for name, content in tree.items() if name.startswith("kernels/")}
    launch = {name: content for name, content in tree.items() if name not in kernels}
    one, other = record_of(gpu_record, kernels), record_of(gpu_record, launch)
    (line,) = check(one=one)
    assert line.startswith("no record has rmsnorm_patch/")
    (line,) = check(one=one, other=other)
    assert line.startswith("2 record(s) match the code")
    assert f"one.json: {len(kernels)} of {len(tree)} files; other.json: {len(launch)} of {len(tree)} files" in line
    failed, missing = check(one=one, other={**other, "tests": None})
    assert "other.json: holds no test run" in failed
    assert missing.startswith("no record has rmsnorm_patch/")


def test_a_tree_without_records_and_with_one(gpu_record, record, check):
    first, second, third, *rest = record["files"]
    assert check() == [NO_RECORD.format(f"{first}, {second}, {third} and {len(rest)} more")]
    files = len(record["files"])
    assert check(one=record) == [f"1 record(s) match the code ({record['digest'][:12]}, {files} files)"]


def test_the_digest_is_made_as_in_earlier_records(gpu_record):
    """printf 'name\\0<32 bytes>...' | sha256sum"""
    files = {"kernels/a.cu": "00" * 32, "rmsnorm_patch/b.py": "ff" * 32}
    assert gpu_record.digest_of(files) == "4357b04cd0dea3ee41db3dd6bf82d1ae4c1774749053b6350c5290dfc0e01467"


def test_the_digest_follows_kernels_and_launch_code(gpu_record, checkout):
    before = gpu_record.digest()
    launcher = "rmsnorm_patch/backends/cuda/launcher/launcher.c"
    kernels = "kernels/cuda/rows.cuh", "kernels/cuda/schedules/long_rows.toml"
    for path in (*kernels, launcher, "rmsnorm_patch/ops/__init__.py"):
        (checkout / path).write_text((checkout / path).read_text() + "\n")
        after = gpu_record.digest()
        assert after != before, path
        before = after
    (checkout / "rmsnorm_patch" / "cli" / "app.py").write_text("")
    assert gpu_record.digest() == before


def test_rows_of_a_part_replace_their_own(gpu_record):
    key = gpu_record.KEYS["kernels"]
    old = [KERNEL, {**KERNEL, "n": 128}, {**KERNEL, "variant": "1+w"}]
    fresh = {**KERNEL, "variant": "", "us": {"ours": 2.0}}
    assert gpu_record._replace(old, [fresh], key) == [old[1], old[2], fresh]


def test_parts_of_one_record_and_of_another_code(gpu_record, tmp_path, monkeypatch):
    """The parts that need no GPU here: two runs of one record, then a change of the kernels."""
    monkeypatch.setattr(gpu_record, "device", lambda: {"name": "test data, no GPU"})
    path, measured = tmp_path / "record.json", tmp_path / "vllm.json"
    row = {"shape": "tiny", "variant": "ir", "case": "decode-1", "tokens_per_s": 1.0}

    def run(*options: str) -> None:
        words = ["gpu_record.py", "run", "--record", str(path), "--parts", "vllm", "--vllm-json", str(measured)]
        monkeypatch.setattr(sys, "argv", [*words, *options])
        gpu_record.main()

    measured.write_text(json.dumps({"digest": gpu_record.digest(), "rows": [row, {**row, "case": "prefill"}]}))
    run()
    assert json.loads(path.read_text())["files"] == gpu_record.files()

    def no_gpu() -> dict:
        raise AssertionError("rows that were measured are taken into a record without a GPU")

    monkeypatch.setattr(gpu_record, "device", no_gpu)
    for of_a_step in ({"tiny:stock:1": {"norm": [3.0, 2, 4.0]}}, {"tiny:ir:1": {"norm": [2.0, 2, 3.0]}}):
        again = {"digest": gpu_record.digest(), "versions": {"vllm": "9.9"}, "rows": [{**row, "tokens_per_s": 2.0}]}
        measured.write_text(json.dumps({**again, "kernels": of_a_step}))
        run()
    assert json.loads(path.read_text())["versions"]["vllm"] == "9.9"
    steps = json.loads(path.read_text())["kernels_of_a_step"]
    assert steps == {"tiny:stock:1": {"norm": [3.0, 2, 4.0]}, "tiny:ir:1": {"norm": [2.0, 2, 3.0]}}
    monkeypatch.setattr(gpu_record, "device", lambda: {"name": "test data, no GPU"})
    rows = {r["case"]: r["tokens_per_s"] for r in json.loads(path.read_text())["vllm"]}
    assert rows == {"prefill": 1.0, "decode-1": 2.0}
    measured.write_text(json.dumps({"digest": gpu_record.digest(), "rows": [{**row, "tokens_per_s": 3.0}]}))
    for start in ("2", "3", "3"):
        run("--start", start)
    anew = [(r["start"], r["tokens_per_s"]) for r in json.loads(path.read_text())["vllm_starts"]]
    assert anew == [(2, 3.0), (3, 3.0)]
    assert {r["case"]: r["tokens_per_s"] for r in json.loads(path.read_text())["vllm"]} == rows
    with pytest.raises(SystemExit):
        run("--start", "1")
    measured.write_text(json.dumps({"digest": "0" * 64, "rows": [row]}))
    with pytest.raises(SystemExit, match="measured with code 000000000000"):
        run()
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "1" * 64}))
    measured.write_text(json.dumps({"digest": gpu_record.digest(), "rows": [row]}))
    with pytest.raises(SystemExit, match="another version of the code; give --fresh"):
        run()
    run("--fresh")
    assert [r["case"] for r in json.loads(path.read_text())["vllm"]] == ["decode-1"]


def test_code_that_changes_while_a_part_runs_is_not_recorded(gpu_record, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_record, "device", lambda: {"name": "test data, no GPU"})
    digests = iter(["a" * 64, "b" * 64])
    monkeypatch.setattr(gpu_record, "digest", lambda: next(digests))
    passed = {"passed": 1, "failed": 0, "skipped": 0, "failures": []}
    monkeypatch.setattr(gpu_record, "run_tests", lambda words: passed)
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "run", "--record", str(tmp_path / "r.json"), "--parts", "tests"])
    with pytest.raises(SystemExit, match="changed while tests ran"):
        gpu_record.main()
    assert not (tmp_path / "r.json").exists()


def made(gpu_record, monkeypatch, path, *parts):
    """A record written by `run --parts`, its test runs replaced by the number of their arguments."""
    monkeypatch.setattr(gpu_record, "device", lambda: {"name": "test data, no GPU"})
    monkeypatch.setattr(gpu_record, "run_tests", lambda words: {"passed": len(words)})
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "run", "--record", str(path), "--parts", *parts])
    gpu_record.main()
    return json.loads(path.read_text())


def test_tests_of_engines_can_run_again_alone(gpu_record, tmp_path, monkeypatch):
    before = made(gpu_record, monkeypatch, tmp_path / "r.json", "tests")
    record = made(gpu_record, monkeypatch, tmp_path / "r.json", "engine_tests")
    engines = list((gpu_record.ROOT / "integration_tests/gpu").glob("test_vllm_*.py"))
    assert before["engine_tests"] is None
    assert record["tests"] == before["tests"]
    assert record["engine_tests"] == {"passed": len(engines), "files": gpu_record.plugin_files()}
    assert len(engines) > 1


def merge(gpu_record, monkeypatch, *paths, to):
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "merge", *map(str, paths), "--record", str(to)])
    gpu_record.main()
    return json.loads(to.read_text())


def test_parts_that_ran_on_two_gpus_become_one_record(gpu_record, tmp_path, monkeypatch):
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    tests = made(gpu_record, monkeypatch, one, "tests")
    engines = made(gpu_record, monkeypatch, other, "engine_tests")
    row = {"tool": "memcheck", "errors": 0}
    other.write_text(json.dumps({**engines, "sanitizer": [row]}))
    found = merge(gpu_record, monkeypatch, one, other, to=tmp_path / "r.json")
    assert found == {**tests, "engine_tests": engines["engine_tests"], "sanitizer": [row], "kernels_of_a_step": {}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "a" * 64}, "its digest is"),
        ({"device": {"name": "another"}}, "its device is"),
        ({"tests": {"passed": 1}}, "holds tests, which an earlier file of these holds too"),
    ],
)
def test_records_that_cannot_be_one_are_refused(gpu_record, tmp_path, monkeypatch, change, said):
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    made(gpu_record, monkeypatch, one, "tests")
    other.write_text(json.dumps({**made(gpu_record, monkeypatch, other, "engine_tests"), **change}))
    with pytest.raises(SystemExit, match=said):
        merge(gpu_record, monkeypatch, one, other, to=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_the_default_parts_need_no_file(gpu_record, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "run"])
    assert set(gpu_record.parsed().parts) == {*gpu_record.PARTS} - {"vllm"}
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "run", "--vllm-json", "v.json"])
    assert "vllm" in gpu_record.parsed().parts


def test_the_vllm_part_needs_its_file(gpu_record, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "run", "--record", "r.json", "--parts", "vllm"])
    with pytest.raises(SystemExit):
        gpu_record.main()
    assert "--vllm-json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", 3),
        ("========= COMPUTE-SANITIZER\n", None),
        ("", None),
    ],
)
def test_what_a_sanitizer_said(gpu_record, log, errors):
    assert gpu_record.sanitizer.sanitizer_errors(log) == errors


SANITIZER = """#!/usr/bin/env python3
import pathlib, sys
words = sys.argv
log = pathlib.Path(words[words.index("--log-file") + 1])
planted = any(word.endswith("planted_fault.py") for word in words)
log.write_text(f"========= ERROR SUMMARY: {60 if planted else 0} errors\\n")
for word in words:
    if word.startswith("--junitxml="):
        pathlib.Path(word.removeprefix("--junitxml=")).write_text(
            '<testsuites><testsuite tests="4" failures="0" errors="0" skipped="1"/></testsuites>'
        )
"""


def test_rows_of_the_sanitizer(gpu_record, tmp_path, monkeypatch):
    """With a program in its place that only writes logs: which runs there are, and what becomes a row."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows = gpu_record.sanitizer.run(["memcheck", "initcheck"], ["integration_tests/gpu"], 60)
    assert [row["tool"] for row in rows] == ["memcheck", "initcheck", gpu_record.sanitizer.PLANTED]
    assert [row["errors"] for row in rows] == [0, 0, 60]
    assert [row.get("passed") for row in rows] == [3, 3, None]


def test_a_test_run_keeps_what_each_function_gave_and_its_day(script, tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("def test_a():\n    pass\n\ndef test_b():\n    assert False\n")
    found = script("benchlib.pytest_runs").run_tests([str(test), f"--rootdir={tmp_path}"])
    functions = {"test_it.py::test_a": {"passed": 1, "failed": 0}, "test_it.py::test_b": {"passed": 0, "failed": 1}}
    assert (found["passed"], found["failed"], found["functions"]) == (1, 1, functions)
    assert len(found["date"]) == 10


def test_a_test_run_without_a_report_counts_as_failed(script, tmp_path):
    assert script("benchlib.pytest_runs").counts_in(tmp_path / "none.xml")["failed"] == 1


def test_the_record_runs_every_suite(script):
    from rmsnorm_patch.bench.suites import SUITES

    assert sorted(script("gpu_record").SUITES) == sorted(SUITES)


def test_check_needs_no_installed_package(repository):
    """Nor any of an environment: a checkout and an interpreter are enough."""
    words = [sys.executable, "-S", "scripts/gpu_record.py", "check"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
    assert "record" in ended.stdout + ended.stderr
