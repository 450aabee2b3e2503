"""compute-sanitizer over the tests marked `sanitized`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchlib.checkout import ROOT, environment
from benchlib.pytest_runs import counts_in

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLANTED = "planted fault"
"""The row that must hold errors."""


def run(tools: list[str], tests: list[str], seconds: float) -> list[dict]:
    """Each tool over the tests marked `sanitized`, and memcheck over a fault that it must find, all at once."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise SystemExit("gpu_record: compute-sanitizer is not on the PATH")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(tools) + 1) as pool:
        folder = Path(name)
        planted = pool.submit(
            _sanitize, program, "memcheck", PLANTED, ["scripts/benchlib/planted_fault.py"], 300, folder
        )
        words = ["-m", "pytest", *tests, "-m", "sanitized", "-q", "-p", "no:cacheprovider"]

        def watch(tool: str) -> dict:
            report = folder / f"{tool}.xml"
            row = _sanitize(program, tool, tool, [*words, f"--junitxml={report}"], seconds, folder)
            return {**row, **counts_in(report)}

        return [*pool.map(watch, tools), planted.result()]


def _sanitize(program: str, tool: str, name: str, arguments: list[str], seconds: float, folder: Path) -> dict:
    """One run of this interpreter under one tool; `name` is what its row is called."""
    log = folder / f"{name}.log"
    words = [program, "--tool", tool, "--target-processes", "application-only", "--log-file", str(log)]
    words += ["--launch-timeout", str(int(seconds))]  # the default gave up before five busy processes had begun
    # initcheck must see who writes what our kernels read, the other tools watch our kernels alone.
    words += [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=rms_norm"]
    # An allocation for each tensor: an access past its end is then one outside of any allocation.
    variables = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words += [sys.executable, *arguments]
    try:
        done = subprocess.run(words, cwd=ROOT, env=variables, timeout=seconds, capture_output=True, check=False)
        ended = f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    text = log.read_text() if log.exists() else ""
    print(f"{name}: {ended}\n{text[-3000:]}", flush=True)
    return {"tool": name, "ended": ended, "errors": sanitizer_errors(text)}


def sanitizer_errors(log: str) -> int | None:
    """Errors and hazards of a compute-sanitizer log; None where it holds no summary, so that nothing passes unseen."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log)
    return sum(int(errors or hazards) for errors, hazards in found) if found else None
