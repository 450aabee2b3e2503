"""The record: parts that replace their own rows, stale code that is refused, findings that fail the check."""

from __future__ import annotations

import json
import sys

import pytest

KERNEL = {"op": "rms_norm", "mode": "cold", "dtype": "bf16", "m": 1, "n": 64, "us": {"ours": 1.0}, "failed": {}}


@pytest.fixture(scope="module")
def gpu_record(script):
    return script("gpu_record")


@pytest.fixture
def record(gpu_record):
    """A record of this tree in which everything passed; made-up figures, for these tests alone."""
    return {
        "digest": gpu_record.digest(),
        "device": {"name": "test data, no GPU"},
        "versions": {},
        "tests": {"passed": 3, "failed": 0, "skipped": 1, "failures": []},
        "kernels": [KERNEL],
        "sanitizer": [
            {"tool": "memcheck", "errors": 0, "passed": 3, "failed": 0, "skipped": 0},
            {"tool": gpu_record.PLANTED, "errors": 60},
        ],
    }


def test_a_right_record_has_no_problems(gpu_record, record):
    assert gpu_record.problems_of(record, gpu_record.digest()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "0" * 64}, "recorded for code 000000000000"),
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
    (problem,) = gpu_record.problems_of({**record, **change}, gpu_record.digest())
    assert said in problem


def test_a_failing_peer_is_no_problem_of_ours(gpu_record, record):
    record["kernels"] = [{**KERNEL, "failed": {"quack": "relative error 1"}}]
    assert gpu_record.problems_of(record, gpu_record.digest()) == []


def test_runs_of_tests_are_counted_together(gpu_record):
    one = {"passed": 3, "failed": 0, "skipped": 1, "failures": []}
    other = {"passed": 2, "failed": 1, "skipped": 0, "failures": ["a::b"]}
    assert gpu_record.merged([one, other]) == {"passed": 5, "failed": 1, "skipped": 1, "failures": ["a::b"]}


def test_the_check_ends_with_an_error_for_a_stale_record(gpu_record, record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_record, "RECORDS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "check"])
    with pytest.raises(SystemExit):
        gpu_record.main()
    assert "no record" in capsys.readouterr().err
    (tmp_path / "test-data.json").write_text(json.dumps(record))
    gpu_record.main()
    (tmp_path / "test-data.json").write_text(json.dumps({**record, "digest": "f" * 64}))
    with pytest.raises(SystemExit):
        gpu_record.main()
    assert "test-data.json: recorded for code ffffffffffff" in capsys.readouterr().err


def test_the_digest_follows_kernels_and_launch_code(gpu_record, repository, tmp_path, monkeypatch):
    import shutil

    for folder in ("kernels", "rmsnorm_patch"):
        shutil.copytree(repository / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(gpu_record, "ROOT", tmp_path)
    before = gpu_record.digest()
    for path in ("kernels/cuda/rows.cuh", "kernels/registry.toml", "rmsnorm_patch/launcher.c", "rmsnorm_patch/ops.py"):
        (tmp_path / path).write_text((tmp_path / path).read_text() + "\n")
        after = gpu_record.digest()
        assert after != before, path
        before = after
    (tmp_path / "rmsnorm_patch" / "cli.py").write_text("")
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

    def no_gpu() -> dict:
        raise AssertionError("rows that were measured are taken into a record without a GPU")

    monkeypatch.setattr(gpu_record, "device", no_gpu)
    again = {"digest": gpu_record.digest(), "versions": {"vllm": "9.9"}, "rows": [{**row, "tokens_per_s": 2.0}]}
    measured.write_text(json.dumps(again))
    run()
    assert json.loads(path.read_text())["versions"]["vllm"] == "9.9"
    monkeypatch.setattr(gpu_record, "device", lambda: {"name": "test data, no GPU"})
    rows = {r["case"]: r["tokens_per_s"] for r in json.loads(path.read_text())["vllm"]}
    assert rows == {"prefill": 1.0, "decode-1": 2.0}
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
    monkeypatch.setattr(gpu_record, "run_tests", lambda workers: {"passed": 1, "failed": 0, "skipped": 0})
    monkeypatch.setattr(sys, "argv", ["gpu_record.py", "run", "--record", str(tmp_path / "r.json"), "--parts", "tests"])
    with pytest.raises(SystemExit, match="changed while tests ran"):
        gpu_record.main()
    assert not (tmp_path / "r.json").exists()


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
    assert gpu_record.sanitizer_errors(log) == errors


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
    rows = gpu_record.run_sanitizer(["memcheck", "initcheck"], ["integration_tests/gpu"], 60)
    assert [row["tool"] for row in rows] == ["memcheck", "initcheck", gpu_record.PLANTED]
    assert [row["errors"] for row in rows] == [0, 0, 60]
    assert [row.get("passed") for row in rows] == [3, 3, None]


def test_a_test_run_without_a_report_counts_as_failed(gpu_record, tmp_path):
    assert gpu_record._counts(tmp_path / "none.xml")["failed"] == 1
