"""How commands end: statuses, the one document on stdout, streams that break, and what starts without torch."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rmsnorm_patch
from rmsnorm_patch import api
from rmsnorm_patch.cli import output
from rmsnorm_patch.cli.output import CLOSED_PIPE, FAILED, INTERRUPTED, UNUSABLE, USAGE


def test_quick_answers_do_not_wait_for_torch(repository: Path, tmp_path: Path) -> None:
    """Help, version and everything that is refused before a model is needed."""
    cases = [
        ["--help"], ["--version"], ["plan", "--help"], ["plam"], ["plan"], ["plan", "x", "--fast"],
        ["plan", "x", "--dtype", "int3"], ["plan", str(tmp_path)], ["plan", "x", "--json"],
    ]  # fmt: skip
    code = (
        "import json, sys\nfrom rmsnorm_patch.cli import main\n"
        f"for words in {cases!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as ended: print(words, ended.code, 'torch' in sys.modules, file=sys.stderr)\n"
        "import rmsnorm_patch\n"
        "assert 'torch' not in sys.modules and rmsnorm_patch.__version__\n"
        "from rmsnorm_patch import plan, Report\n"
        "assert 'torch' in sys.modules and callable(plan) and callable(rmsnorm_patch.plan)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = [line.rsplit(maxsplit=2)[1:] for line in done.stderr.splitlines() if line.startswith("[")]
    assert ends == [["0", "False"]] * 3 + [["2", "False"]] * 6
    assert f"rmsnorm_patch {rmsnorm_patch.__version__}\n" in done.stdout


def test_the_package_has_its_names_and_no_others() -> None:
    assert set(rmsnorm_patch.__all__) <= set(dir(rmsnorm_patch))
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        rmsnorm_patch.plam  # noqa: B018


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["plan", "--backend", "fast"], ["--backend", "'fast'", "'triton'"]),
        (["plan", "--dtype", "int8"], ["--dtype", "'int8'", "'bfloat16'"]),
        (["generate", "--max-new-tokens", "0"], ["Invalid value", "--max-new-tokens"]),
        (["bench", "--rounds", "many"], ["Invalid value", "--rounds", "integer"]),
        (["plan", "--fast"], ["--fast"]),
        (["plam"], ["plam"]),
    ],
)
def test_unknown_option_or_value(command, tiny_llama: Path, words: list[str], named: list[str]) -> None:
    ended = command(words[0], tiny_llama, *words[1:])
    assert (ended.status, ended.stdout) == (USAGE, "")
    for word in named:
        assert word in ended.stderr


@pytest.mark.parametrize(
    "words", [["plan"], ["plam"], ["plan", "x", "--fast"], ["env", "--vllm-arg=--enforce-eager"], ["plan", "x", "y"]]
)
def test_wrong_usage_is_a_document_too(command, words: list[str]) -> None:
    ended = command(*words, "--json")
    assert ended.status == ended.document["exit_status"] == USAGE
    assert all(ended.document["error"][part] for part in ("type", "site", "got", "supported", "next_step"))
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ZeroDivisionError("planted"), "Traceback"),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), "/some/file"),
        (MemoryError("planted"), "memory"),
        (SystemExit(0), "Traceback"),
    ],
)
def test_status_1_is_kept_for_proofs(
    command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, shown: str
) -> None:
    """Whatever goes wrong otherwise, a program that reads the document is told so."""

    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "plan", broken)
    ended = command("plan", tiny_llama, "--json")
    assert ended.status == ended.document["exit_status"] == UNUSABLE != FAILED
    assert ended.document["error"]["type"] == type(error).__name__
    assert shown in ended.stderr
    assert command("plan", tiny_llama).status == UNUSABLE


@pytest.mark.parametrize("words", [["--help"], ["plan", "nowhere", "--json"], ["cache", "show"]])
def test_full_disk_under_stdout(command, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSNORM_PATCH_CACHE_DIR", str(tmp_path / "kernels"))
    with monkeypatch.context() as during, open("/dev/full", "w") as full:
        during.setattr(sys, "stdout", full)
        ended = command(*words)
    assert ended.status == UNUSABLE
    assert "No space left" in ended.stderr


def test_streams_of_a_process(repository: Path, tiny_llama: Path) -> None:
    """A full disk, a reader that has gone, and a terminal that knows ASCII alone."""
    words = [sys.executable, "-m", "rmsnorm_patch", "cache", "show"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, cwd=repository, stdout=full, stderr=subprocess.PIPE).returncode == UNUSABLE
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run(words, cwd=repository, stdout=writing, stderr=subprocess.PIPE).returncode == CLOSED_PIPE
    os.close(writing)
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [*words[:3], "generate", str(tiny_llama), "--prompt", "café ☃", "--max-new-tokens", "2"]
    done = subprocess.run(words, cwd=repository, env=ascii_only, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert r"caf\xe9 \u2603" in done.stdout


def test_interrupted(command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "plan", interrupted)
    assert command("plan", tiny_llama, "--json").status == INTERRUPTED


def test_documents_have_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_document({"a": [float("nan"), 1.5], "b": {"c": float("inf")}}, sys.stdout)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": ["nan", 1.5], "b": {"c": "inf"}}
