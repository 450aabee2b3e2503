"""The record of what was proved and measured on a GPU, and the check that it still speaks of this code.

    python scripts/gpu_record.py run --record records/nvidia-h200.json     # on a machine with a GPU
    python scripts/gpu_record.py run --parts kernels --suite decode qk --warm-jobs 14
    python scripts/gpu_record.py run --parts vllm --vllm-json vllm.json    # rows of scripts/bench_vllm.py
    python scripts/gpu_record.py check                                     # anywhere: non-zero when a record is stale

`run` can be given in parts: each replaces its own rows of a record with the same digest, and refuses one with another,
so that no record mixes two versions of the code. records/README.md says what a record holds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `check` runs anywhere, an interpreter without the package included

from rmsnorm_patch.bench.versions import versions  # noqa: E402

RECORDS = ROOT / "records"

LAUNCH_CODE = ("numerics", "backends", "ops", "fused")
"""Folders of the package between a tensor and a kernel; with everything in `kernels/` they are what a record proves."""

SUITES = ["prefill", "prefill_norm", "decode", "hot", "qk", "quantised", "quantised_decode"]
SUITES += ["long", "odd", "variants", "fp16", "fp32", "host"]
HF = [
    "--shape llama-8b --rounds 4",
    "--shape llama-8b --layers 8 --compile --batch 1 --variants stock F.rms_norm patched",
    "--shape llama-8b --layers 8 --compile reduce-overhead --ops --batch 1 --variants stock F.rms_norm patched",
]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLANTED = "planted fault"
"""The sanitizer's row that must hold errors."""


def covered_files() -> list[Path]:
    suffixes = (".py", ".cu", ".cuh", ".c", ".h", ".toml", ".json")
    folders = (ROOT / "kernels", *(ROOT / "rmsnorm_patch" / name for name in LAUNCH_CODE))
    return sorted(p for folder in folders for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes)


def contents_of(paths: list[Path]) -> dict[str, str]:
    """The sha256 of each file by its path in the checkout."""
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def files() -> dict[str, str]:
    """`contents_of` the covered files."""
    return contents_of(covered_files())


def digest_of(listed: dict[str, str]) -> str:
    """sha256 over the names and contents of `files()`, in their order."""
    total = hashlib.sha256()
    for name, content in listed.items():
        total.update(name.encode() + b"\0")
        total.update(bytes.fromhex(content))
    return total.hexdigest()


def digest() -> str:
    """The name of this version of the kernels and launch code."""
    return digest_of(files())


def plugin_files() -> dict[str, str]:
    """`contents_of` the vLLM plugin."""
    return contents_of(sorted((ROOT / "rmsnorm_patch" / "vllm_plugin").rglob("*.py")))


def device() -> dict[str, object]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _environment() -> dict[str, str]:
    """This process's, with the checkout's package ahead of an installed one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _python(*arguments: str, check: bool = True) -> None:
    """Run this interpreter in the checkout."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=_environment(), check=check)


def run_tests(workers: int = 0) -> dict[str, dict]:
    """Counts of the GPU tests, and the names of those that failed: "tests", and "engine_tests" for those of vLLM.

    Engines speak of the plugin, which a record's files do not hold: their counts stand apart, with the plugin's files.
    With several workers they run beside the others in one process of their own (they share engines, which each worker
    would start), and tests that hold a time against a limit run last, alone.
    """
    folder = "integration_tests/gpu"
    ignored = [f"--ignore={path}" for path in _engine_tests()]
    spread = ["-n", str(workers), "--dist", "worksteal", "-m", "not timed"] if workers and _has("xdist") else []
    with ThreadPoolExecutor(2 if spread else 1) as pool:
        engine_tests = pool.submit(run_engine_tests)
        tests = pool.submit(_test, [folder, *spread, *ignored]).result()
        beside = engine_tests.result()
    if spread:
        tests = merged([tests, _test([folder, "-m", "timed", *ignored])])
    return {"tests": tests, "engine_tests": beside}


def run_engine_tests() -> dict[str, object]:
    """Counts of vLLM's GPU tests, in one process, and the plugin's files."""
    return {**_test([str(path) for path in _engine_tests()]), "files": plugin_files()}


def _engine_tests() -> list[Path]:
    return sorted((ROOT / "integration_tests/gpu").glob("test_vllm_*.py"))


def _test(words: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
        _python(*tests, f"--junitxml={report}", check=False)  # failures are counted below
        return _counts(report)


def merged(counts: list[dict]) -> dict[str, object]:
    """Counts of several runs as those of one."""
    found: dict[str, object] = {name: sum(run[name] for run in counts) for name in ("passed", "failed", "skipped")}
    return {**found, "failures": [name for run in counts for name in run["failures"]]}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _counts(report: Path) -> dict[str, object]:
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


def _rows_from(script: str, *arguments: str) -> list[dict]:
    """The rows that a benchmark script writes to its --json; one that fails ends the run."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        _python(f"scripts/{script}", *arguments, "--json", str(rows))
        return json.loads(rows.read_text())


def _kernel_rows(args: argparse.Namespace) -> list[dict]:
    """Rows of `rmsnorm-patch bench-kernels` over the suites that are asked for."""
    suites = [word for name in args.suite for word in ("--suite", name)]
    limits = ["--seconds", str(args.seconds), "--warm-jobs", str(args.warm_jobs)]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        _python("-m", "rmsnorm_patch", "bench-kernels", *suites, *limits, "--rows", str(rows))
        return json.loads(rows.read_text())


def run_sanitizer(tools: list[str], tests: list[str], seconds: float) -> list[dict]:
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
            return {**row, **_counts(report)}

        return [*pool.map(watch, tools), planted.result()]


def _sanitize(program: str, tool: str, name: str, arguments: list[str], seconds: float, folder: Path) -> dict:
    """One run of this interpreter under one tool; `name` is what its row is called."""
    log = folder / f"{name}.log"
    words = [program, "--tool", tool, "--target-processes", "application-only", "--log-file", str(log)]
    words += ["--launch-timeout", str(int(seconds))]  # the default gave up before five busy processes had begun
    # initcheck must see who writes what our kernels read, the other tools watch our kernels alone.
    words += [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=rms_norm"]
    # An allocation for each tensor: an access past its end is then one outside of any allocation.
    environment = {**_environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words += [sys.executable, *arguments]
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, check=False)
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


def vllm_rows(path: Path) -> list[dict]:
    """Rows of scripts/bench_vllm.py, refused where they were measured with other kernels or launch code."""
    result = json.loads(path.read_text())
    if result.get("digest") != digest():
        raise SystemExit(
            f"{path}: measured with code {str(result.get('digest'))[:12]}, this tree is {digest()[:12]}; "
            "run scripts/bench_vllm.py again"
        )
    return [row for row in result["rows"] if "@" not in row["variant"]]  # those ran other schedules than the tree's


def _replace(old: list[dict], new: list[dict], key: tuple[str, ...]) -> list[dict]:
    identity = lambda row: tuple(row.get(k, "") for k in key)  # noqa: E731
    fresh = {identity(row) for row in new}
    return [row for row in old if identity(row) not in fresh] + new


KEYS = {
    "kernels": ("op", "mode", "dtype", "m", "n", "variant"),
    "hf": ("model", "layers", "work", "mode"),
    "vllm": ("shape", "variant", "process", "case"),
    "jit": ("what", "op", "n"),
    "profile": ("op", "dtype", "m", "n", "provider"),
    "sanitizer": ("tool",),
}
"""The lists of a record, and what makes a row of each the same one, to be replaced by a newer run."""

SECTIONS = {"kernel_time": "kernels"}
"""Parts whose rows go into the list of another."""

PARTS = ("tests", "engine_tests", "kernels", "kernel_time", *(section for section in KEYS if section != "kernels"))


def _measure(part: str, args: argparse.Namespace) -> list[dict]:
    if part == "kernels":
        return _kernel_rows(args)
    if part == "kernel_time":
        return _rows_from("kernel_time.py", *(("--provider", *args.provider) if args.provider else ()))
    if part == "hf":
        return [row for words in args.hf for row in _rows_from("bench_hf.py", *words.split())]
    if part == "vllm":
        return vllm_rows(args.vllm_json)
    if part == "jit":
        return _rows_from("bench_jit.py")
    if part == "profile":
        return _rows_from("profile_counts.py")
    return run_sanitizer(args.tool, args.sanitizer_tests, args.seconds)


def begin(path: Path, fresh: bool, parts: list[str]) -> dict:
    """The record at `path`, or an empty one for this code and device; refuses to mix digests."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if before and before["digest"] != digest():
        if not fresh:
            raise SystemExit(f"{path}: holds another version of the code; give --fresh to start it anew")
        before = {}
    if before and parts == ["vllm"]:  # measured already: taking the rows in needs no GPU
        return before
    record = {"digest": digest(), "files": files(), "device": device(), "tests": None, "engine_tests": None}
    record |= {part: [] for part in KEYS}
    return {**record, **before, "device": record["device"], "versions": {**before.get("versions", {}), **versions()}}


def write(args: argparse.Namespace) -> None:
    path: Path = args.record
    record = begin(path, args.fresh, args.parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        if part == "tests":
            record.update(run_tests(args.workers))
        elif part == "engine_tests":
            record["engine_tests"] = run_engine_tests()
        else:
            section = SECTIONS.get(part, part)
            record[section] = _replace(record[section], _measure(part, args), KEYS[section])
        if part == "vllm":
            measured = json.loads(args.vllm_json.read_text())
            record["versions"] = {**measured.get("versions", {}), **record["versions"]}
            record["kernels_of_a_step"] = {**record.get("kernels_of_a_step", {}), **measured.get("kernels", {})}
        if digest() != record["digest"]:
            raise SystemExit(f"{path}: kernels or launch code changed while {part} ran; its rows are not written")
        path.write_text(json.dumps(record, indent=1) + "\n")
        held = {name: len(record[name]) for name in KEYS}
        print(f"{path}: {part} written; tests {record['tests']}, rows {held}", flush=True)


def _follows(record: dict) -> bool:
    """Whether the digest of a record is that of the files it lists."""
    try:
        return digest_of(record.get("files", {})) == record["digest"]
    except ValueError:  # a content that is not hexadecimal
        return False


def _named(names: list[str]) -> str:
    """The first three names, and how many there are beside them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def problems_of(record: dict, tree: dict[str, str]) -> list[str]:
    """What keeps a record from speaking for the files it lists, as `tree` has them; it says nothing of other files."""
    changed = [name for name, content in record.get("files", {}).items() if tree.get(name) != content]
    if not changed:
        return findings_of(record)
    stale = (
        f"recorded for code {record['digest'][:12]}, changed or removed since: {_named(changed)}; "
        "run scripts/gpu_record.py run on that GPU and commit the result"
    )
    return [stale, *findings_of(record)]


def proved_by(record: dict, tree: dict[str, str]) -> list[str]:
    """The files of `tree` that a record lists as they are; none where it has findings."""
    if findings_of(record):
        return []
    return [name for name, content in tree.items() if record["files"].get(name) == content]


def findings_of(record: dict) -> list[str]:
    """What keeps a record from speaking for any code."""
    found = []
    if not _follows(record):
        found.append(
            f"digest {record['digest'][:12]} does not follow from its files; "
            "restore the record as it was written, or run scripts/gpu_record.py run on that GPU"
        )
    if not record["tests"]:
        found.append("holds no test run; run with --parts tests")
    elif record["tests"]["failed"] or not record["tests"]["passed"]:
        found.append(f"GPU tests {record['tests']}")
    engines = record.get("engine_tests")
    if engines and engines["failed"] and engines["files"] == plugin_files():
        found.append(f"tests of vLLM engines with this plugin: {engines['failures']}")
    for row in record["kernels"]:
        wrong = {name: why for name, why in row["failed"].items() if name.startswith("ours")}
        if wrong:
            found.append(f"{row['op']} {row['mode']} {row['dtype']} {row['m']}x{row['n']}: no figure for {wrong}")
    for row in record.get("sanitizer", ()):
        if row["tool"] == PLANTED and not row["errors"]:
            found.append("compute-sanitizer did not see the planted fault: that it saw no other says nothing")
        elif row["tool"] != PLANTED and (row["errors"] != 0 or row["failed"] or not row["passed"]):
            found.append(f"compute-sanitizer {row}")
    return found


def check(args: argparse.Namespace) -> None:
    """Exit 1 where a file has no record, or a record speaks of other code or of failed tests, kernels or sanitizers."""
    tree = files()
    records = {path.name: json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))}
    problems = [f"{name}: {what}" for name, record in records.items() for what in problems_of(record, tree)]
    proved = {name: proved_by(record, tree) for name, record in records.items()}
    missing = [name for name in tree if not any(name in listed for listed in proved.values())]
    if missing:
        problems.append(f"no record has {_named(missing)}; run scripts/gpu_record.py run on a GPU")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(1)
    matching = f"{len(records)} record(s) match the code ({digest_of(tree)[:12]}, {len(tree)} files)"
    partial = [f"{name}: {len(p)} of {len(tree)} files" for name, p in proved.items() if len(p) < len(tree)]
    print("; ".join([matching, *partial]))


def _default_record() -> Path:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_record run: needs a CUDA device; this machine has none")
    return RECORDS / (re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-") + ".json")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the GPU tests and the benchmarks, write the record")
    run.add_argument("--record", type=Path, help="default: records/<gpu>.json")
    run.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="default: all, vllm only with --vllm-json; tests brings engine_tests with it",
    )
    run.add_argument("--workers", type=int, default=0, help="processes of the GPU tests, where pytest-xdist is here")
    run.add_argument("--suite", nargs="+", default=SUITES, help="of rmsnorm-patch bench-kernels")
    run.add_argument("--provider", nargs="*", default=[], help="[name=]module:function, one more in kernel_time")
    run.add_argument("--warm-jobs", type=int, default=0, help="processes that compile ahead of the kernels' timing")
    run.add_argument("--seconds", type=float, default=3600, help="limit of the kernels' timing, and of each sanitizer")
    run.add_argument("--hf", nargs="+", default=HF, help="runs of scripts/bench_hf.py, the arguments of each a string")
    run.add_argument("--vllm-json", type=Path, help="what scripts/bench_vllm.py wrote")
    run.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS), help="of compute-sanitizer")
    run.add_argument("--sanitizer-tests", nargs="+", default=["integration_tests/gpu"])
    run.add_argument("--fresh", action="store_true", help="replace a record of another version of the code")
    verbs.add_parser("check", help="compare the files of every record with this tree")
    args = parser.parse_args()
    if args.verb == "run":
        left_out = {"engine_tests"} if args.vllm_json else {"engine_tests", "vllm"}
        args.parts = args.parts or [part for part in PARTS if part not in left_out]
        if "vllm" in args.parts and not args.vllm_json:
            parser.error("--parts vllm: give the file of scripts/bench_vllm.py as --vllm-json")
    return args


def main() -> None:
    args = parsed()
    if args.verb == "check":
        check(args)
        return
    args.record = args.record or _default_record()
    write(args)


if __name__ == "__main__":
    main()
